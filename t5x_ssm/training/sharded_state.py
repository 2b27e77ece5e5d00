"""The train state on a mesh: which device holds which part of every leaf, and a first state made in place."""

from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from t5x_ssm.parallel import rules
from t5x_ssm.training.optimizers import Optimizer
from t5x_ssm.training.train_state import TrainState, split_variables, state_shardings


def abstract_state(objective: Any, optimizer: Optimizer, batch_shapes: dict[str, Any], mesh: Mesh) -> TrainState:
    """Shapes, types and shardings of the state, without any array.

    Optimizer state is sharded like the parameters that it belongs to, see `train_state.state_shardings`.

    Args:
      objective: has `init`, see `models.objectives`.
      optimizer: see `training.optimizers`.
      batch_shapes: shapes of a global batch.
      mesh: the device mesh.

    Returns:
      A TrainState of jax.ShapeDtypeStructs with shardings.
    """
    variables = _abstract_variables(objective, batch_shapes)
    params, flax_mutables = split_variables(variables)
    shardings = rules.parameter_shardings(params, variables["params_axes"], mesh)
    state = jax.eval_shape(lambda p, m: TrainState.create(p, optimizer, m), params, flax_mutables)
    return _placed(state, state_shardings(state, shardings))


def abstract_parameters(objective: Any, batch_shapes: dict[str, Any], mesh: Mesh) -> Any:
    """Shapes, types and shardings of the parameters alone: a tree of jax.ShapeDtypeStructs."""
    variables = _abstract_variables(objective, batch_shapes)
    params = variables["params"]
    return _placed(params, rules.parameter_shardings(params, variables["params_axes"], mesh))


def abstract_mutables(objective: Any, batch_shapes: dict[str, Any], mesh: Mesh) -> dict[str, Any]:
    """The same of the network's state beside its parameters, which every device holds whole; empty for most networks."""
    _, flax_mutables = split_variables(_abstract_variables(objective, batch_shapes))
    replicated = NamedSharding(mesh, PartitionSpec())
    return _placed(flax_mutables, jax.tree.map(lambda _: replicated, flax_mutables))


def _abstract_variables(objective: Any, batch_shapes: dict[str, Any]) -> dict[str, Any]:
    return jax.eval_shape(lambda: objective.init(jax.random.key(0), batch_shapes))


def _placed(shapes: Any, shardings: Any) -> Any:
    return jax.tree.map(lambda leaf, s: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=s), shapes, shardings)


def initial_state(objective: Any, optimizer: Optimizer, batch_shapes: dict[str, Any], abstract: TrainState, rng):
    """Makes the first state directly in its shards: no device ever holds a whole parameter that is split."""

    def make(rng):
        params, flax_mutables = split_variables(objective.init(rng, batch_shapes))
        return TrainState.create(params, optimizer, flax_mutables)

    shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract)
    return jax.jit(make, out_shardings=shardings)(rng)


def parameter_table(params: Any) -> str:
    """One line a parameter: path, shape, type, sharding, bytes in all and per device; then the totals."""
    rows = [("parameter", "shape", "type", "sharding", "bytes", "bytes/device")]
    count = total = per_device = 0
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        size = leaf.size * jnp.dtype(leaf.dtype).itemsize
        local = size
        spec = ""
        if leaf.sharding is not None:
            local = jnp.dtype(leaf.dtype).itemsize
            for dim in leaf.sharding.shard_shape(leaf.shape):
                local *= dim
            spec = str(tuple(leaf.sharding.spec)) if isinstance(leaf.sharding, NamedSharding) else ""
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        rows.append((name, "x".join(map(str, leaf.shape)), str(leaf.dtype), spec, f"{size:,}", f"{local:,}"))
        count, total, per_device = count + leaf.size, total + size, per_device + local
    rows.append((f"total: {count:,} parameters", "", "", "", f"{total:,}", f"{per_device:,}"))
    widths = [max(len(row[i]) for row in rows) for i in range(6)]
    lines = []
    for row in rows:
        cells = [cell.ljust(w) if i < 4 else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=True))]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)
