"""Where the wall time of a run goes, over all its starts.

Every second belongs to one cause:

| cause         | what                                                                                  |
|---------------|---------------------------------------------------------------------------------------|
| `steps`       | train steps taken for the first time: the goodput                                     |
| `repeated`    | train steps that an earlier start had taken and lost                                  |
| `data`        | waiting for a batch                                                                   |
| `compilation` | tracing and compiling, wherever it happens                                            |
| `checkpoint`  | saving while training waits, and restoring                                            |
| `evaluation`  | held-out sets                                                                         |
| `startup`     | the rest before the first step                                                        |
| `down`        | between the last sign of one start and the next                                       |

The sums are kept in `MODEL_DIR/goodput.json`, which is replaced with every line of history, so that a start that is
killed is counted up to its last line; what it did after that is `down`.
"""

import contextlib
import json
import os
import pathlib
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax

from t5x_ssm.training.metrics import TIME_PREFIX

CAUSES = ("steps", "repeated", "data", "compilation", "checkpoint", "evaluation", "startup", "down")
FILE = "goodput.json"
_COMPILATION = "/jax/core/compile/"


class Goodput:
    """Adds up wall time by cause. Between `spent_on` blocks time counts as start-up, until `stepping` says otherwise."""

    def __init__(self, folder: pathlib.Path | None, *, clock: Callable[[], float] = time.time):
        """Goes on from the sums in `folder`; None keeps them in memory, as all processes but one do."""
        self._path = None if folder is None else folder / FILE
        self._clock = clock
        self._seconds = dict.fromkeys(CAUSES, 0.0)
        self._furthest = 0
        self._cause = "startup"
        self._compiled: list[tuple[float, float]] = []  # Disjoint spans since the mark, oldest first.
        self._mark = clock()
        earlier = self._read()
        if earlier is not None:
            self._seconds |= {cause: earlier["seconds"].get(cause, 0.0) for cause in CAUSES}
            self._furthest = earlier["step"]
            self._seconds["down"] += max(self._mark - earlier["at"], 0.0)

    def _read(self) -> dict[str, Any] | None:
        try:
            return json.loads(self._path.read_text()) if self._path is not None else None
        except (OSError, ValueError):  # The first start, or a file that says nothing: only the report suffers.
            return None

    def __enter__(self) -> "Goodput":
        jax.monitoring.register_event_duration_secs_listener(self._listen)
        return self

    def __exit__(self, *_) -> None:
        jax.monitoring.unregister_event_duration_listener(self._listen)

    def _listen(self, event: str, seconds: float, **_) -> None:
        if event.startswith(_COMPILATION):
            # Called when a span ends. Spans nest: a function's tracing holds that of the functions it calls.
            end = self._clock()
            start = max(end - seconds, self._mark)
            while self._compiled and self._compiled[-1][0] >= start:
                self._compiled.pop()
            if self._compiled:
                start = max(start, self._compiled[-1][1])
            self._compiled.append((start, end))

    @contextlib.contextmanager
    def spent_on(self, cause: str) -> Iterator[None]:
        """Counts the time inside for `cause`, but for what blocks within count."""
        outer = self._turn(cause)
        try:
            yield
        finally:
            self._turn(outer)

    def stepping(self, step: int) -> None:
        """From now on, time between blocks is that of train step `step` (from 1)."""
        self._turn("steps" if step > self._furthest else "repeated")

    def _turn(self, cause: str) -> str:
        """Counts the time up to now for the cause so far, and takes up another; returns the former."""
        now = self._clock()
        elapsed, self._mark = max(now - self._mark, 0.0), now
        compiling = min(sum(end - start for start, end in self._compiled), elapsed)
        self._compiled = []
        self._seconds["compilation"] += compiling
        self._seconds[self._cause] += elapsed - compiling
        former, self._cause = self._cause, cause
        return former

    def summary(self) -> dict[str, float]:
        """Fields of a line of history: seconds by cause, their sum, and the share of `steps` in it."""
        self._turn(self._cause)
        total = sum(self._seconds.values())
        fields = {f"{TIME_PREFIX}run/{cause}_seconds": seconds for cause, seconds in self._seconds.items()}
        fields[f"{TIME_PREFIX}run/total_seconds"] = total
        fields[f"{TIME_PREFIX}run/goodput"] = self._seconds["steps"] / total if total else 0.0
        return fields

    def text(self) -> str:
        """One line for people."""
        self._turn(self._cause)
        total = sum(self._seconds.values()) or 1.0
        shares = {cause: seconds / total for cause, seconds in self._seconds.items() if seconds >= 0.0005 * total}
        rest = ", ".join(f"{cause} {share:.1%}" for cause, share in shares.items() if cause != "steps")
        return f"Wall time over all starts {total:,.0f} s: {shares.get('steps', 0.0):.1%} in new steps; {rest}."

    def keep(self, step: int) -> None:
        """Writes the sums down; the run has reached `step`."""
        self._turn(self._cause)
        self._furthest = max(self._furthest, step)
        if self._path is None:
            return
        temporary = self._path.with_name(FILE + ".tmp")
        temporary.write_text(json.dumps({"seconds": self._seconds, "step": self._furthest, "at": self._mark}))
        os.replace(temporary, self._path)


def device_figures(
    line: Mapping[str, float], *, devices: int, flops_per_token: float, peak_flops: float | None
) -> dict[str, float]:
    """Speed of a device from a line of `MetricWindow`.

    Args:
      line: with 'time/tokens_per_second' of all devices.
      devices: how many there are.
      flops_per_token: the model's own, forwards and backwards.
      peak_flops: of one device a second; None leaves the utilization out.

    Returns:
      'time/tokens_per_second_per_device'; 'time/model_flops_utilization'; 'time/data_share', of the time of a step.
    """
    fields = {}
    speed = line.get(f"{TIME_PREFIX}tokens_per_second")
    if speed:
        fields[f"{TIME_PREFIX}tokens_per_second_per_device"] = speed / devices
        if peak_flops:
            fields[f"{TIME_PREFIX}model_flops_utilization"] = speed / devices * flops_per_token / peak_flops
    if line.get(f"{TIME_PREFIX}step_seconds"):
        fields[f"{TIME_PREFIX}data_share"] = (
            line.get(f"{TIME_PREFIX}data_seconds", 0.0) / line[f"{TIME_PREFIX}step_seconds"]
        )
    return fields
