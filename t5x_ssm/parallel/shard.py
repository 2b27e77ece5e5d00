"""Keeps every core local: runs a function of plain arrays on the shards of a mesh, whatever way the mesh was entered.

The partitioner of XLA gathers the operands of an FFT, and pipelines a scan over a sharded length badly, so each core runs
under `jax.shard_map`. What that needs is found here: the mesh (from `jax.set_mesh`, from T5X's legacy `with mesh:`, or
none, as when T5X initialises through `eval_shape`), and for each array the mesh axes that exist and divide it.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax.interpreters import pxla
from jax.sharding import Mesh, PartitionSpec

from t5x_ssm.parallel import rules

# A pytree prefix whose leaves are tuples of logical axis names, one tuple an array.
LogicalAxes = Any


def current_mesh() -> Mesh | jax.sharding.AbstractMesh | None:
    """The mesh that surrounds this call, or None when there is none."""
    mesh = jax.sharding.get_abstract_mesh()
    if not mesh.empty:
        return mesh
    mesh = pxla.thread_resources.env.physical_mesh
    return None if mesh.empty else mesh


def constrain(x: jax.Array, logical_axes: Sequence[str | None]) -> jax.Array:
    """Asks the partitioner to keep `x` sharded by its logical axes; the identity without a mesh."""
    mesh = current_mesh()
    if mesh is None or inside_shard_map():
        return x
    spec = rules.usable(rules.mesh_axes(logical_axes), x.shape, mesh)
    return jax.lax.with_sharding_constraint(x, spec)


def shard(function: Callable, in_axes: LogicalAxes, out_axes: LogicalAxes) -> Callable:
    """Wraps `function` to run on local shards.

    Args:
      function: of positional array trees, and returning array trees; it sees local shapes.
      in_axes: for each argument a tuple of logical axis names, or a tree of them. `None` in a tuple keeps that dimension
        whole on every device; an axis name must mean the same size wherever it occurs.
      out_axes: likewise for the result.

    Returns:
      A function with the same signature on global arrays; `function` itself when there is no mesh to use.
    """

    def wrapped(*args):
        mesh = current_mesh()
        if mesh is None or inside_shard_map():
            return function(*args)
        is_axes = lambda t: isinstance(t, tuple) and all(a is None or isinstance(a, str) for a in t)
        per_leaf = jax.tree.map(
            lambda axes, subtree: jax.tree.map(lambda _: axes, subtree), in_axes, args, is_leaf=is_axes
        )
        leaves, treedef = jax.tree.flatten(args)
        leaf_axes = treedef.flatten_up_to(per_leaf)
        placement = _placement(leaves, leaf_axes, mesh)
        if not any(placement.values()):
            return function(*args)
        to_spec = lambda axes: PartitionSpec(*(placement.get(name) for name in axes))
        in_specs = treedef.unflatten([to_spec(axes) for axes in leaf_axes])
        out_specs = jax.tree.map(to_spec, out_axes, is_leaf=is_axes)
        return jax.shard_map(function, mesh=mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False)(*args)

    return wrapped


def cut(logical_axis: str, size: int) -> tuple[str | None, int]:
    """Over which mesh axis `shard` cuts a dimension that has one axis in the rules, and into how many pieces: None and 1 for none."""
    mesh = current_mesh()
    if mesh is None or inside_shard_map():
        return None, 1
    (axis,) = rules.usable(rules.mesh_axes((logical_axis,)), (size,), mesh)
    return axis, 1 if axis is None else mesh.shape[axis]


def inside_shard_map() -> bool:
    """Whether a surrounding shard_map has already made the arrays local."""
    mesh = jax.sharding.get_abstract_mesh()
    return bool(mesh.manual_axes) if not mesh.empty else False


def _placement(leaves, leaf_axes, mesh) -> dict[str, Any]:
    """Mesh axes of each logical name, dropped where some array that carries the name is not divisible by them."""
    sizes: dict[str, int] = {}
    for leaf, axes in zip(leaves, leaf_axes, strict=True):
        if len(axes) != leaf.ndim:
            raise ValueError(f"an array of shape {leaf.shape} was given logical axes {axes}")
        for name, size in zip(axes, leaf.shape, strict=True):
            if name is not None and sizes.setdefault(name, size) != size:
                raise ValueError(f"logical axis {name!r} has sizes {sizes[name]} and {size} in one call")
    names = tuple(sizes)
    # One virtual array that has every name once: two names cannot then claim the same mesh axis.
    spec = rules.usable(rules.mesh_axes(names), tuple(sizes.values()), mesh)
    return dict(zip(names, spec, strict=True))
