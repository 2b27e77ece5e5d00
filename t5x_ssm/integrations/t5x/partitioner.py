"""The project's mesh and rule table behind T5X's partitioner."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
from flax import traverse_util
from jax.sharding import Mesh
from t5x import partitioning

from t5x_ssm.parallel import rules
from t5x_ssm.parallel.mesh import MeshConfig, make_mesh


class Partitioner(partitioning.PjitPartitioner):
    """T5X's partitioner over the axes data, fsdp, sequence and model.

    T5X's own knows neither v5e nor later TPUs, ignores `num_partitions` on a CPU, replicates a dimension whose logical
    name it does not know, and fails on one that the mesh does not divide. Here an unknown name is an error, and a
    dimension that its mesh axes do not divide stays whole.

    T5X reads a batch as shards of its rows, so `sequence` splits no input; activations are split over it inside a step.
    """

    def __init__(self, mesh_config: MeshConfig = MeshConfig(), devices: Sequence[jax.Device] | None = None):
        """Initializes the partitioner; the mesh is made when it is first asked for.

        Args:
          mesh_config: sizes of the axes.
          devices: of this run (all by default), or of a topology to compile for.
        """
        super().__init__(num_partitions=1, logical_axis_rules=rules.LOGICAL_AXIS_RULES)
        self._mesh_config = mesh_config
        self._devices = devices

    @functools.cached_property
    def mesh(self) -> Mesh:
        return make_mesh(self._mesh_config, self._devices)

    def get_mesh_axes(self, train_state: Any) -> Any:
        """A train state whose leaves are the PartitionSpecs of the leaves of `train_state`, arrays or shapes.

        Raises:
          UserError: a logical name is not in the rule table.
        """
        logical_axes = self.get_logical_axes(train_state)
        shapes = _flat(train_state)
        specs = {}
        for name, axes in _flat(logical_axes).items():
            if axes is not None and axes is not traverse_util.empty_node:
                axes = rules.usable(rules.mesh_axes(axes), shapes[name].shape, self.mesh)
            specs[name] = axes
        return logical_axes.restore_state(traverse_util.unflatten_dict(specs, sep="/"))

    def partition(
        self,
        fn: Callable,
        in_axis_resources: Any,
        out_axis_resources: Any,
        static_argnums: int | Sequence[int] = (),
        donate_argnums: int | Sequence[int] = (),
    ) -> partitioning.PjittedFnWithContext:
        """`fn` jitted under the mesh; specifications are PartitionSpecs.

        Flax is given no rules: its constraints do not ask whether a mesh divides an array. The layers' own do.
        """
        jitted = super().partition(fn, in_axis_resources, out_axis_resources, static_argnums, donate_argnums)
        return partitioning.PjittedFnWithContext(jitted._pjitted_fn, self.mesh)


def _flat(train_state: Any) -> dict[str, Any]:
    return traverse_util.flatten_dict(train_state.state_dict(), keep_empty_nodes=True, sep="/")
