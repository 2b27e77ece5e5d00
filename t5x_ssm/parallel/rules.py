"""One table from logical axes to mesh axes, and what follows from it: shardings of parameters, batches and activations.

Layers name what a dimension *is* (`embed`, `mlp`, `channels`); only this table says where it lives. Order is priority:
when two dimensions of one array ask for the same mesh axis, the earlier rule wins and the other dimension stays whole.
That is how `embed` can mean "split over fsdp" for a parameter and "whole" for an activation, whose `batch` took fsdp.
"""

from collections.abc import Sequence
from typing import Any

import jax
from flax.linen import partitioning
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from t5x_ssm.errors import UserError

LOGICAL_AXIS_RULES: tuple[tuple[str, str | tuple[str, ...] | None], ...] = (
    ("batch", ("data", "fsdp")),
    ("length", "sequence"),
    ("vocab", "model"),
    ("mlp", "model"),
    ("heads", "model"),
    ("joined_kv", "model"),
    ("channels", "model"),  # the independent systems of a state-space bank
    ("embed", "fsdp"),
    ("shared_modes", "model"),  # P of S5 in its core: what all channels share is cut by modes
    # The state of one system, N of a bank or P of S5: parameters lie so, and cores of banks are given them whole.
    ("modes", "fsdp"),
    ("kv", None),
    ("relpos_buckets", None),
    ("abspos_buckets", None),
    ("layers", None),
    ("stack", None),
)


def mesh_axes(logical_axes: Sequence[str | None], rules=LOGICAL_AXIS_RULES) -> PartitionSpec:
    """Maps the logical axes of one array to a PartitionSpec.

    Raises:
      UserError: a name is not in the table; silently replicating it would hide a typo at the cost of memory.
    """
    table = {}
    for name, target in rules:
        table.setdefault(name, target)
    wanted = {}
    for name in logical_axes:
        if name is not None and name not in table:
            raise UserError(f"Unknown logical axis {name!r}; the rule table knows {', '.join(sorted(table))}.")
    priority = {name: i for i, name in reversed(list(enumerate(n for n, _ in rules)))}
    taken: set[str] = set()
    order = sorted(
        (i for i, n in enumerate(logical_axes) if n is not None), key=lambda i: (priority[logical_axes[i]], i)
    )
    for i in order:
        target = table[logical_axes[i]]
        axes = () if target is None else (target,) if isinstance(target, str) else target
        if axes and not taken.intersection(axes):
            wanted[i] = target
            taken.update(axes)
    return PartitionSpec(*(wanted.get(i) for i in range(len(logical_axes))))


def usable(spec: PartitionSpec, shape: Sequence[int], mesh: Mesh) -> PartitionSpec:
    """Keeps of `spec` only mesh axes that exist, have more than one device, and divide the dimension."""
    kept = []
    for dim, entry in zip(shape, tuple(spec) + (None,) * (len(shape) - len(spec)), strict=True):
        axes = () if entry is None else (entry,) if isinstance(entry, str) else tuple(entry)
        axes = tuple(a for a in axes if mesh.shape.get(a, 1) > 1)
        size = 1
        fitting = []
        for axis in axes:
            if dim % (size * mesh.shape[axis]) == 0:
                size *= mesh.shape[axis]
                fitting.append(axis)
        kept.append(None if not fitting else fitting[0] if len(fitting) == 1 else tuple(fitting))
    return PartitionSpec(*kept)


def parameter_shardings(params: Any, params_axes: Any, mesh: Mesh) -> Any:
    """Shardings of a parameter tree from the axis names its modules recorded.

    Args:
      params: tree of arrays or shapes.
      params_axes: the `params_axes` collection of the same module (leaves are `AxisMetadata`).
      mesh: the device mesh.

    Returns:
      A tree like `params` of NamedShardings. A dimension its mesh axes do not divide stays whole.
    """
    names = partitioning.get_axis_names(params_axes)

    def sharding(leaf, axes):
        axes = tuple(axes) if axes is not None else ()
        if len(axes) != len(leaf.shape):
            raise UserError(f"A parameter of shape {leaf.shape} has logical axes {axes}; they must be as many.")
        return NamedSharding(mesh, usable(mesh_axes(axes), leaf.shape, mesh))

    flat, treedef = jax.tree.flatten(params)
    flat_names = treedef.flatten_up_to(_plain(names))
    return treedef.unflatten([sharding(leaf, axes) for leaf, axes in zip(flat, flat_names, strict=True)])


def _plain(tree: Any) -> Any:
    """Nested plain dicts of a (possibly frozen) nested mapping; PartitionSpecs stay leaves."""
    return {k: _plain(v) for k, v in tree.items()} if hasattr(tree, "items") else tree


def batch_sharding(mesh: Mesh, ndim: int = 2) -> NamedSharding:
    """Sharding of a [batch, length, …] input: batch over data and fsdp, length over sequence."""
    return NamedSharding(mesh, mesh_axes(("batch", "length")[:ndim] + (None,) * (ndim - 2)))
