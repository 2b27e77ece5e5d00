"""Stacks: scanned or unrolled, with or without rematerialization, pre- or post-norm, they are the same network."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest
from tiny import jit, key, random_parameters

from t5x_ssm.errors import UserError
from t5x_ssm.layers.attention import Attention
from t5x_ssm.layers.basic import MLP, RMSNorm
from t5x_ssm.layers.gss import GSS
from t5x_ssm.models.stack import REMAT_POLICIES, Context, Mode, Stack

WIDTH = 8
MIXERS = {
    "gss": functools.partial(GSS, hidden=8, channels=4, state_size=2),
    "attn": functools.partial(Attention, num_heads=2),
    "drop": functools.partial(Attention, num_heads=2, feed_forward=False, dropout_rate=0.5),
    "wide": functools.partial(Attention, num_heads=2, feed_forward=False),
}


def stack(pattern="drop", num_layers=2, **fields):
    return Stack(pattern=pattern, num_layers=num_layers, mixers=MIXERS, mlp=functools.partial(MLP, hidden=8), **fields)


def inputs():
    return np.random.default_rng(0).normal(size=(2, 6, WIDTH)).astype(np.float32)


def unroll(params):
    """Parameters of the unrolled stack from those of the scanned one."""
    return {
        f"{segment}_{i}": jax.tree.map(lambda p, i=i: p[i], tree)
        for segment, tree in params.items()
        for i in range(len(jax.tree.leaves(tree)[0]))
    }


def loss_and_gradient(net, params, mode=Mode(enable_dropout=False)):
    def loss(params, x):
        return jnp.sum(jnp.square(net.apply({"params": params}, x, Context(), mode, rngs={"dropout": key()})))

    return jit(jax.value_and_grad(loss, argnums=(0, 1)))(params, inputs())


def test_scanned_is_unrolled():
    scanned, unrolled = stack("wide attn", 4), stack("wide attn", 4, scan_layers=False)
    params = random_parameters(scanned, inputs(), Context(), Mode())
    assert {k: len(jax.tree.leaves(v)[0]) for k, v in params.items()} == {"segment_0": 2}
    (loss, (grads, dx)), (loss_u, (grads_u, dx_u)) = (
        loss_and_gradient(net, p) for net, p in ((scanned, params), (unrolled, unroll(params)))
    )
    np.testing.assert_allclose(loss, loss_u, rtol=1e-5)
    np.testing.assert_allclose(dx, dx_u, rtol=1e-3, atol=1e-4)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4), unroll(grads), grads_u)


@pytest.mark.slow
@pytest.mark.parametrize("policy", [p for p in REMAT_POLICIES if p != "none"])
def test_rematerialization_changes_no_number(policy):
    plain, saving = stack(), stack(remat_policy=policy)
    params = random_parameters(plain, inputs(), Context(), Mode())
    # With dropout: the masks of the second forward pass must be those of the first.
    expected, found = (loss_and_gradient(net, params, Mode(enable_dropout=True)) for net in (plain, saving))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4), found, expected)


def test_remat_policies_keep_less_in_memory():
    def residuals(policy):
        net = stack(remat_policy=policy)
        params = random_parameters(net, inputs(), Context(), Mode())
        loss = lambda p: jnp.sum(net.apply({"params": p}, inputs(), Context(), Mode(enable_dropout=False)))
        _, backward = jax.eval_shape(lambda p: jax.vjp(loss, p), params)
        return sum(leaf.size for leaf in jax.tree.leaves(backward))

    sizes = {policy: residuals(policy) for policy in REMAT_POLICIES}
    assert sizes["full"] < sizes["projections"] <= sizes["dots"] < sizes["none"]


@pytest.mark.parametrize("pre_norm", [True, False])
def test_where_norms_and_residuals_are(pre_norm):
    net = stack("wide attn", 2, norm=RMSNorm, pre_norm=pre_norm)
    params = random_parameters(net, inputs(), Context(), Mode())
    y = jit(lambda x: net.apply({"params": params}, x, Context(), Mode(enable_dropout=False)))(inputs())

    def sublayer(x, norm, function):
        if pre_norm:
            return x + function(oracles.layer_norm(norm, x, center=False))
        return oracles.layer_norm(norm, x + function(x), center=False)

    x = np.float64(inputs())
    visible = np.tril(np.ones((6, 6), bool))
    for block in ("block_0", "block_1"):
        p = oracles.numpy_tree(jax.tree.map(lambda leaf: leaf[0], params["segment_0"][block]))
        attend = lambda x, p=p: np.stack([oracles.attention(p["mixer"], row, visible, num_heads=2) for row in x])
        x = sublayer(x, p["mixer_norm"], attend)
        if "mlp" in p:
            mlp = lambda x, p=p: oracles.dense(p["mlp"]["wo"], oracles.gelu_tanh(oracles.dense(p["mlp"]["wi"], x)))
            x = sublayer(x, p["mlp_norm"], mlp)
    assert "mlp" not in params["segment_0"]["block_0"], "this mixer has no feed-forward partner"
    np.testing.assert_allclose(y, x, rtol=1e-4, atol=1e-5)


def test_dropout_differs_between_layers_and_repeats_with_its_key():
    net, x = stack("wide", 2, dropout_rate=0.5), inputs()
    params = random_parameters(net, x, Context(), Mode())
    # Both layers add a constant 1 to what they are given, so the sum counts the layers that were not dropped.
    params = jax.tree.map(jnp.zeros_like, params)
    mixer = params["segment_0"]["block_0"]["mixer"]
    mixer["value"]["kernel"] += 1.0
    mixer["out"]["kernel"] += 1.0
    params["segment_0"]["block_0"]["mixer_norm"]["bias"] += 1 / WIDTH**2
    run = jit(lambda seed: net.apply({"params": params}, x, Context(), Mode(), rngs={"dropout": key(seed)}) - x)
    once, again, other = run(0), run(0), run(1)
    np.testing.assert_array_equal(once, again)
    assert np.abs(once - other).max() > 1
    assert set(np.unique(np.round(once, 4))) == {0.0, 2.0, 4.0}, "kept by none, by one (twice its value), or by both"
    np.testing.assert_allclose(once, np.broadcast_to(once[:, :1], once.shape), atol=1e-6)


def test_mistakes_name_the_setting():
    x = inputs()
    for net, message in [
        (stack(remat_policy="some"), "remat_policy"),
        (stack("gss mamba"), "mamba"),
        (Stack(pattern="attn", mixers=MIXERS), "no mlp"),
    ]:
        with pytest.raises(UserError, match=message):
            net.init(key(), x, Context(), Mode())
