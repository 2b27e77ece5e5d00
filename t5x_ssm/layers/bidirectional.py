"""Running a state-space core over the past and the future, for encoders and classifiers."""

from types import ModuleType
from typing import Any

import jax

from t5x_ssm.errors import UserError
from t5x_ssm.layers.mixer import CoreAxes, Run
from t5x_ssm.parallel import sequence
from t5x_ssm.parallel.shard import shard


def run_bidirectional(
    core: ModuleType, system: Any, backward: Any, u: jax.Array, axes: CoreAxes, run: Run
) -> jax.Array:
    """Runs one system over the past and the present and another over the future, each within its document.

    Args:
      core: a module of `t5x_ssm.ssm` with `bidirectional`.
      system, backward: its discretised parameters.
      u: input [B, L, H].
      axes: how the arrays may be sharded.
      run: the mode, which must be the parallel one.

    Returns:
      y [B, L, H].

    Raises:
      UserError: for a mode that reads the text in order, and where the length is cut over devices.
    """
    if sequence.pieces(u.shape[1]) > 1:
        raise UserError(
            "A state space with bidirectional = True needs the whole length on one device: set MeshConfig.sequence = 1."
        )
    if run.decode or run.prefill or run.initial_state is not None or run.return_state:
        raise UserError(
            "A state space with bidirectional = True hears the future: it cannot decode or prefill and has no state to take "
            "or return. Set bidirectional = False in decoders."
        )
    u = run.without_padding(u)
    if run.segment_ids is None:
        return shard(core.bidirectional, (axes.system, axes.system, axes.inputs), axes.inputs)(system, backward, u)
    return shard(
        lambda system, backward, u, resets: core.bidirectional(system, backward, u, resets=resets),
        (axes.system, axes.system, axes.inputs, (axes.inputs[0], None)),
        axes.inputs,
    )(system, backward, u, sequence.document_starts(run.segment_ids))
