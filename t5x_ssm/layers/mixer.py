"""What makes mixers interchangeable: one call signature, and one way for state-space mixers to run their core.

Every mixer (attention or state space) is a linen module whose fields are its configuration and whose call is

    y_BLD = mixer(x_BLD, *, segment_ids=None, positions=None, padding_mask=None, encoded=None, encoded_mask=None,
                  enable_dropout=True, decode=False, prefill=False, prefill_lengths=None,
                  initial_state=None, return_state=False)

and returns (y, state) when `return_state` is set. Decode state lives in the `cache` collection, every leaf batch-first:
  * `decode=True` without a cache creates the zero state and consumes nothing;
  * `prefill=True` consumes the first prefill_lengths[b] positions of row b, starting from the cached state; outputs are
    right at these and the position after them;
  * `decode=True` with a cache consumes one token; given prefill_lengths (0 or 1), only in the rows that have 1.
A row of the cache is one document, so these modes refuse segment_ids.
"""

import dataclasses
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax.linen import partitioning

from t5x_ssm.errors import UserError
from t5x_ssm.parallel import sequence
from t5x_ssm.parallel.shard import shard
from t5x_ssm.ssm.grouped import Grouped

Array = jax.Array


@dataclasses.dataclass(frozen=True)
class Run:
    """How one call of a mixer is to run, and the arrays that come with the activations (see the module docstring)."""

    segment_ids: Array | None = None  # [B, L] int; 0 is padding, a change begins a new document
    positions: Array | None = None  # [B, L] int, within the document
    padding_mask: Array | None = None  # [B, L]; zero or False at padding
    encoded: Array | None = None  # [B, S, D], for cross-attention
    encoded_mask: Array | None = None  # [B, S]
    encoded_segment_ids: Array | None = None  # [B, S]; a packed document attends to the encoded one of the same id
    bias_table: Array | None = None  # [heads, buckets], a relative bias that all layers share
    enable_dropout: bool = True
    decode: bool = False
    prefill: bool = False
    prefill_lengths: Array | None = None  # [B] int
    initial_state: Any = None
    return_state: bool = False

    def without_padding(self, u: Array) -> Array:
        """u [B, L, ...] with zeros at padding."""
        if self.padding_mask is None:
            return u
        return u * self.padding_mask.reshape(*u.shape[:2], *(1,) * (u.ndim - 2)).astype(u.dtype)

    def __post_init__(self):
        if self.decode and self.prefill:
            raise UserError("decode and prefill are two modes: set one of them.")
        if (self.decode or self.prefill) and self.segment_ids is not None:
            raise UserError("decode and prefill read one document a row: leave out segment_ids (no packing).")


@dataclasses.dataclass(frozen=True)
class CoreAxes:
    """Logical axes of what a core is given, for running it on the shards of a mesh.

    Attributes:
      system: a tuple a leaf of the discretised system (a pytree prefix).
      inputs: of the input and output sequence [B, L, H] ([B, L, H, G] where G inputs share each system). None for the
        length: only the mode decides whether it may be cut.
      state: of each leaf of the state.
    """

    system: Any
    inputs: tuple[str | None, ...]
    state: Any


def run_state_space(module: nn.Module, core: ModuleType | Grouped, system: Any, u: Array, axes: CoreAxes, run: Run):
    """Runs a state-space core in the mode that a mixer's call asks for.

    Called inside the mixer's compact method, because the decode state becomes a variable of that module.

    Args:
      module: the mixer.
      core: a module of `t5x_ssm.ssm` with zero_state, convolve, chunked, prefill and step, or `ssm.grouped.Grouped`.
      system: its discretised parameters.
      u: input [B, L, H] (grouped: [B, L, H, G]).
      axes: how the arrays may be sharded.
      run: the mode.

    Returns:
      (y of u's shape, state after the last consumed token or None).
    """
    batch = u.shape[0]
    u = run.without_padding(u)
    inputs, per_row = axes.inputs, (axes.inputs[0],)
    token = (axes.inputs[0], *axes.inputs[2:])

    if run.decode or run.prefill:
        cached = module.has_variable("cache", "state_0")
        zero, treedef = jax.tree.flatten(core.zero_state(system, batch))
        leaf_axes = treedef.flatten_up_to(axes.state)
        variables = [
            partitioning.variable_with_axes("cache", f"state_{i}", lambda z=z: z, axes=names)
            for i, (z, names) in enumerate(zip(zero, leaf_axes, strict=True))
        ]
        state = treedef.unflatten([v.value for v in variables])
        if run.decode and not cached:
            return jnp.zeros_like(u), state
        if run.decode and u.shape[1] == 1:
            step = shard(core.step, (axes.system, token, axes.state), (token, axes.state))
            y, new_state = step(system, u[:, 0], state)
            y = y[:, None]
            if run.prefill_lengths is not None:

                def keep(new, old):
                    consumes = run.prefill_lengths.reshape(-1, *(1,) * (new.ndim - 1)) > 0
                    return jnp.where(consumes, new, old)

                new_state = jax.tree.map(keep, new_state, state)
            state = new_state
        else:
            lengths = run.prefill_lengths
            if lengths is None:
                lengths = jnp.full((batch,), u.shape[1], jnp.int32)
            prefill = shard(
                lambda system, u, lengths, state: core.prefill(system, u, lengths, state=state),
                (axes.system, inputs, per_row, axes.state),
                (inputs, axes.state),
            )
            y, state = prefill(system, u, lengths, state)
        for variable, leaf in zip(variables, jax.tree.leaves(state), strict=True):
            variable.value = leaf
        return y, state

    count = sequence.pieces(u.shape[1])
    if count == 1 and run.segment_ids is None and run.initial_state is None and not run.return_state:
        return shard(core.convolve, (axes.system, inputs), inputs)(system, u), None

    inputs, per_token = (inputs[0], "length", *inputs[2:]), (inputs[0], "length")
    resets = None
    if run.segment_ids is not None:
        resets = sequence.document_starts(run.segment_ids)
        # A given state belongs to the document that position 0 continues.
        if run.initial_state is not None:
            resets = resets & (jnp.arange(u.shape[1]) > 0)

    def chunked(system, u, state, resets):
        if count == 1:
            return core.chunked(system, u, state=state, resets=resets)
        y, last = sequence.chunked(core, system, u, count=count, state=state, resets=resets)
        return y, last() if run.return_state else None

    state = run.initial_state
    if count == 1 and state is None:
        state = core.zero_state(system, batch)
    return shard(
        chunked,
        (axes.system, inputs, None if state is None else axes.state, per_token),
        (inputs, axes.state if count == 1 or run.return_state else None),
    )(system, u, state, resets)
