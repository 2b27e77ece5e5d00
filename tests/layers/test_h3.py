"""The H3 layer against its equations, token by token in float64, and the start of its parameters."""

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest
from tiny import draw, jit, key, random_parameters, shapes

from t5x_ssm.errors import UserError
from t5x_ssm.layers.h3 import H3

WIDTH, LENGTH = 8, 9


def expected(params, x, head_dim, discretization, head_layout):
    """The layer by loops over heads and their entries."""
    p = oracles.numpy_tree(params)
    q, k, v = (oracles.dense(p[name], np.float64(x)) for name in ("query", "key", "value"))
    shift = p["shift_ssm"]
    taps = shift["b"].shape[1]
    kernel = np.stack([(shift["b"][:, : taps - j] * shift["c"][:, j:]).sum(-1) for j in range(taps)], axis=1)
    shifted = shift["d"] * k
    for j in range(min(taps, x.shape[1])):
        shifted[:, j:] += kernel[:, j] * k[:, : x.shape[1] - j]
    ssm = p["ssm"]
    rule = {"bilinear": oracles.bilinear, "zoh": oracles.zoh}[discretization]
    a, gain = rule(-np.exp(ssm["a_log_re"]) + 1j * ssm["a_im"], np.exp(ssm["log_step"])[:, None])
    b, c = gain * (ssm["b_re"] + 1j * ssm["b_im"]), 2 * (ssm["c_re"] + 1j * ssm["c_im"])
    heads = x.shape[-1] // head_dim
    out = np.zeros(x.shape)
    for h in range(heads):
        for i in range(head_dim):
            for j in range(head_dim):
                entry = (shifted[..., h * head_dim + i] * v[..., h * head_dim + j])[..., None]
                filtered = oracles.recurrence(a[h : h + 1], b[h : h + 1], c[h : h + 1], entry) + ssm["d"][h] * entry
                place = h * head_dim + j if head_layout == "head_major" else j * heads + h
                out[..., place] += q[..., h * head_dim + i] * filtered[..., 0]
    return oracles.dense(p["out"], out)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"discretization": "zoh"},
        {"head_dim": 4},
        {"head_dim": 2, "head_layout": "head_minor"},
    ],
)
def test_layer_equations(settings):
    layer = H3(state_size=6, **settings)
    x = np.random.default_rng(0).normal(size=(2, LENGTH, WIDTH)).astype(np.float32)
    params = random_parameters(layer, x)
    y = jit(lambda x: layer.apply({"params": params}, x, enable_dropout=False))(x)
    # What is not set is the paper's.
    paper = {"head_dim": 1, "discretization": "bilinear", "head_layout": "head_major"}
    want = expected(params, x, **paper | settings)
    np.testing.assert_allclose(y, want, rtol=1e-5, atol=2e-5 * np.abs(want).max())


def test_a_state_goes_from_call_to_call():
    layer = H3(head_dim=2, state_size=4)
    x = jnp.asarray(np.random.default_rng(0).normal(size=(2, LENGTH, WIDTH)), jnp.float32)
    params = random_parameters(layer, x)

    @jit
    def run(x):
        apply = lambda x, **call: layer.apply({"params": params}, x, enable_dropout=False, **call)
        first, state = apply(x[:, :4], return_state=True)
        second, _ = apply(x[:, 4:], initial_state=state, return_state=True)
        return jnp.concatenate([first, second], axis=1), apply(x)

    pieces, whole = run(x)
    np.testing.assert_allclose(pieces, whole, rtol=1e-4, atol=1e-5)


def test_start_of_parameters():
    layer = H3(state_size=64)
    params = jit(lambda key: layer.init(key, np.zeros((1, 2, 256), np.float32), enable_dropout=False)["params"])(key())
    shift, ssm = params["shift_ssm"], params["ssm"]
    np.testing.assert_array_equal(shift["b"], np.eye(1, 64)[[0] * 256])
    assert np.abs(shift["c"]).max() <= 1 / 8 and abs(np.std(shift["c"]) - 1 / 8 / np.sqrt(3)) < 1e-3
    np.testing.assert_allclose(ssm["a_log_re"], np.log(0.5), rtol=1e-6)
    np.testing.assert_allclose(ssm["a_im"], np.pi * np.arange(32)[[*range(32)]][None].repeat(256, 0), rtol=1e-6)
    assert (np.asarray(ssm["b_re"]) == 1).all() and not np.any(ssm["b_im"])
    assert abs(np.mean(np.square(ssm["c_re"]) + np.square(ssm["c_im"])) - 1) < 0.05
    step = np.exp(ssm["log_step"])
    assert 1e-3 <= step.min() < 2e-3 and 5e-2 < step.max() <= 1e-1
    for leaf in (ssm["d"], shift["d"]):
        assert abs(np.std(leaf) - 1) < 0.2


def test_sizes_follow_the_heads():
    variables = shapes(H3(head_dim=8), jax.ShapeDtypeStruct((1, 2, 64), np.float32), enable_dropout=False)
    assert variables["params"]["ssm"]["c_re"].shape == (8, 32)
    assert variables["params"]["shift_ssm"]["c"].shape == (64, 64)


def test_refusals_name_the_setting():
    for fields, message in [
        ({"head_dim": 3}, "head_dim"),
        ({"state_size": 5}, "state_size"),
        ({"head_layout": "rows"}, "head_major, head_minor"),
        ({"discretization": "euler"}, "zoh, bilinear"),
    ]:
        with pytest.raises(UserError, match=message):
            draw(shapes(H3(**fields), np.zeros((1, 2, WIDTH), np.float32)))
