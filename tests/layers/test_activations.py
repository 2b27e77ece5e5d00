"""Activations against SciPy in float64, their derivatives against complex steps, and what they keep."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special

from t5x_ssm.layers.activations import ACTIVATIONS, gated

ORACLES = {
    "gelu": lambda x: x * (1 + scipy.special.erf(x / np.sqrt(2))) / 2,
    "gelu_tanh": lambda x: x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3))) / 2,
    "silu": lambda x: x / (1 + np.exp(-x)),
}
POINTS = np.concatenate([np.linspace(-9, 9, 4001), [-40.0, 40.0, 0.0, 1e-20]])


def derivative(function, x):
    """By a step in the imaginary direction, where nothing cancels."""
    return function(x + 1e-30j).imag / 1e-30


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


@pytest.mark.parametrize("dtype, tolerance", [(jnp.float32, 1e-6), (jnp.float64, 1e-13), (jnp.bfloat16, 2e-2)])
@pytest.mark.parametrize("name", ORACLES)
def test_value_and_derivative(name, dtype, tolerance):
    with jax.enable_x64(dtype == jnp.float64):
        x = jnp.asarray(POINTS, dtype)
        exact = np.asarray(x, np.float64)
        value, pullback = jax.vjp(ACTIVATIONS[name], x)
        slope = pullback(jnp.ones_like(x))[0]
        forward = jax.jvp(ACTIVATIONS[name], (x,), (jnp.ones_like(x),))[1]
    assert value.dtype == slope.dtype == dtype
    want = ORACLES[name](exact)
    np.testing.assert_allclose(np.asarray(value, np.float64), want, rtol=tolerance, atol=tolerance)
    want = derivative(ORACLES[name], exact)
    for got in (slope, forward):
        np.testing.assert_allclose(np.asarray(got, np.float64), want, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("name", ORACLES)
def test_second_derivative(name):
    x = np.linspace(-9, 9, 1001)
    got = jax.vmap(jax.grad(jax.grad(ACTIVATIONS[name])))(jnp.asarray(x, jnp.float32))
    step = 1e-5
    exact = np.asarray(jnp.asarray(x, jnp.float32), np.float64)
    want = (derivative(ORACLES[name], exact + step) - derivative(ORACLES[name], exact - step)) / (2 * step)
    np.testing.assert_allclose(np.asarray(got, np.float64), want, atol=1e-6)


@pytest.mark.parametrize("name", ["gelu", "gelu_tanh", "silu", "relu"])
@pytest.mark.parametrize("x", [1e18, -1e18])
def test_derivative_far_out(name, x):
    assert jax.grad(ACTIVATIONS[name])(jnp.float32(x)) == (x > 0)


def test_gate_and_its_derivatives():
    value, gate, weight = np.random.default_rng(0).normal(size=(3, 100)) * 4
    want = value * sigmoid(gate)
    found, pullback = jax.vjp(gated, jnp.float32(value), jnp.float32(gate))
    of_value, of_gate = pullback(jnp.float32(weight))
    np.testing.assert_allclose(found, want, rtol=1e-6)
    np.testing.assert_allclose(of_value, weight * sigmoid(gate), rtol=1e-6)
    np.testing.assert_allclose(of_gate, weight * value * derivative(sigmoid, gate), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name, arrays", [("gelu", 1), ("gelu_tanh", 1), ("silu", 1), ("gated", 2)])
def test_arrays_kept_for_the_gradient(name, arrays):
    x = jnp.ones((3, 50))
    function = (lambda x: gated(x, x)) if name == "gated" else ACTIVATIONS[name]
    kept = jax.tree.leaves(jax.vjp(function, x)[1])
    assert sum(leaf.size == x.size for leaf in kept) == arrays


def test_a_stack_keeps_one_array_a_layer():
    """A scan over layers stores all that its body keeps: of an MLP's hidden width, the activation and its derivative."""
    layers, tokens, width, hidden = 5, 7, 8, 32

    def loss(weights, x):
        def layer(x, w):
            return x + ACTIVATIONS["gelu_tanh"](x @ w[0]) @ w[1], None

        return jax.lax.scan(layer, x, weights)[0]

    weights = jnp.ones((layers, width, hidden)), jnp.ones((layers, hidden, width))
    kept = jax.tree.leaves(jax.vjp(loss, weights, jnp.ones((tokens, width)))[1])
    assert sum(leaf.shape == (layers, tokens, hidden) for leaf in kept) == 2
