"""What TPU chips are made of: the one table that plans divide by, and topologies of them for the compiler.

Figures are those of the chips' pages in the documentation of Cloud TPU (docs.cloud.google.com/tpu/docs: v4, v5e, v5p, v6e). They are
peaks. Interconnect bandwidth is of all links of a chip together in one direction, half of what the pages call
bidirectional. Network bandwidth is that between slices; where the page gives it for a pod, a chip's is its share.
"""

import dataclasses
import os
import re
from typing import Any

from t5x_ssm.errors import UserError
from t5x_ssm.parallel.chips import peak_flops


@dataclasses.dataclass(frozen=True)
class Chip:
    """One generation.

    Attributes:
      flops: bfloat16 multiplications and additions a second.
      hbm_bytes: memory.
      hbm_bandwidth: bytes a second.
      ici_bandwidth: bytes a second that a chip can send over all its links to other chips of the slice.
      network_bandwidth: bytes a second from a chip to other slices; None where the page does not say.
      dimensions: of the torus, so of a topology's name.
    """

    flops: float
    hbm_bytes: int
    hbm_bandwidth: float
    ici_bandwidth: float
    network_bandwidth: float | None
    dimensions: int


GIB = 2**30
CHIPS = {
    "v4": Chip(peak_flops("TPU v4"), 32 * GIB, 1200e9, 300e9, None, 3),
    "v5e": Chip(peak_flops("TPU v5e"), 16 * GIB, 819e9, 200e9, 6.4e12 / 8 / 256, 2),
    "v5p": Chip(peak_flops("TPU v5p"), 95 * GIB, 2765e9, 600e9, 50e9 / 8, 3),
    "v6e": Chip(peak_flops("TPU v6e"), 32 * GIB, 1638e9, 400e9, 25.6e12 / 8 / 256, 2),
}


def parse_topology(name: str) -> Chip:
    """The chip of a topology such as 'v5p:4x4x8'.

    Raises:
      UserError: it names no chip of the table, or has another shape than that chip's torus.
    """
    match = re.fullmatch(r"(\w+):(\d+(?:x\d+)*)", name)
    if not match or match[1] not in CHIPS:
        raise UserError(f"--topology={name}: write CHIP:SHAPE with a chip of {', '.join(CHIPS)}, such as v5p:4x4x8.")
    chip = CHIPS[match[1]]
    if match[2].count("x") + 1 != chip.dimensions:
        raise UserError(f"--topology={name}: a {match[1]} topology has {chip.dimensions} dimensions.")
    return chip


def topology_devices(name: str, slices: int = 1) -> list[Any]:
    """Devices to compile for, one a chip. Needs libtpu and no TPU.

    Raises:
      UserError: libtpu is not installed, or knows no such topology.
    """
    parse_topology(name)
    # No chip is opened: other processes may use one, or compile, at the same time, and no metadata server is asked.
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    from jax.experimental import topologies

    options: dict[str, Any] = {} if slices == 1 else {"num_slices": slices}
    if name.startswith("v4"):
        options["chip_config_name"] = "megacore"  # both cores of a chip as one device
    elif name.startswith("v5e"):
        options["chips_per_host_bounds"] = (2, 2, 1)
    try:
        return list(topologies.get_topology_desc(platform="tpu", topology_name=name, **options).devices)
    except Exception as error:  # The compiler's library raises what it likes.
        reason = str(error).strip().splitlines()[0]
        raise UserError(
            f"--topology={name}: the TPU compiler cannot describe it ({reason}). It needs libtpu: pip install 't5x_ssm[aot]'."
        ) from error
