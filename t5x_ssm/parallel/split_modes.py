"""A state space that all channels share, cut over the modes of its state: each device runs its modes for all channels.

The outputs of S5's system are sums over its modes, Re(C x) + D u, and nothing else goes from mode to mode. So a device of the mesh
axis that "shared_modes" names holds P / K of the modes with their rows of B and columns of C, and the outputs are added up: one
all-reduce of [B, L, H], and backwards one of the input's gradient, whatever P is. Every piece adds D u / K. Like the partial products
of a projection that is cut over its inputs, the parts have the type of the activations when they are added.

A few modes are not worth the sum: below `FEWEST_MODES` a device the system stays whole on every device.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from t5x_ssm.parallel.shard import cut

Array = jax.Array

LOGICAL_AXIS = "shared_modes"
# Real and imaginary parts of 64 modes fill the 128 lanes of a TPU: with fewer its matrix unit takes as long.
FEWEST_MODES = 64


def split_modes(core: Any, modes: int) -> tuple[Any, str | None]:
    """How a system of `modes` modes runs on the mesh here.

    Args:
      core: a module like `ssm.multi_input`.
      modes: P.

    Returns:
      A core to run under `parallel.shard`, and the logical axis of the system's and the state's modes there: `LOGICAL_AXIS`, or the core
      itself and None where each device has all modes.
    """
    axis, count = cut(LOGICAL_AXIS, modes)
    if count == 1 or modes // count < FEWEST_MODES:
        return core, None
    return _SplitModes(core, axis, count), LOGICAL_AXIS


class _SplitModes:
    """The core's ways to run a mixer; see `ssm.multi_input`."""

    def __init__(self, core: Any, axis: str, count: int):
        self._core, self._axis, self._count = core, axis, count
        # Nothing of these is a sum over modes.
        self.zero_state, self.handover = core.zero_state, core.handover

    def _run(self, name, system, *arguments, **settings):
        system = system._replace(d=system.d / self._count)
        return getattr(self._core, name)(system, *arguments, **settings)

    def _output(self, name, *arguments, **settings):
        return _sum_over(self._run(name, *arguments, **settings), self._axis, self._count)

    def _output_and_state(self, name, *arguments, **settings):
        y, state = self._run(name, *arguments, **settings)
        return _sum_over(y, self._axis, self._count), state

    convolve = functools.partialmethod(_output, "convolve")
    bidirectional = functools.partialmethod(_output, "bidirectional")
    chunked = functools.partialmethod(_output_and_state, "chunked")
    prefill = functools.partialmethod(_output_and_state, "prefill")
    step = functools.partialmethod(_output_and_state, "step")


# The sum is the same on all devices, and shard_map gives each a part of its gradient, 1 / K. All of it is here without asking the
# others, which the transpose of a sum would do.
@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def _sum_over(y: Array, axis: str, count: int) -> Array:
    return lax.psum(y, axis)


def _sum_forward(y, axis, count):
    return lax.psum(y, axis), None


def _sum_backward(axis, count, _, gradient):
    return (gradient * jnp.asarray(count, gradient.dtype),)


_sum_over.defvjp(_sum_forward, _sum_backward)
