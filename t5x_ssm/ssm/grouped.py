"""Several inputs through each system of a bank: H3's heads, where every entry of k vᵀ passes the filter of its head.

The members of a group are further rows to the core, so that a kernel is made once a system and not once a member. Shape
suffixes: B batch, L length, H systems of the bank, G members of a group.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp


@dataclasses.dataclass(frozen=True)
class Grouped:
    """A core whose inputs are [B, L, H, G] (one token: [B, H, G]) and whose state leaves are [B, G, …].

    Attributes:
      core: a module such as `ssm.diagonal`, which gives the ways to run.
      size: G.
    """

    core: Any
    size: int

    def zero_state(self, system: Any, batch_size: int) -> Any:
        """The state before any input."""
        return self._unfold(self.core.zero_state(system, batch_size * self.size))

    def convolve(self, system: Any, u):
        """All outputs at once from zero state, [B, L, H, G]."""
        return self._sequence(self.core.convolve(system, self._rows(u)))

    def scan(self, system: Any, u, *, state=None, resets=None):
        """The recurrence; resets bool [B, L]. Returns outputs and state."""
        return self._run(self.core.scan, system, u, state, resets=self._per_row(resets))

    def chunked(self, system: Any, u, *, state=None, resets=None, chunk_size: int | None = None):
        """Chunk after chunk; resets bool [B, L]. Returns outputs and state."""
        return self._run(self.core.chunked, system, u, state, resets=self._per_row(resets), chunk_size=chunk_size)

    def handover(self, system: Any, u, resets, doublings: int):
        """What a piece of a sequence tells the pieces after it; see `diagonal.handover`."""
        end, maps = self.core.handover(system, self._rows(u), self._per_row(resets), doublings)
        return self._unfold(end), [lambda state, run=run: self._unfold(run(self._fold(state))) for run in maps]

    def prefill(self, system: Any, u, lengths, *, state=None):
        """Outputs, and the state after lengths[b] tokens of row b."""
        return self._run(self.core.prefill, system, u, state, lengths=self._per_row(lengths))

    def step(self, system: Any, u, state):
        """One token: u [B, H, G]."""
        y, state = self.core.step(system, self._rows(u[:, None])[:, 0], self._fold(state))
        return self._sequence(y[:, None])[:, 0], self._unfold(state)

    def _run(self, way, system, u, state, **rest):
        y, state = way(system, self._rows(u), state=None if state is None else self._fold(state), **rest)
        return self._sequence(y), self._unfold(state)

    def _rows(self, u_BLHG):
        return jnp.moveaxis(u_BLHG, -1, 1).reshape(-1, *u_BLHG.shape[1:3])

    def _sequence(self, y):
        return jnp.moveaxis(y.reshape(-1, self.size, *y.shape[1:]), 1, -1)

    def _per_row(self, x):
        return None if x is None else jnp.repeat(x, self.size, axis=0)

    def _fold(self, state):
        return jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), state)

    def _unfold(self, state):
        return jax.tree.map(lambda x: x.reshape(-1, self.size, *x.shape[1:]), state)
