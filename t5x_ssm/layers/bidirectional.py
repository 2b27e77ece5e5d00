"""Running a state-space core over the past and the future, for encoders and classifiers."""

from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp

from t5x_ssm.errors import UserError
from t5x_ssm.layers.mixer import CoreAxes, Run
from t5x_ssm.parallel import sequence
from t5x_ssm.parallel.shard import shard


def run_bidirectional(
    core: ModuleType,
    system: Any,
    backward: Any,
    u: jax.Array,
    axes: CoreAxes,
    run: Run,
    *,
    future_has_present: bool = False,
) -> jax.Array:
    """Runs one system over the past and the present and another over the future, each within its document.

    Args:
      core: a module of `t5x_ssm.ssm` with `bidirectional`.
      system, backward: its discretised parameters; the skip of `backward` is not used.
      u: input [B, L, H].
      axes: how the arrays may be sharded.
      run: the mode, which must be the parallel one.
      future_has_present: whether `core.bidirectional` lets `backward` hear the present token too.

    Returns:
      y [B, L, H].

    Raises:
      UserError: for a mode that reads the text in order.
    """
    if run.decode or run.prefill or run.initial_state is not None or run.return_state:
        raise UserError(
            "A state space with bidirectional = True hears the future: it cannot decode or prefill and has no state to take "
            "or return. Set bidirectional = False in decoders."
        )
    u = run.without_padding(u)
    starts = None if run.segment_ids is None else sequence.document_starts(run.segment_ids)
    count = sequence.pieces(u.shape[1])
    inputs, per_token = axes.inputs, (axes.inputs[0], None)
    if count > 1:
        inputs, per_token = (inputs[0], "length", *inputs[2:]), (inputs[0], "length")

    def local(system, backward, u, starts):
        if count == 1:
            return core.bidirectional(system, backward, u, resets=starts)
        return _over_pieces(core, system, backward, u, starts, count, future_has_present)

    return shard(local, (axes.system, axes.system, inputs, per_token), inputs)(system, backward, u, starts)


def _over_pieces(core, system, backward, u, starts, count, future_has_present):
    """`core.bidirectional` of a piece of the sequence: the future is the past of the sequence read from its end."""
    exact = u.astype(jnp.promote_types(u.dtype, jnp.float32))
    past, _ = sequence.chunked(core, system, exact, count=count, resets=starts)
    ends = None
    if starts is not None:  # the next token begins a document
        ends = sequence.with_neighbours(starts, count, after=1, fill=True)[:, 1:]
    future, _ = sequence.chunked(
        core,
        backward._replace(d=jnp.zeros_like(backward.d)),
        exact[:, ::-1],
        count=count,
        resets=None if ends is None else ends[:, ::-1],
        from_the_end=True,
    )
    future = future[:, ::-1]
    if not future_has_present:
        # What the system hears up to and with the next token.
        future = sequence.with_neighbours(future, count, after=1)[:, 1:]
        if ends is not None:
            future = jnp.where(ends[..., None], 0, future)
    return (past + future).astype(u.dtype)
