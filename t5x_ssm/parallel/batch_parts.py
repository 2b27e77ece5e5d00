"""Which rows of a global batch a process feeds, and the global arrays of what the processes feed.

Rows are split over `data` and `fsdp` alone. Where `model` or `sequence` goes over several processes, these hold the same rows: each
feeds all of them in their whole length, and keeps what belongs on its devices.
"""

from collections.abc import Mapping

import jax
import numpy as np
from jax.sharding import Mesh

from t5x_ssm.errors import UserError
from t5x_ssm.parallel import rules
from t5x_ssm.parallel.mesh import batch_shards


def share(mesh: Mesh, process_index: int | None = None) -> tuple[int, int]:
    """(which part, of how many equal ones) of every batch a process feeds, this one by default.

    Raises:
      UserError: two processes have some rows in common and others not.
    """
    own, parts = _parts(mesh, jax.process_index() if process_index is None else process_index)
    return parts.index(own), len(parts)


def to_global(batch: Mapping[str, np.ndarray], mesh: Mesh) -> dict[str, jax.Array]:
    """Global arrays from the rows that this process feeds.

    Args:
      batch: [rows / parts, length, …], the part of `share` of every feature.
      mesh: the device mesh.
    """
    own, parts = _parts(mesh, jax.process_index())

    def whole(rows: np.ndarray) -> jax.Array:
        shape = (len(rows) * len(parts), *rows.shape[1:])
        size = shape[0] // batch_shards(mesh)

        def piece(index: tuple[slice, ...]) -> np.ndarray:
            first = own.index((index[0].start or 0) // size) * size
            return rows[(slice(first, first + size), *index[1:])]

        return jax.make_array_from_callback(shape, rules.batch_sharding(mesh, rows.ndim), piece)

    return {name: whole(rows) for name, rows in batch.items()}


def _parts(mesh: Mesh, process_index: int) -> tuple[tuple[int, ...], list[tuple[int, ...]]]:
    """The shards of the batch that a process holds, and those of every set of processes that hold the same ones."""
    # The mesh's first two axes are those of the batch.
    shards = mesh.devices.reshape(batch_shards(mesh), -1)
    held: dict[int, list[int]] = {}
    for shard, devices in enumerate(shards):
        for process in {device.process_index for device in devices}:
            held.setdefault(process, []).append(shard)
    parts = sorted({tuple(of_one) for of_one in held.values()})
    if sorted(shard for part in parts for shard in part) != list(range(len(shards))) or len({*map(len, parts)}) > 1:
        sizes = ", ".join(f"{axis} {size}" for axis, size in mesh.shape.items())
        raise UserError(
            f"MeshConfig ({sizes}) gives processes rows of the batch that they share in part; choose sizes by which each process "
            "has data x fsdp rows of its own, or shares all of them with the same others: multiples or divisors of its devices."
        )
    return tuple(held[process_index]), parts
