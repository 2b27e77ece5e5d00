"""The S5 layer and the gated operator against their equations in float64 numpy, and the start of their parameters."""

import jax
import numpy as np
import oracles
import pytest
from tiny import jit, key, random_parameters, shapes

from t5x_ssm.errors import UserError
from t5x_ssm.layers.gated_operator import GatedOperator
from t5x_ssm.layers.mixer import Run
from t5x_ssm.layers.s5 import S5, S5StateSpace
from t5x_ssm.ssm.initialization import legs_normal_plus_low_rank

X = np.random.default_rng(0).normal(size=(2, 9, 6)).astype(np.float32)


def state_space(p, u, *, rule=oracles.zoh, pairs=True, clip=False, c="c", rescale=1.0):
    """Re(C x) of the recurrence, without D."""
    z = lambda name: p[f"{name}_re"] + 1j * p[f"{name}_im"]
    poles = np.minimum(p["lambda_re"], -1e-4 if clip else np.inf) + 1j * p["lambda_im"]
    a, gain = rule(poles, rescale * np.exp(p["log_step"]))
    state, out = np.zeros((len(u), len(a)), complex), []
    for l in range(u.shape[1]):
        state = a * state + u[:, l] @ (gain[:, None] * z("b")).T
        out.append((state @ z(c).T).real * (2 if pairs else 1))
    return np.stack(out, axis=1)


@pytest.mark.parametrize(
    ("output", "fields", "rule"),
    [
        ("gelu", {}, {}),
        ("half_glu1", {"discretization": "bilinear", "conj_sym": False}, {"rule": oracles.bilinear, "pairs": False}),
        ("half_glu2", {"clip_eigs": True, "step_rescale": 2.0}, {"clip": True, "rescale": 2.0}),
        ("full_glu", {"bidirectional": True, "activation": "gelu"}, {}),
    ],
)
def test_s5_equations(output, fields, rule):
    layer = S5(state_size=4, output=output, **fields)
    params = random_parameters(layer, X)
    if layer.clip_eigs:
        params["ssm"]["lambda_re"] = params["ssm"]["lambda_re"].at[0].set(0.4)
    found = jit(lambda x: layer.apply({"params": params}, x, enable_dropout=False))(X)
    p, x = oracles.numpy_tree(params), np.float64(X)
    y = state_space(p["ssm"], x, **rule) + p["ssm"]["d"] * x
    if layer.bidirectional:
        y = y + state_space(p["ssm"], x[:, ::-1], c="c_backward")[:, ::-1]
    # What is not set is the paper's.
    g = oracles.gelu(y) if fields.get("activation") == "gelu" else oracles.gelu_tanh(y)
    gate = oracles.sigmoid(oracles.dense(p["gate"], g)) if output != "gelu" else 1.0
    value = {"half_glu2": lambda: y, "full_glu": lambda: oracles.dense(p["out"], g)}.get(output, lambda: g)()
    expected = value * gate
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5 * np.abs(expected).max())


@pytest.mark.parametrize("width", [1, 3])
def test_gated_operator_equations(width):
    layer = GatedOperator(short_filter_width=width, state_space=lambda name: S5StateSpace(state_size=4, name=name))
    params = random_parameters(layer, X)
    found = jit(lambda x: layer.apply({"params": params}, x, enable_dropout=False))(X)
    p, x = oracles.numpy_tree(params), np.float64(X)

    def branch(name):
        u = oracles.dense(p[name], x)
        taps, y = p[f"{name}_short"]["kernel"], np.zeros_like(u) + p[f"{name}_short"]["bias"]
        for l in range(u.shape[1]):
            for lag in range(min(l + 1, width)):
                y[:, l] += taps[:, lag] * u[:, l - lag]
        return y

    product = branch("value") * branch("key")
    filtered = oracles.gelu(state_space(p["ssm"], product) + p["ssm"]["d"] * product)
    expected = oracles.dense(p["out"], filtered * branch("gate"))
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=2e-5 * np.abs(expected).max())


def test_shapes_of_the_parameters():
    variables = shapes(S5(state_size=8, blocks=2, bidirectional=True), X, enable_dropout=False)
    sizes = {
        jax.tree_util.keystr(path, simple=True, separator="/"): leaf.shape
        for path, leaf in jax.tree_util.tree_leaves_with_path(variables["params"])
    }
    assert sizes == {
        **{f"ssm/{name}": (4,) for name in ("lambda_re", "lambda_im", "log_step")},
        **{f"ssm/b_{part}": (4, 6) for part in ("re", "im")},
        **{f"ssm/{c}_{part}": (6, 4) for c in ("c", "c_backward") for part in ("re", "im")},
        "ssm/d": (6,),
        "gate/kernel": (6, 6),
        "gate/bias": (6,),
    }


def test_the_gated_operator_is_the_published_one():
    """Three taps, and 128 modes in 32 blocks of which no pair is left out."""
    params = shapes(GatedOperator(), X, enable_dropout=False)["params"]
    assert {name: leaf["kernel"].shape for name, leaf in params.items() if "short" in name} == {
        f"{branch}_short": (6, 3) for branch in ("gate", "key", "value")
    }
    assert params["ssm"]["lambda_im"].shape == (128,)
    frequencies = legs_normal_plus_low_rank(4).poles.imag
    start = jit(lambda key: GatedOperator().init(key, X, enable_dropout=False)["params"]["ssm"])(key())
    np.testing.assert_allclose(np.sort(start["lambda_im"]), np.sort(np.tile(frequencies, 32)), rtol=1e-5)
    assert np.mean(start["c_re"] ** 2 + start["c_im"] ** 2) == pytest.approx(1, rel=0.15)


def test_planes_start_from_one_draw_and_directions_from_two():
    """V B is real, which it is only if both planes of B come from the same real matrix; the two C are independent."""
    layer = S5StateSpace(state_size=16, blocks=1, conj_sym=False, bidirectional=True, step_min=0.01, step_max=0.02)

    x = np.zeros((1, 2, 64), np.float32)
    params = jit(lambda key: layer.init(key, x, Run())["params"])(key())
    b = params["b_re"] + 1j * np.asarray(params["b_im"])
    original = legs_normal_plus_low_rank(16).vectors @ b
    np.testing.assert_allclose(original.imag, 0, atol=1e-6)
    assert np.std(original.real) == pytest.approx(0.25, rel=0.1)
    # C starts as "lecun_normal" unless told otherwise: E|C|² is 2/(P H).
    assert np.mean(params["c_re"] ** 2 + params["c_im"] ** 2) == pytest.approx(2 / (16 * 64), rel=0.1)
    c, back = np.ravel(params["c_re"]), np.ravel(params["c_backward_re"])
    assert abs(np.corrcoef(c, back)[0, 1]) < 0.15
    assert np.std(back) == pytest.approx(np.std(c), rel=0.15)
    assert np.log(0.01) <= params["log_step"].min() and params["log_step"].max() <= np.log(0.02)


def test_dropout_mask_is_shared_over_time():
    layer = S5(state_size=4, output="gelu", dropout_rate=0.5)
    x = np.random.default_rng(1).normal(size=(1, 6, 64)).astype(np.float32)
    params = random_parameters(layer, x)
    run = lambda drop: layer.apply({"params": params}, x, enable_dropout=drop, rngs={"dropout": key()})
    dropped, still = jit(lambda: (run(True), run(False)))()
    # A GELU of a very negative number is zero of itself.
    kept = (np.asarray(dropped) != 0).any(axis=1, keepdims=True)
    assert kept.any() and not kept.all()
    zero = ~kept & np.ones_like(still, bool)
    np.testing.assert_allclose(dropped, np.where(zero, 0, 2 * still), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"state_size": 12, "blocks": 4}, "S5StateSpace.state_size = 12 with blocks = 4"),
        ({"blocks": 0}, "S5StateSpace.blocks = 0"),
        ({"discretization": "euler"}, "S5StateSpace.discretization = 'euler'"),
        ({"c_init": "zeros"}, "S5StateSpace.c_init = 'zeros'"),
        ({"step_min": 0.2}, "S5StateSpace.step_min = 0.2"),
        ({"step_rescale": 0.0}, "S5StateSpace.step_rescale = 0.0"),
        ({"output": "glu"}, "S5.output = 'glu'"),
    ],
)
def test_mistakes_are_named(fields, message):
    with pytest.raises(UserError, match=message):
        shapes(S5(**fields), X)


def test_both_directions_cannot_decode():
    with pytest.raises(UserError, match="Set bidirectional = False"):
        shapes(S5(state_size=4, bidirectional=True), X, decode=True)
    with pytest.raises(UserError, match=r"GatedOperator.short_filter_width = 0"):
        shapes(GatedOperator(short_filter_width=0), X)
