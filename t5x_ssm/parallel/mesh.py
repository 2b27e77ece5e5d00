"""The device mesh: four named axes, any of which may have size 1.

| axis       | what is split over it                                                        |
|------------|------------------------------------------------------------------------------|
| `data`     | the batch; parameters are replicated (slices of a multi-slice pod sit here)   |
| `fsdp`     | the batch, and every parameter, gradient and optimizer moment                |
| `sequence` | the length of each example                                                   |
| `model`    | heads, channels, feed-forward and vocabulary dimensions                      |
"""

import dataclasses
import math
from collections.abc import Sequence

import jax
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh

from t5x_ssm.errors import UserError

AXES = ("data", "fsdp", "sequence", "model")


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """Sizes of the mesh axes in devices; one of them may be -1, which takes all remaining devices."""

    data: int = -1
    fsdp: int = 1
    sequence: int = 1
    model: int = 1

    def sizes(self, num_devices: int) -> dict[str, int]:
        """Resolves -1 and checks that the axes multiply to the number of devices.

        Args:
          num_devices: how many devices the mesh must cover.

        Returns:
          The size of each axis, in the order of `AXES`.

        Raises:
          UserError: naming the axis at fault.
        """
        sizes = {axis: getattr(self, axis) for axis in AXES}
        for axis, size in sizes.items():
            if size != -1 and size < 1:
                raise UserError(f"MeshConfig.{axis} = {size}: an axis size is a positive integer, or -1 for the rest.")
        free = [axis for axis, size in sizes.items() if size == -1]
        if len(free) > 1:
            raise UserError(f"MeshConfig: only one axis may be -1, but {' and '.join(free)} are.")
        known = math.prod(size for size in sizes.values() if size != -1)
        if free:
            if num_devices % known:
                raise UserError(
                    f"MeshConfig: the fixed axes take {known} devices, which does not divide the {num_devices} present, "
                    f"so {free[0]} = -1 has no whole value."
                )
            sizes[free[0]] = num_devices // known
        elif known != num_devices:
            shape = " x ".join(f"{axis} {size}" for axis, size in sizes.items())
            raise UserError(f"MeshConfig: {shape} = {known} devices, but {num_devices} are present.")
        return sizes


def make_mesh(config: MeshConfig = MeshConfig(), devices: Sequence[jax.Device] | None = None) -> Mesh:
    """Builds the mesh over `devices`, laid out so that inner axes use the fastest links.

    Devices of several slices, which the data-centre network joins, are split over `data` alone: nothing but the sum of the
    gradients then crosses between slices.

    Args:
      config: sizes of the axes.
      devices: of this run (all of them by default) or of a topology, see `jax.experimental.topologies`.

    Raises:
      UserError: the sizes do not fit the devices, or `data` cannot be split over the slices.
    """
    devices = jax.devices() if devices is None else list(devices)
    sizes = config.sizes(len(devices))
    shape = tuple(sizes.values())
    slices = len({getattr(device, "slice_index", 0) for device in devices})
    if sizes["data"] % slices:
        raise UserError(
            f"MeshConfig.data = {sizes['data']} must be a multiple of the {slices} slices, which it is split over."
        )
    # An axis need not be a whole dimension of the torus: 4 x 4 x 8 chips make a `model` axis of 2.
    if slices > 1:
        within = (sizes["data"] // slices, *shape[1:])
        across = (slices,) + (1,) * (len(AXES) - 1)
        grid = mesh_utils.create_hybrid_device_mesh(within, across, devices, allow_split_physical_axes=True)
    else:
        grid = mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
    return Mesh(grid, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def batch_shards(mesh: Mesh) -> int:
    """How many pieces the batch dimension is split into: every batch size must be a multiple of it."""
    return mesh.shape["data"] * mesh.shape["fsdp"]
