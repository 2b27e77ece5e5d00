"""The chip that programs are compiled for where there is none: needs libtpu (the extra `aot`)."""

import os

import jax

NAME = "TPU v5e, one chip, by its compiler"


def one_chip() -> jax.Device:
    """A v5e chip of the TPU compiler's. Everything else of the process runs on the CPU."""
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    jax.config.update("jax_platforms", "cpu")
    # The import looks for a TPU, so it comes after the settings.
    from jax.experimental import topologies

    topology = topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x2", chips_per_host_bounds=(2, 2, 1))
    return topology.devices[0]
