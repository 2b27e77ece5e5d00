"""What every benchmark writes: figures with the machine that they were measured on."""

import json
import os
import pathlib
import platform
import statistics
from collections.abc import Sequence
from typing import Any

import jax

RESULTS = pathlib.Path(__file__).parent / "results"


def machine() -> dict[str, Any]:
    """The machine and the versions that figures depend on."""
    model = platform.processor() or platform.machine()
    try:
        first = pathlib.Path("/proc/cpuinfo").read_text().split("\n\n")[0].splitlines()
        described = {name.strip(): value.strip() for name, _, value in (line.partition(":") for line in first)}
        # A virtual machine's name may be as short as "AMD EPYC", of many generations.
        model = "{model name} (family {cpu family}, model {model})".format(**described)
    except (OSError, KeyError):
        pass
    return {
        "device": jax.devices()[0].device_kind,
        "processor": model,
        "cores": os.cpu_count(),
        "jax": jax.__version__,
        "python": platform.python_version(),
    }


def spread(values: Sequence[float]) -> dict[str, Any]:
    """Median, least and largest of repeated measurements."""
    return {"median": statistics.median(values), "min": min(values), "max": max(values), "repeats": len(values)}


def write(name: str, figures: dict[str, Any]) -> pathlib.Path:
    """Writes `figures` and the machine to benchmarks/results/<name>.json, and prints them."""
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.json"
    text = json.dumps({"machine": machine(), **figures}, indent=1)
    path.write_text(text + "\n")
    print(text)
    return path
