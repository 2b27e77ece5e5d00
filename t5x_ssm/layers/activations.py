"""Nonlinearities by name, each of which keeps one array for its gradient: its derivative.

Differentiated as it is written, a GELU keeps five arrays of its input's size (three when exact), and in a scan over layers all of
them are stored for every layer. Here the derivative is worked out beside the value, where both share the costly
function, so that the backward pass is one product.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from t5x_ssm.errors import UserError

Array = jax.Array


def _keeping_derivative(value_and_derivative: Callable[[Array], tuple[Array, Array]]) -> Callable[[Array], Array]:
    """The function x -> f(x), elementwise, from x -> (f(x), f'(x))."""

    @jax.custom_jvp
    def function(x):
        return value_and_derivative(x)[0]

    @function.defjvp
    def jvp(primals, tangents):
        y, derivative = value_and_derivative(*primals)
        return y, derivative * tangents[0]

    function.__name__ = value_and_derivative.__name__
    return function


@_keeping_derivative
def gelu(x):
    cdf = 0.5 * lax.erfc(-np.sqrt(0.5).astype(x.dtype) * x)
    density = np.sqrt(0.5 / np.pi).astype(x.dtype) * jnp.exp(-0.5 * x * x)
    return x * cdf, cdf + x * density


@_keeping_derivative
def gelu_tanh(x):
    # The derivative has (1 + tanh z) / 2 from exp(-2|z|), as a quotient: nothing cancels on either side, and it shares nothing
    # that is costly with the value, which XLA on CPU would store.
    cubic, scale = 0.044715, np.sqrt(8 / np.pi).astype(x.dtype)
    square = x * x
    small = jnp.exp(-jnp.abs(scale * x * (1 + cubic * square)))
    slope = jnp.where(x < 0, small, 1) * (1 + small) + small * scale * x * (1 + 3 * cubic * square)
    return jax.nn.gelu(x), slope / jnp.square(1 + small)


@_keeping_derivative
def silu(x):
    s = lax.logistic(x)
    return x * s, s * (1 + x * (1 - s))


@jax.custom_jvp
def gated(value: Array, gate: Array) -> Array:
    """value * sigmoid(gate), both of one shape: two arrays are kept, where the product of both functions keeps three."""
    return value * lax.logistic(gate)


@gated.defjvp
def _gated_jvp(primals, tangents):
    value, gate = primals
    s = lax.logistic(gate)
    y = value * s
    return y, s * tangents[0] + y * (1 - s) * tangents[1]


class _Activations(dict[str, Callable[[Array], Array]]):
    def __missing__(self, name: str):
        raise UserError(f"There is no activation {name!r}; there are {', '.join(self)}.")


# Functions by name; an unknown name is a UserError.
ACTIVATIONS = _Activations(
    gelu=gelu,
    gelu_tanh=gelu_tanh,
    relu=jax.nn.relu,
    silu=silu,
    sigmoid=jax.nn.sigmoid,
    tanh=jnp.tanh,
    linear=lambda x: x,
)
