"""Nonlinearities by name, each of which keeps one array for its gradient: its derivative.

Differentiated as it is written, a GELU keeps five arrays of its input's size (three when exact), and in a scan over layers all of
them are stored for every layer. Here the derivative is worked out beside the value, and the backward pass is one product.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from t5x_ssm.errors import UserError

Array = jax.Array


def _keeping_derivative(
    value: Callable[[Array], Array], derivative: Callable[[Array], Array]
) -> Callable[[Array], Array]:
    """The elementwise function `value` with its derivative."""

    @jax.custom_jvp
    def function(x):
        return value(x)

    @function.defjvp
    def jvp(primals, tangents):
        return value(*primals), derivative(*primals) * tangents[0]

    return function


def _gelu_derivative(x):
    cdf = 0.5 * lax.erfc(-np.sqrt(0.5).astype(x.dtype) * x)
    return cdf + x * (np.sqrt(0.5 / np.pi).astype(x.dtype) * jnp.exp(-0.5 * x * x))


def _gelu_tanh_derivative(x):
    # With (1 + tanh z) / 2 from exp(-2|z|), as a quotient: nothing cancels on either side, and it shares nothing that is costly
    # with the value, which XLA on CPU would store.
    cubic, scale = 0.044715, np.sqrt(8 / np.pi).astype(x.dtype)
    square = x * x
    small = jnp.exp(-jnp.abs(scale * x * (1 + cubic * square)))
    slope = jnp.where(x < 0, small, 1) * (1 + small) + small * scale * x * (1 + 3 * cubic * square)
    return slope / jnp.square(1 + small)


def _silu_derivative(x):
    s = lax.logistic(x)
    return s * (1 + x * (1 - s))


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
    gelu=_keeping_derivative(functools.partial(jax.nn.gelu, approximate=False), _gelu_derivative),
    gelu_tanh=_keeping_derivative(jax.nn.gelu, _gelu_tanh_derivative),
    relu=jax.nn.relu,
    silu=_keeping_derivative(jax.nn.silu, _silu_derivative),
    sigmoid=jax.nn.sigmoid,
    tanh=jnp.tanh,
    linear=lambda x: x,
)
