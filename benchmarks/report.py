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
        lines = pathlib.Path("/proc/cpuinfo").read_text().splitlines()
        model = next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
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
