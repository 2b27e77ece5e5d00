"""The GSS layer against its equations, token by token in float64, and the start of its parameters."""

import jax
import numpy as np
import oracles
import pytest
from tiny import jit, key, random_parameters, shapes

from t5x_ssm.layers.gss import GSS


@pytest.mark.parametrize("settings", [{}, {"exponential_imaginary": False}])
def test_layer_equations(settings):
    layer = GSS(hidden=12, channels=5, state_size=3, norm_epsilon=1e-3, **settings)
    x = np.random.default_rng(0).normal(size=(2, 9, 8)).astype(np.float32)
    params = random_parameters(layer, x)
    y = jit(lambda x: layer.apply({"params": params}, x, enable_dropout=False))(x)

    p = oracles.numpy_tree(params)
    u = oracles.gelu(oracles.dense(p["gate"], np.float64(x)))
    v = oracles.layer_norm(p["norm"], oracles.gelu(oracles.dense(p["reduce"], np.float64(x))), 1e-3)
    ssm = p["ssm"]
    # What is not set is the paper's.
    frequency = ssm["lambda_log_im"] if settings else np.exp(ssm["lambda_log_im"])
    a, b = oracles.zoh(-np.exp(ssm["lambda_log_re"]) + 1j * frequency, 1.0)
    mixed = oracles.recurrence(a, b, ssm["c_re"] + 1j * ssm["c_im"], v) + ssm["d"] * v
    expected = oracles.dense(p["out"], oracles.dense(p["expand"], mixed) * u)
    np.testing.assert_allclose(y, expected, rtol=1e-5, atol=2e-5 * np.abs(expected).max())


def test_published_widths_follow_from_the_model_width():
    variables = shapes(GSS(), jax.ShapeDtypeStruct((1, 2, 64), np.float32), enable_dropout=False)
    sizes = {
        jax.tree_util.keystr(path, simple=True, separator="/"): leaf.shape
        for path, leaf in jax.tree_util.tree_leaves_with_path(variables["params"])
    }
    assert sizes == {
        "gate/kernel": (64, 256),
        "reduce/kernel": (64, 16),
        "expand/kernel": (16, 256),
        "out/kernel": (256, 64),
        "norm/scale": (16,),
        "norm/bias": (16,),
        "ssm/lambda_log_re": (512,),
        "ssm/lambda_log_im": (512,),
        "ssm/c_re": (16, 512),
        "ssm/c_im": (16, 512),
        "ssm/d": (16,),
    }


def test_state_space_starts_standard_normal():
    layer = GSS(channels=64, state_size=256)
    params = jit(lambda key: layer.init(key, np.zeros((1, 2, 8), np.float32), enable_dropout=False)["params"])(key())
    for name, leaf in params["ssm"].items():
        assert abs(np.mean(leaf)) < 4 / np.sqrt(leaf.size), name
        assert abs(np.std(leaf) - 1) < 4 / np.sqrt(leaf.size), name
    # Independent draws, not one twice.
    assert abs(np.corrcoef(params["ssm"]["c_re"].ravel(), params["ssm"]["c_im"].ravel())[0, 1]) < 0.04
    assert abs(np.corrcoef(params["ssm"]["lambda_log_re"], params["ssm"]["lambda_log_im"])[0, 1]) < 0.25


def test_dropout_mask_is_shared_over_time():
    layer = GSS(hidden=64, channels=4, state_size=2, dropout_rate=0.5)
    x = np.random.default_rng(0).normal(size=(1, 6, 8)).astype(np.float32)
    params = random_parameters(layer, x)
    params["out"]["kernel"] = np.eye(64, 8, dtype=np.float32)
    run = lambda drop: layer.apply({"params": params}, x, enable_dropout=drop, rngs={"dropout": key()})
    dropped, still = jit(lambda: (run(True), run(False)))()
    zero = np.asarray(dropped) == 0
    assert zero.any() and not zero.all()
    assert (zero == zero[:, :1]).all()
    np.testing.assert_allclose(dropped, np.where(zero, 0, 2 * still), rtol=1e-6)
