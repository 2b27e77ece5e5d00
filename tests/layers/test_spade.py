"""SPADE's global layer against its equations in float64 numpy."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest
from tiny import jit, random_parameters, shapes

from t5x_ssm.errors import UserError
from t5x_ssm.layers.attention import Attention
from t5x_ssm.layers.gss import GSSStateSpace
from t5x_ssm.layers.s4 import S4StateSpace
from t5x_ssm.layers.spade import Spade

WIDTH, LENGTH, RADIUS = 8, 9, 3
attention = functools.partial(Attention, num_heads=2, span="sliding", window=RADIUS + 1)


def spade(**fields):
    fields = {"state_space": functools.partial(GSSStateSpace, state_size=3), "attention": attention} | fields
    return Spade(**fields)


def inputs():
    return np.random.default_rng(0).normal(size=(2, LENGTH, WIDTH)).astype(np.float32)


def gss_state_space(p, x):
    a, b = oracles.zoh(-np.exp(p["lambda_log_re"]) + 1j * np.exp(p["lambda_log_im"]), 1.0)
    return oracles.recurrence(a, b, p["c_re"] + 1j * p["c_im"], x) + p["d"] * x


def local_attention(p, x):
    i, j = np.arange(LENGTH)[:, None], np.arange(LENGTH)[None]
    visible = (j <= i) & (i - j <= RADIUS)
    return np.stack([oracles.attention(p, row, visible, num_heads=2) for row in x])


@pytest.mark.parametrize("combine", ["concat", "add", "stack"])
def test_combinations(combine):
    layer = spade(combine=combine, global_weight=0.3)
    x = inputs()
    params = random_parameters(layer, x)
    y = jit(lambda x: layer.apply({"params": params}, x, enable_dropout=False))(x)
    p = oracles.numpy_tree(params)
    far = gss_state_space(p["ssm"], np.float64(x))
    if combine == "stack":
        want = local_attention(p["attention"], far)
    else:
        near = oracles.layer_norm(p["local_norm"], local_attention(p["attention"], np.float64(x)))
        far = oracles.layer_norm(p["global_norm"], far)
        if combine == "add":
            want = 0.3 * far + 0.7 * near
        else:
            want = oracles.dense(p["combine"], np.concatenate([far, near], -1))
    np.testing.assert_allclose(y, want, rtol=1e-5, atol=2e-5 * np.abs(want).max())


def test_frozen_lets_no_gradient_into_the_state_space_or_through_it():
    x = inputs()
    frozen, free = spade(frozen=True), spade()
    params = random_parameters(frozen, x)

    @jit
    def gradients(params, x):
        def loss(layer, params, x, coefficients):
            return jnp.sum(coefficients * layer.apply({"params": params}, x, enable_dropout=False))

        coefficients = jnp.sin(jnp.arange(x.size).reshape(x.shape))
        return [jax.grad(functools.partial(loss, layer), (0, 1))(params, x, coefficients) for layer in (frozen, free)]

    (of_frozen, dx_frozen), (of_free, _) = gradients(params, x)
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(of_frozen["ssm"]))
    assert all(np.any(leaf) for leaf in jax.tree.leaves(of_free["ssm"]))
    # What x still gets comes through the window alone: nothing from a token to those beyond it.
    at_end = jit(jax.grad(lambda x: jnp.sum(frozen.apply({"params": params}, x, enable_dropout=False)[:, -1] ** 2)))(x)
    reached = np.flatnonzero(np.abs(at_end[0]).max(-1))
    assert reached.tolist() == list(range(LENGTH - 1 - RADIUS, LENGTH))
    np.testing.assert_allclose(of_frozen["combine"]["kernel"], of_free["combine"]["kernel"], rtol=1e-5, atol=1e-5)
    assert np.abs(dx_frozen).max() > 0


def test_the_papers_layer_is_the_default():
    params = shapes(Spade(attention=attention), jax.ShapeDtypeStruct((1, 4, 16), np.float32))["params"]
    assert params["combine"]["kernel"].shape == (32, 16)
    assert params["ssm"]["p_re"].shape[-1] == 32
    assert set(params) == {"ssm", "attention", "global_norm", "local_norm", "combine"}


def test_refusals_name_the_setting():
    for layer, call, message in [
        (spade(combine="sum"), {}, "concat, add, stack"),
        (spade(), {"return_state": True}, "initial_state"),
        (spade(state_space=functools.partial(S4StateSpace, bidirectional=True)), {"decode": True}, "bidirectional"),
    ]:
        with pytest.raises(UserError, match=message):
            shapes(layer, inputs(), **call)
