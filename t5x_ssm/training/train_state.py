"""The state of training, and the tree it is saved as.

On disk it is T5X's tree, `{'target': params, 'state': {'step', 'param_states'}[, 'flax_mutables']}`, where `param_states`
is Flax's state dict of the Optax state without its empty nodes (Optax marks parameters of other groups, and stateless
transformations, by nodes that hold no array; checkpoint stores cannot say "nothing here"). `flax_mutables` is there only for
networks with state beside their parameters.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import serialization, struct, traverse_util
from jax.sharding import NamedSharding, PartitionSpec

from t5x_ssm.errors import UserError
from t5x_ssm.training.parameter_groups import parameter_path


class TrainState(struct.PyTreeNode):
    """Everything a train step reads and writes.

    Attributes:
      step: int32 scalar, the number of train steps taken, skipped ones included.
      params: tree of parameters.
      opt_state: state of the optimizer.
      flax_mutables: the network's other collections by name, which training updates without a gradient: `batch_stats`, the
        running averages of batch norms. Empty for most networks.
    """

    step: jax.Array
    params: Any
    opt_state: Any
    flax_mutables: dict[str, Any] = struct.field(default_factory=dict)

    @classmethod
    def create(
        cls, params: Any, optimizer: optax.GradientTransformation, flax_mutables: dict[str, Any] | None = None
    ) -> "TrainState":
        """The state before the first step."""
        step = jnp.zeros((), jnp.int32)
        return cls(step=step, params=params, opt_state=optimizer.init(params), flax_mutables=flax_mutables or {})

    def to_tree(self) -> dict[str, Any]:
        """T5X's tree of nested dicts, whose leaves are this state's own arrays."""
        tree = {
            "target": serialization.to_state_dict(self.params),
            "state": {"step": self.step, "param_states": _without_empty(serialization.to_state_dict(self.opt_state))},
        }
        if self.flax_mutables:
            tree["flax_mutables"] = serialization.to_state_dict(self.flax_mutables)
        return tree

    def from_tree(self, tree: dict[str, Any]) -> "TrainState":
        """A state of this one's structure with the leaves of `tree`.

        Args:
          tree: T5X's tree, as `to_tree` makes it; leaves of any kind (arrays, shapes, shardings).

        Raises:
          UserError: the leaves are not those of this state; names them.
        """
        check_same_leaves(self.to_tree(), tree)
        opt_state = _with_empty(serialization.to_state_dict(self.opt_state), tree["state"].get("param_states", {}))
        return TrainState(
            step=tree["state"]["step"],
            params=serialization.from_state_dict(self.params, tree["target"]),
            opt_state=serialization.from_state_dict(self.opt_state, opt_state),
            flax_mutables=serialization.from_state_dict(self.flax_mutables, tree.get("flax_mutables", {})),
        )


def split_variables(variables: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """(params, flax_mutables) of the variables that a network's `init` makes; axis metadata is neither."""
    others = {name: tree for name, tree in variables.items() if name != "params" and not name.endswith("_axes")}
    return variables["params"], others


def state_shardings(state: TrainState, param_shardings: Any) -> TrainState:
    """Shardings of a whole state from those of its parameters.

    A leaf of the optimizer state lies as the parameter whose path ends its own path: moments exactly so, Adafactor's
    factored moments without the axis that was averaged away. Everything else is replicated, running averages of batch norms
    (which are small) among it.

    Args:
      state: a state of arrays or shapes.
      param_shardings: tree of NamedShardings like its parameters.
    """
    mesh = jax.tree.leaves(param_shardings)[0].mesh
    replicated = NamedSharding(mesh, PartitionSpec())
    shardings = jax.tree.leaves(param_shardings)
    by_path = {
        parameter_path(path): (leaf.shape, sharding)
        for (path, leaf), sharding in zip(jax.tree_util.tree_leaves_with_path(state.params), shardings, strict=True)
    }

    def sharding_of(path, leaf):
        parts = parameter_path(path).split("/")
        owner = next((i for i in range(len(parts)) if "/".join(parts[i:]) in by_path), None)
        if owner is None:
            return replicated
        shape, sharding = by_path["/".join(parts[owner:])]
        if leaf.shape == shape:
            return sharding
        averaged = {"v_row": -1, "v_col": -2}.get(parts[owner - 1])
        if averaged is None or len(leaf.shape) != len(shape) - 1:
            return replicated
        # Optax averages a row over the largest axis and a column over the second largest.
        axis = int(np.argsort(shape)[averaged])
        spec = tuple(sharding.spec) + (None,) * (len(shape) - len(sharding.spec))
        return NamedSharding(mesh, PartitionSpec(*spec[:axis], *spec[axis + 1 :]))

    opt_state = jax.tree_util.tree_map_with_path(sharding_of, state.opt_state)
    flax_mutables = jax.tree.map(lambda _: replicated, state.flax_mutables)
    return TrainState(step=replicated, params=param_shardings, opt_state=opt_state, flax_mutables=flax_mutables)


def check_same_leaves(expected: dict[str, Any], found: dict[str, Any], limit: int = 8) -> None:
    """Checks that two nested dicts have the same leaves, of the same shapes where both have shapes.

    Raises:
      UserError: they differ; the message names up to `limit` leaves of each kind of difference.
    """
    expected, found = (traverse_util.flatten_dict(tree, sep="/") for tree in (expected, found))
    reshaped = [
        f"{name} {tuple(found[name].shape)} instead of {tuple(leaf.shape)}"
        for name, leaf in expected.items()
        if name in found and getattr(leaf, "shape", None) != getattr(found[name], "shape", getattr(leaf, "shape", None))
    ]
    differences = {
        "missing": sorted(expected.keys() - found.keys()),
        "not of this model or optimizer": sorted(found.keys() - expected.keys()),
        "of another shape": reshaped,
    }
    lines = []
    for kind, names in differences.items():
        if names:
            more = f" and {len(names) - limit} more" if len(names) > limit else ""
            lines.append(f"  {len(names)} {kind}: {', '.join(names[:limit])}{more}")
    if lines:
        raise UserError("The saved state is of another model or optimizer; leaves that differ:\n" + "\n".join(lines))


def _without_empty(tree: dict[str, Any]) -> dict[str, Any]:
    return traverse_util.unflatten_dict(traverse_util.flatten_dict(tree))


def _with_empty(template: dict[str, Any], tree: dict[str, Any]) -> dict[str, Any]:
    """`tree` with the empty nodes of `template` put back."""
    empty = {
        path: leaf
        for path, leaf in traverse_util.flatten_dict(template, keep_empty_nodes=True).items()
        if leaf is traverse_util.empty_node
    }
    return traverse_util.unflatten_dict(traverse_util.flatten_dict(tree) | empty)
