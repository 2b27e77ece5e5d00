"""The DSS layer against its equations in float64 numpy, the start of its parameters, and softmax's horizon."""

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest
from tiny import jit, key, random_parameters

from t5x_ssm.errors import UserError
from t5x_ssm.layers.dss import DSS
from t5x_ssm.ssm import initialization

LENGTH = 9
X = np.random.default_rng(0).normal(size=(2, LENGTH, 6)).astype(np.float32)


def kernel(ssm, kind, scale, length, c="c"):
    """Re Σ_n C_n s_n e^{l ΔΛ_n}, [H, LENGTH]."""
    re, im = ssm["lambda_re"], ssm["lambda_im"]
    poles = {
        "exp": lambda: -np.exp(re) + 1j * im,
        "exp-re-im": lambda: -np.exp(re) + 1j * np.exp(im),
        "clip": lambda: np.minimum(re, 1e-4) + 1j * im,
        "softmax": lambda: re + 1j * im,
    }[kind]()
    steps = np.exp(ssm["log_step"]).reshape(len(ssm["d"]), -1)
    exponent = steps[:, :1] * poles.real + 1j * steps[:, -1:] * poles.imag
    if kind == "softmax":
        factor = 1 / (poles * np.exp(exponent[..., None] * np.arange(length)).sum(-1))
    else:
        factor = (np.exp(exponent) - 1) / poles if scale else 1
    weights = (ssm[f"{c}_re"] + 1j * ssm[f"{c}_im"]) * factor
    return np.einsum("hn,hnl->hl", weights, np.exp(exponent[..., None] * np.arange(LENGTH))).real


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"separate_steps": False, "output": "glu"},
        {"kind": "exp-re-im", "bidirectional": True},
        {"kind": "clip", "scale": False},
        {"kind": "softmax", "kernel_length": 12},
    ],
    ids=["exp", "one step", "exp-re-im bidirectional", "clip without scale", "softmax"],
)
def test_layer_equations(settings):
    layer = DSS(state_size=5, **settings)
    params = random_parameters(layer, X)
    y = jit(lambda x: layer.apply({"params": params}, x, enable_dropout=False))(X)
    p, x = oracles.numpy_tree(params), np.float64(X)
    # What is not set is the paper's.
    paper = {"kind": "exp", "scale": True, "kernel_length": None}
    paper |= {name: value for name, value in settings.items() if name in paper}
    forward, backward = (
        kernel(p["ssm"], *paper.values(), c) if f"{c}_re" in p["ssm"] else None for c in ("c", "c_backward")
    )
    mixed = p["ssm"]["d"] * x
    for i in range(LENGTH):
        for j in range(LENGTH):
            if j <= i:
                mixed[:, i] += forward[:, i - j] * x[:, j]
            elif backward is not None:
                mixed[:, i] += backward[:, j - i - 1] * x[:, j]
    z = oracles.gelu(mixed)
    expected = oracles.dense(p["out"], z)
    if settings.get("output", "linear") == "glu":
        expected = expected * oracles.sigmoid(oracles.dense(p["gate"], z))
    np.testing.assert_allclose(y, expected, rtol=1e-5, atol=2e-5 * np.abs(expected).max())


@pytest.mark.parametrize("kind", ["exp", "exp-re-im", "clip", "softmax"])
def test_start_of_the_parameters(kind):
    """Λ is the LegS half with positive frequencies whatever the kind makes of its parameters; both steps are one draw."""
    width, modes = 512, 4
    layer = DSS(state_size=modes, kind=kind, kernel_length=9 if kind == "softmax" else None)
    x = np.zeros((1, 2, width), np.float32)
    ssm = oracles.numpy_tree(jit(lambda key: layer.init(key, x, enable_dropout=False)["params"])(key()))["ssm"]
    re = -np.exp(ssm["lambda_re"]) if kind in ("exp", "exp-re-im") else ssm["lambda_re"]
    im = np.exp(ssm["lambda_im"]) if kind == "exp-re-im" else ssm["lambda_im"]
    np.testing.assert_allclose(re + 1j * im, initialization.legs_poles(modes), rtol=1e-6)
    assert (im > 0).all()
    np.testing.assert_array_equal(ssm["log_step"][:, 0], ssm["log_step"][:, 1])
    assert np.log(1e-3) <= ssm["log_step"].min() < np.log(2e-3) < np.log(5e-2) < ssm["log_step"].max() <= np.log(1e-1)
    for name in ("c_re", "c_im", "d"):
        assert abs(np.std(ssm[name]) - 1) < 4 / np.sqrt(2 * ssm[name].size), name


@pytest.mark.slow
def test_softmax_generates_up_to_its_horizon_and_not_beyond():
    """Prefill and steps are the parallel form for kernel_length tokens, and NaN, not a guess, after that."""
    layer = DSS(state_size=4, kind="softmax", kernel_length=7)
    params = random_parameters(layer, X[:, :7])
    apply = lambda *args, **call: layer.apply(*args, enable_dropout=False, mutable=["cache"], **call)

    @jit
    def run(x):
        variables = {"params": params}
        _, cache = apply(variables, x[:, :7], decode=True)
        lengths = jnp.array([2, 4])
        first, cache = apply(variables | cache, x[:, :4], prefill=True, prefill_lengths=lengths)
        steps = []
        for i in range(4):
            token = jnp.stack([x[0, 2 + i], x[1, 4 + i]])[:, None]
            y, cache = apply(variables | cache, token, decode=True)
            steps.append(y[:, 0])
        return layer.apply(variables, x[:, :7], enable_dropout=False), first, jnp.stack(steps, 1)

    full, first, steps = run(X)
    near = lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=2e-5 * np.abs(full).max())
    near(first[0, :3], full[0, :3])
    near(first[1], full[1, :4])
    near(steps[0], full[0, 2:6])
    near(steps[1, :3], full[1, 4:7])
    assert np.isnan(steps[1, 3]).all(), "the eighth token"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"kind": "relu"}, "DSSStateSpace.kind = 'relu'; it is one of exp, exp-re-im, clip, softmax"),
        ({"kind": "softmax"}, "set kernel_length"),
        ({"kind": "softmax", "kernel_length": 9, "scale": False}, "leave scale = True"),
        ({"kind": "softmax", "kernel_length": 8}, "9 tokens is longer than DSSStateSpace.kernel_length = 8"),
        ({"kernel_length": 9}, "has no meaning for kind 'exp'"),
        ({"state_size": 0}, "DSSStateSpace.state_size = 0"),
        ({"step_max": 1e-4}, "step_max = 0.0001"),
        ({"output": "mlp"}, "DSS.output = 'mlp'"),
    ],
)
def test_settings_that_cannot_be_are_refused(settings, message):
    with pytest.raises(UserError, match=message):
        jax.eval_shape(lambda: DSS(**settings).init(key(), X, enable_dropout=False))


def test_softmax_refuses_to_continue_from_a_state():
    layer = DSS(kind="softmax", kernel_length=9)
    with pytest.raises(UserError, match="cannot continue from initial_state"):
        jax.eval_shape(lambda: layer.init(key(), X, enable_dropout=False, initial_state=()))
