"""A state space that all channels share, cut over the modes of its state: each device runs its modes for all channels.

The outputs of S5's system are sums over its modes, Re(C x) + D u, and nothing else goes from mode to mode. So a device of the mesh
axis that "shared_modes" names holds P / K of the modes with their rows of B and columns of C, and the outputs are added up: one
all-reduce of [B, L, H], and backwards one of the input's gradient, whatever P is. Every piece adds D u / K.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from t5x_ssm.parallel.shard import cut

Array = jax.Array

LOGICAL_AXIS = "shared_modes"


def split_modes(core: Any, modes: int) -> Any:
    """A core for systems of which the function sees what `parallel.shard` leaves here of `LOGICAL_AXIS`.

    Args:
      core: a module like `ssm.multi_input`.
      modes: P of the whole system.

    Returns:
      An object with the core's ways to run, or the core itself where its modes are not cut.
    """
    axis, count = cut(LOGICAL_AXIS, modes)
    return core if count == 1 else _SplitModes(core, axis, count)


class _SplitModes:
    def __init__(self, core: Any, axis: str, count: int):
        self._core, self._axis, self._count = core, axis, count
        # Nothing of these is a sum over modes.
        self.zero_state, self.handover = core.zero_state, core.handover

    def _with_share(self, system):
        return system._replace(d=system.d / self._count)

    def _sum(self, y: Array) -> Array:
        return _sum(y, self._axis, self._count)

    def _first_summed(self, name: str, system, *arguments, **settings):
        y, state = getattr(self._core, name)(self._with_share(system), *arguments, **settings)
        return self._sum(y), state

    def convolve(self, system, u):
        return self._sum(self._core.convolve(self._with_share(system), u))

    def bidirectional(self, system, backward, u, **settings):
        return self._sum(self._core.bidirectional(self._with_share(system), backward, u, **settings))

    def scan(self, *arguments, **settings):
        return self._first_summed("scan", *arguments, **settings)

    def chunked(self, *arguments, **settings):
        return self._first_summed("chunked", *arguments, **settings)

    def prefill(self, *arguments, **settings):
        return self._first_summed("prefill", *arguments, **settings)

    def step(self, *arguments, **settings):
        return self._first_summed("step", *arguments, **settings)


# The sum is the same on all devices, and shard_map gives each a part of its gradient, 1 / K. All of it is here without asking the
# others, which the transpose of a sum would do.
@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def _sum(y: Array, axis: str, count: int) -> Array:
    return lax.psum(y, axis)


def _sum_forward(y, axis, count):
    return lax.psum(y, axis), None


def _sum_backward(axis, count, _, gradient):
    return (gradient * jnp.asarray(count, gradient.dtype),)


_sum.defvjp(_sum_forward, _sum_backward)
