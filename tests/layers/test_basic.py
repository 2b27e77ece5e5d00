"""The plain pieces against their formulas in numpy."""

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest
from tiny import random_parameters

from t5x_ssm.layers.basic import MLP, Dense, Embed, LayerNorm, RMSNorm


def inputs(*shape, seed=1):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


@pytest.mark.parametrize(("norm", "center"), [(LayerNorm, True), (RMSNorm, False)])
def test_norms(norm, center):
    x = 3 + 5 * inputs(2, 4, 6)
    params = random_parameters(norm(), x)
    assert set(params) == ({"scale", "bias"} if center else {"scale"})
    y = norm(epsilon=1e-2).apply({"params": params}, x)
    p = oracles.numpy_tree(params)
    np.testing.assert_allclose(y, oracles.layer_norm(p, np.float64(x), 1e-2, center), rtol=1e-5, atol=1e-5)
    # The epsilon of T5 and Flax, where it is a large part of the variance.
    small = 1e-3 * inputs(2, 4, 6)
    y = norm().apply({"params": params}, small)
    np.testing.assert_allclose(y, oracles.layer_norm(p, np.float64(small), 1e-6, center), rtol=1e-5, atol=1e-5)


def test_norm_statistics_are_float32_under_bfloat16():
    # In bfloat16 the squares of 255 and 256 are the same number, and 4,096 of them do not add up.
    x = jnp.where(jnp.arange(4096) % 2 == 0, 256, 255).astype(jnp.bfloat16)[None]
    layer = LayerNorm(use_scale=False, use_bias=False, dtype=jnp.bfloat16)
    y = layer.apply({}, x)
    assert y.dtype == jnp.bfloat16
    np.testing.assert_array_equal(np.asarray(y, np.float32), np.where(np.arange(4096) % 2 == 0, 1.0, -1.0)[None])


@pytest.mark.parametrize(("norm", "center"), [(LayerNorm, True), (RMSNorm, False)])
def test_gradients_of_norms(norm, center):
    x, weight = 3 + 5 * inputs(2, 4, 6), inputs(2, 4, 6, seed=2)
    layer, params = norm(epsilon=1e-2), random_parameters(norm(), x)
    of_params, of_x = jax.grad(lambda p, x: jnp.sum(weight * layer.apply({"params": p}, x)), argnums=(0, 1))(params, x)
    # With x̂ the normalized x and r what scales it: dx = r (g - mean g - x̂ mean(g x̂)) for g = scale dy.
    p, exact, dy = oracles.numpy_tree(params), np.float64(x), np.float64(weight)
    centered = exact - center * exact.mean(-1, keepdims=True)
    r = 1 / np.sqrt((centered**2).mean(-1, keepdims=True) + 1e-2)
    g = dy * p["scale"]
    want = r * (g - centered * r * (g * centered * r).mean(-1, keepdims=True))
    want -= center * want.mean(-1, keepdims=True)
    np.testing.assert_allclose(of_x, want, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(of_params["scale"], (dy * centered * r).sum((0, 1)), rtol=1e-5, atol=1e-5)
    if center:
        np.testing.assert_allclose(of_params["bias"], dy.sum((0, 1)), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("norm", [LayerNorm, RMSNorm])
def test_norm_keeps_its_input_and_its_statistics(norm):
    x = jnp.ones((3, 50), jnp.bfloat16)
    layer = norm(dtype=jnp.bfloat16)
    params = layer.init(jax.random.key(0), x)
    kept = jax.tree.leaves(jax.vjp(lambda x: layer.apply(params, 2 * x), x)[1])
    assert [leaf.dtype for leaf in kept if leaf.size == x.size] == [jnp.bfloat16]
    assert all(leaf.size <= 50 for leaf in kept if leaf.size != x.size)


def test_dense_computes_in_its_dtype_from_float32_parameters():
    x = inputs(3, 5)
    layer = Dense(4, ("embed", "mlp"), use_bias=True, dtype=jnp.bfloat16)
    params = random_parameters(layer, x)
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(params))
    assert layer.apply({"params": params}, x).dtype == jnp.bfloat16
    y = Dense(4, ("embed", "mlp"), use_bias=True).apply({"params": params}, x)
    np.testing.assert_allclose(y, oracles.dense(oracles.numpy_tree(params), np.float64(x)), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("activations", [("gelu",), ("gelu_tanh",), ("relu",), ("gelu", "linear"), ("sigmoid", "tanh")])
def test_mlp(activations):
    x = inputs(2, 3, 4)
    layer = MLP(hidden=6, activations=activations, use_bias=True)
    params = random_parameters(layer, x)
    p = oracles.numpy_tree(params)
    functions = {
        "gelu": oracles.gelu,
        "gelu_tanh": oracles.gelu_tanh,
        "relu": lambda z: np.maximum(z, 0),
        "linear": lambda z: z,
        "sigmoid": oracles.sigmoid,
        "tanh": np.tanh,
    }
    hidden = 1.0
    for i, name in enumerate(activations):
        branch = p["wi"] if len(activations) == 1 else p[f"wi_{i}"]
        hidden = hidden * functions[name](oracles.dense(branch, np.float64(x)))
    expected = oracles.dense(p["wo"], hidden)
    np.testing.assert_allclose(layer.apply({"params": params}, x), expected, rtol=1e-5, atol=1e-5)


def test_mlp_drops_whole_features_over_time():
    layer = MLP(hidden=64, dropout_rate=0.5)
    x = np.broadcast_to(inputs(1, 1, 8), (1, 6, 8))  # the same token six times
    variables = {"params": random_parameters(layer, x)}
    y = layer.apply(variables, x, enable_dropout=True, rngs={"dropout": jax.random.key(1)})
    still = layer.apply(variables, x, enable_dropout=False)
    np.testing.assert_allclose(y, np.broadcast_to(y[:, :1], y.shape), rtol=1e-6)
    assert np.abs(y - still).max() > 1e-3


def test_embedding_and_tied_logits():
    layer = Embed(num_embeddings=7, features=4, init_scale=1.0, dtype=jnp.bfloat16)
    tokens = jnp.asarray([[0, 6, 3]])
    variables = {"params": random_parameters(layer, tokens)}
    table = np.asarray(variables["params"]["embedding"])
    np.testing.assert_array_equal(
        layer.apply(variables, tokens), jnp.asarray(table, jnp.bfloat16)[jnp.asarray([[0, 6, 3]])]
    )
    x = inputs(2, 4)
    logits = layer.apply(variables, x, method="attend")
    assert logits.dtype == jnp.float32
    np.testing.assert_allclose(logits, x @ table.T, rtol=0.05, atol=0.05)


def test_tokens_may_come_as_floats():
    # As T5X's eval initializes a network.
    params = random_parameters(Embed(5, 3), jnp.ones((1, 2), jnp.int32))
    tokens = np.array([[0, 4, 2]])
    expected = Embed(5, 3).apply({"params": params}, tokens)
    np.testing.assert_array_equal(Embed(5, 3).apply({"params": params}, tokens.astype(np.float32)), expected)
