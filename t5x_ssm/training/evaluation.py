"""Running an evaluation step over a feed of batches."""

from collections.abc import Callable, Iterable
from typing import Any

import jax


def sum_over_batches(
    eval_step: Callable, params: Any, batches: Iterable[dict[str, jax.Array]], flax_mutables: Any = None
) -> dict[str, float]:
    """Sums of an objective over all batches.

    Args:
      eval_step: jitted function (params, batch, flax_mutables) -> dict of scalars, all sums over tokens or examples.
      params: the parameters.
      batches: global batches.
      flax_mutables: the network's state beside its parameters, if it has any.

    Returns:
      Host floats, added in float64 so that the number of batches costs no precision. Empty without a batch.
    """
    totals: dict[str, float] = {}
    pending = None
    for batch in batches:
        # One batch late, so that the device has the next one before the host waits for the last.
        current = eval_step(params, batch, flax_mutables)
        if pending is not None:
            _add(totals, pending)
        pending = current
    if pending is not None:
        _add(totals, pending)
    return totals


def _add(totals: dict[str, float], sums: dict[str, jax.Array]) -> None:
    for name, value in sums.items():
        totals[name] = totals.get(name, 0.0) + float(value)
