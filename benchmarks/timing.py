"""Seconds of programs that take turns, so that whatever else the machine does meets all of them alike."""

import time
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import jax

from benchmarks import report


def seconds_of(run: Callable[[], Any]) -> float:
    """Seconds until the arrays that `run` returns are computed."""
    began = time.perf_counter()
    jax.block_until_ready(run())
    return time.perf_counter() - began


Name = TypeVar("Name")


def in_turns(runs: Mapping[Name, Any], repeats: int, measure: Callable[[Any], Any] = seconds_of) -> dict[Name, list]:
    """`measure` of each run, one after another, `repeats` times, after one round that is not counted."""
    for run in runs.values():
        measure(run)
    values: dict[Name, list] = {name: [] for name in runs}
    for _ in range(repeats):
        for name, run in runs.items():
            values[name].append(measure(run))
    return values


def ratios(numerators: list[float], denominators: list[float]) -> dict[str, Any]:
    """The spread of one measurement over the other's of the same turn."""
    return report.spread([a / b for a, b in zip(numerators, denominators, strict=True)])
