"""The S4 and S4D layers against their equations in float64 numpy, and the start of their parameters."""

import jax
import numpy as np
import oracles
import pytest
from flax import linen as nn
from tiny import jit, key, random_parameters, shapes

from t5x_ssm.errors import UserError
from t5x_ssm.layers.dss import DSS
from t5x_ssm.layers.mixer import Run
from t5x_ssm.layers.s4 import S4, S4D, S4StateSpace
from t5x_ssm.ssm import initialization

X = np.random.default_rng(0).normal(size=(2, 9, 6)).astype(np.float32)


def dense_bilinear(w, p, b, step):
    """(Ā, B̄) of one channel over all modes, conjugates included: complex [M, M] and [M]."""
    w, p, b = (np.concatenate([z, z.conj()]) for z in (w, p, b))
    a = np.diag(w) - np.outer(p, p.conj())
    inverse = np.linalg.inv(np.eye(len(w)) - step / 2 * a)
    return inverse @ (np.eye(len(w)) + step / 2 * a), inverse @ b * step


def s4_kernel(ssm, length, c="c"):
    """The kernel of S4 with all its structure, [H, length]."""
    z = lambda name: ssm[f"{name}_re"] + 1j * ssm[f"{name}_im"]
    w = -np.exp(ssm["a_log_re"]) + 1j * ssm["a_im"]
    rows = []
    for h, step in enumerate(np.exp(ssm["log_step"])):
        a, state = dense_bilinear(w[h], z("p")[h], z("b")[h], step)
        out = np.concatenate([z(c)[h], z(c)[h].conj()])
        rows.append([])
        for _ in range(length):
            rows[-1].append((out @ state).real)
            state = a @ state
    return np.array(rows)


def s4d_kernel(ssm, length, c="c", rule=oracles.zoh):
    z = lambda name: ssm[f"{name}_re"] + 1j * ssm[f"{name}_im"]
    a, gain = rule(-np.exp(ssm["a_log_re"]) + 1j * ssm["a_im"], np.exp(ssm["log_step"])[:, None])
    powers = a[..., None] ** np.arange(length)
    return 2 * np.einsum("hn,hnl->hl", z(c) * gain * z("b"), powers).real


def filtered(kernel, x, d, backward=None):
    """The convolution as a sum over pairs of tokens; the future's part begins at the next token."""
    y = d * x
    for i in range(x.shape[1]):
        for j in range(x.shape[1]):
            if j <= i:
                y[:, i] += kernel[:, i - j] * x[:, j]
            elif backward is not None:
                y[:, i] += backward[:, j - i - 1] * x[:, j]
    return y


def mixed(p, y, output):
    z = oracles.gelu(y)
    out = oracles.dense(p["out"], z)
    return out * oracles.sigmoid(oracles.dense(p["gate"], z)) if output == "glu" else out


@pytest.mark.parametrize(
    ("build", "settings", "kernel"),
    [
        (S4, {"state_size": 4}, s4_kernel),
        (S4, {"state_size": 4, "bidirectional": True, "output": "linear"}, s4_kernel),
        (S4D, {"state_size": 6}, s4d_kernel),
        (S4D, {"state_size": 6, "bidirectional": True}, s4d_kernel),
        (
            S4D,
            {"state_size": 6, "discretization": "bilinear", "output": "linear"},
            lambda ssm, length, c="c": s4d_kernel(ssm, length, c, oracles.bilinear),
        ),
    ],
    ids=["s4", "s4 bidirectional", "s4d", "s4d bidirectional", "s4d bilinear"],
)
def test_layer_equations(build, settings, kernel):
    layer = build(**settings)
    params = random_parameters(layer, X)
    y = jit(lambda x: layer.apply({"params": params}, x, enable_dropout=False))(X)
    p, x = oracles.numpy_tree(params), np.float64(X)
    backward = kernel(p["ssm"], 9, "c_backward") if settings.get("bidirectional") else None
    # What is not set is the paper's.
    output = settings.get("output", "glu")
    expected = mixed(p, filtered(kernel(p["ssm"], 9), x, p["ssm"]["d"], backward), output)
    np.testing.assert_allclose(y, expected, rtol=1e-5, atol=2e-5 * np.abs(expected).max())


def test_start_of_the_parameters():
    """A and B are LegS's in every channel; C and D are normal; Δ is log-uniform."""
    state_size, width = 8, 256
    x = np.zeros((1, 2, width), np.float32)
    params = jit(lambda key: S4(state_size=state_size).init(key, x, enable_dropout=False)["params"])(key())
    ssm = oracles.numpy_tree(params)["ssm"]
    legs = initialization.legs_normal_plus_low_rank(state_size)
    complex_of = lambda name: ssm[f"{name}_re"] + 1j * ssm[f"{name}_im"]
    w = -np.exp(ssm["a_log_re"]) + 1j * ssm["a_im"]
    for found, wanted in ((w, legs.poles), (complex_of("p"), legs.p), (complex_of("b"), legs.b)):
        np.testing.assert_allclose(found, np.broadcast_to(wanted[:4], (width, 4)), rtol=1e-6, atol=1e-6)
    assert (ssm["a_im"] < 0).all()
    assert abs(np.mean(np.abs(complex_of("c")) ** 2) - 1) < 4 / np.sqrt(width * 4)
    assert abs(np.std(ssm["d"]) - 1) < 4 / np.sqrt(2 * width)
    assert np.log(1e-3) <= ssm["log_step"].min() < np.log(2e-3) < np.log(5e-2) < ssm["log_step"].max() <= np.log(1e-1)


@pytest.mark.parametrize(
    ("start", "poles"),
    [
        ("legs", initialization.legs_poles(2)),
        ("lin", initialization.lin_poles(2)),
        ("inv", initialization.inv_poles(2)),
    ],
)
def test_start_of_a_diagonal(start, poles):
    layer = S4D(state_size=4, start=start)
    params = jit(lambda key: layer.init(key, X[..., :2], enable_dropout=False)["params"])(key())
    ssm = oracles.numpy_tree(params)["ssm"]
    np.testing.assert_allclose(-np.exp(ssm["a_log_re"]) + 1j * ssm["a_im"], np.stack([poles] * 2), rtol=1e-6)
    np.testing.assert_array_equal(ssm["b_re"], 1)
    np.testing.assert_array_equal(ssm["b_im"], 0)


def test_parameters_at_the_published_size():
    variables = shapes(S4(bidirectional=True), jax.ShapeDtypeStruct((1, 2, 16), np.float32), enable_dropout=False)
    found = {
        jax.tree_util.keystr(path, simple=True, separator="/"): leaf.shape
        for path, leaf in jax.tree_util.tree_leaves_with_path(variables["params"])
    }
    bank = ("a_log_re", "a_im", "p_re", "p_im", "b_re", "b_im", "c_re", "c_im", "c_backward_re", "c_backward_im")
    assert found == {
        **{f"ssm/{name}": (16, 32) for name in bank},
        "ssm/log_step": (16,),
        "ssm/d": (16,),
        **{f"{name}/kernel": (16, 16) for name in ("out", "gate")},
        **{f"{name}/bias": (16,) for name in ("out", "gate")},
    }


@pytest.mark.slow
@pytest.mark.parametrize("build", [S4, DSS], ids=["s4", "dss"])
def test_bidirectional_layers_keep_documents_apart_and_ignore_padding(build):
    layer = build(state_size=4, bidirectional=True)
    params = random_parameters(layer, X)
    segments = np.array([[1, 1, 1, 1, 2, 2, 2, 0, 0]] * 2)

    @jit
    def run(x):
        packed = layer.apply({"params": params}, x, enable_dropout=False, segment_ids=segments)
        padded = layer.apply({"params": params}, x, enable_dropout=False, padding_mask=segments == 1)
        alone = [layer.apply({"params": params}, x[:, a:b], enable_dropout=False) for a, b in ((0, 4), (4, 7))]
        return packed, padded, alone

    packed, padded, (first, second) = run(X)
    for found, alone in ((packed[:, :4], first), (packed[:, 4:7], second), (padded[:, :4], first)):
        np.testing.assert_allclose(found, alone, rtol=1e-4, atol=2e-5 * np.abs(alone).max())


@pytest.mark.parametrize("build", [S4, DSS], ids=["s4", "dss"])
@pytest.mark.parametrize("mode", ["decode", "prefill", "return_state", "initial_state"])
def test_bidirectional_layers_refuse_to_read_in_order(build, mode):
    layer = build(state_size=4, bidirectional=True)
    with pytest.raises(UserError, match="Set bidirectional = False in decoders"):
        jax.eval_shape(lambda: layer.init_with_output(key(), X, enable_dropout=False, **{mode: True}))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"kind": "full"}, "S4StateSpace.kind = 'full'; it is one of dplr, diagonal"),
        ({"start": "lin"}, "start of kind 'dplr' = 'lin'; it is one of legs"),
        ({"kind": "diagonal", "start": "random"}, "it is one of legs, lin, inv"),
        ({"discretization": "zoh"}, "discretization of kind 'dplr' = 'zoh'; it is one of bilinear"),
        ({"state_size": 5}, "S4StateSpace.state_size = 5"),
        ({"step_min": 0.2}, "step_min = 0.2 and step_max = 0.1"),
    ],
)
def test_settings_that_cannot_be_are_refused(settings, message):
    with pytest.raises(UserError, match=message):
        jax.eval_shape(lambda: S4(**settings).init(key(), X, enable_dropout=False))


def test_unknown_output_and_activation_are_refused():
    with pytest.raises(UserError, match=r"S4D\.output = 'softmax'; it is one of linear, glu"):
        jax.eval_shape(lambda: S4D(output="softmax").init(key(), X, enable_dropout=False))
    with pytest.raises(UserError, match="no activation 'swish'"):
        jax.eval_shape(lambda: S4(activation="swish").init(key(), X, enable_dropout=False))


class Alone(nn.Module):
    @nn.compact
    def __call__(self, x):
        return S4StateSpace(state_size=4, name="ssm")(x, Run())


def test_state_space_alone_gives_convolution_and_skip():
    """As SPADE uses it: no activation and no projection."""
    params = random_parameters(Alone(), X)
    y, state = jit(lambda x: Alone().apply({"params": params}, x))(X)
    ssm = oracles.numpy_tree(params)["ssm"]
    expected = filtered(s4_kernel(ssm, 9), np.float64(X), ssm["d"])
    np.testing.assert_allclose(y, expected, rtol=1e-5, atol=2e-5 * np.abs(expected).max())
    assert state is None
