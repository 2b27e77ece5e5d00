"""From the device's per-step scalars to lines of history.

Three pieces, in the order in which a value passes them: `MetricQueue` fetches a step's scalars a step or two late, so
that the device never waits for the host; `MetricWindow` sums them until the next line is due; `MetricsLog` appends that
line to `metrics.jsonl` and to TensorBoard. A window that is open when a checkpoint is taken is saved with it, and
floats survive JSON exactly, so a resumed run writes the lines that an uninterrupted one would have, whatever the step.
"""

import collections
import errno
import json
import math
import os
import pathlib
from collections.abc import Iterator, Mapping
from typing import Any

import jax

TIME_PREFIX = "time/"
# Of the scalars a train step reports, those that are not sums over tokens.
_GAUGES = ("param_norm", "update_norm")
_RATES = "learning_rate"
_LN2 = math.log(2.0)


class MetricQueue:
    """Per-step device scalars on their way to the host.

    `push` starts the copy of the newest step and hands out steps that are at least `lag` behind it, whose copies have
    had a step's time to arrive. `drain` hands out the rest, and waits for the device: before a checkpoint, or the end.
    """

    def __init__(self, lag: int = 2):
        self._lag = lag
        self._pending: collections.deque[tuple[int, Mapping[str, jax.Array], Any]] = collections.deque()

    def push(
        self, step: int, metrics: Mapping[str, jax.Array], context: Any = None
    ) -> list[tuple[int, dict[str, float], Any]]:
        """Takes the metrics of `step`; returns (step, host values, context) of older ones, oldest first.

        Args:
          step: the step that made the metrics.
          metrics: device scalars.
          context: anything that should come back with them, such as the batch or the host's timings.
        """
        for value in metrics.values():
            if hasattr(value, "copy_to_host_async"):
                value.copy_to_host_async()
        self._pending.append((step, metrics, context))
        return self._take(self._lag)

    def drain(self) -> list[tuple[int, dict[str, float], Any]]:
        """Everything still pending, oldest first."""
        return self._take(0)

    def _take(self, keep: int) -> list[tuple[int, dict[str, float], Any]]:
        ready = []
        while len(self._pending) > keep:
            step, metrics, context = self._pending.popleft()
            ready.append((step, {name: float(value) for name, value in metrics.items()}, context))
        return ready


class MetricWindow:
    """Sums of per-step values since the last line of history, and totals since the first step."""

    def __init__(self):
        self._totals = {"steps": 0, "tokens": 0.0, "skipped": 0}
        self._open()

    def _open(self) -> None:
        self._steps = 0
        self._skipped = 0
        self._tokens = 0.0
        self._sums: dict[str, float] = {}
        self._grad_norm = {"sum": 0.0, "max": 0.0}
        self._last: dict[str, float] = {}
        self._times: dict[str, float] = {}

    @property
    def steps(self) -> int:
        """Steps in the open window."""
        return self._steps

    def add(self, metrics: Mapping[str, float], times: Mapping[str, float] | None = None) -> None:
        """Adds one step.

        Args:
          metrics: what the train step reports, as host floats. Of a skipped step only the tokens count: its other
            values are not finite. 'tokens' counts them where 'weights' counts something else, such as examples.
          times: seconds by name, for example {'step': 0.2, 'data': 0.01}.
        """
        skipped = metrics.get("skipped", 0.0) > 0
        tokens = metrics.get("tokens", metrics.get("weights", 0.0))
        tokens = tokens if math.isfinite(tokens) else 0.0
        self._steps += 1
        self._skipped += skipped
        self._tokens += tokens
        self._totals["steps"] += 1
        self._totals["skipped"] += skipped
        self._totals["tokens"] += tokens
        for name, seconds in (times or {}).items():
            self._times[name] = self._times.get(name, 0.0) + seconds
        if skipped:
            return
        for name, value in metrics.items():
            if name in _GAUGES or name.startswith(_RATES):
                self._last[name] = value
            elif name == "grad_norm":
                self._grad_norm["sum"] += value
                self._grad_norm["max"] = max(self._grad_norm["max"], value)
            elif name not in ("skipped", "tokens"):
                self._sums[name] = self._sums.get(name, 0.0) + value

    def state(self) -> dict[str, Any]:
        """The open window and the totals as JSON-able values; `restore` of it goes on exactly."""
        return {
            "totals": dict(self._totals),
            "steps": self._steps,
            "skipped": self._skipped,
            "tokens": self._tokens,
            "sums": dict(self._sums),
            "grad_norm": dict(self._grad_norm),
            "last": dict(self._last),
            "time": dict(self._times),
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Continues from what `state` returned, possibly in another process."""
        self._totals = dict(state["totals"])
        self._steps = state["steps"]
        self._skipped = state["skipped"]
        self._tokens = state["tokens"]
        self._sums = dict(state["sums"])
        self._grad_norm = dict(state["grad_norm"])
        self._last = dict(state["last"])
        self._times = dict(state["time"])

    def summarise(self, bytes_per_token: float | None = None) -> dict[str, float]:
        """The line of history for the open window, which stays open.

        Args:
          bytes_per_token: bytes of text that a token with loss stands for, on average; 1 for a byte vocabulary. Without
            it, and without a sum 'bytes' from the objective, there are no bits per byte.

        Returns:
          Quality as in `summarise_sums`; 'grad_norm' (mean) and 'grad_norm_max'; 'param_norm', 'update_norm' and
          learning rates of the last applied update; 'steps', 'tokens' and 'skipped' of the window and, as
          '…_total', of the run; and under 'time/' mean seconds per step by name and tokens per second of 'step'.
        """
        line = summarise_sums(self._sums, bytes_per_token)
        applied = self._steps - self._skipped
        if applied:
            line |= {"grad_norm": self._grad_norm["sum"] / applied, "grad_norm_max": self._grad_norm["max"]}
        line |= self._last
        line |= {"steps": self._steps, "tokens": self._tokens, "skipped": self._skipped}
        line |= {f"{name}_total": total for name, total in self._totals.items()}
        for name, seconds in self._times.items():
            line[f"{TIME_PREFIX}{name}_seconds"] = seconds / max(self._steps, 1)
        if self._times.get("step"):
            line[f"{TIME_PREFIX}tokens_per_second"] = self._tokens / self._times["step"]
        return line

    def close(self, bytes_per_token: float | None = None) -> dict[str, float]:
        """`summarise`, then opens the next window. The totals go on."""
        line = self.summarise(bytes_per_token)
        self._open()
        return line


def summarise_sums(sums: Mapping[str, float], bytes_per_token: float | None = None) -> dict[str, float]:
    """Qualities of a model from sums over tokens; or over examples, of which then speaks what is said of tokens here.

    Args:
      sums: sums over tokens, with 'weights' the sum of loss weights.
      bytes_per_token: bytes of text per token with loss, if known; a sum 'bytes' takes its place.

    Returns:
      'loss' (nats per token, with z-loss and smoothing), 'nats_per_token', 'perplexity', 'bits_per_token',
      'bits_per_byte' where bytes are known, 'accuracy', and every other sum per token. Empty without weights.
    """
    weights = sums.get("weights", 0.0)
    if not weights > 0:
        return {}
    line = {}
    for name, value in sums.items():
        if name == "nats":
            nats = value / weights
            line["nats_per_token"] = nats
            line["perplexity"] = math.exp(nats) if nats < 700 else math.inf
            line["bits_per_token"] = nats / _LN2
            if sums.get("bytes"):
                line["bits_per_byte"] = value / _LN2 / sums["bytes"]
            elif bytes_per_token:
                line["bits_per_byte"] = nats / _LN2 / bytes_per_token
        elif name == "correct":
            line["accuracy"] = value / weights
        elif name not in ("weights", "bytes", "tokens"):
            line[name] = value / weights
    return line


class MetricsLog:
    """`metrics.jsonl`, one JSON object a line, and TensorBoard events beside it.

    Opening it at step S takes the history back to S: later lines, and a last line that a crash tore, are dropped, since
    the run is about to write them again. Lines that cannot be read are kept aside.
    """

    def __init__(
        self,
        path: str | os.PathLike,
        *,
        resume_step: int = 0,
        tensorboard_dir: str | os.PathLike | None = None,
        enabled: bool = True,
    ):
        """Opens the log for appending.

        Args:
          path: the file; made if missing, with its folder.
          resume_step: the step the run goes on from; 0 for a new run.
          tensorboard_dir: folder for event files; None writes none.
          enabled: False on all processes but one; then nothing is read or written.
        """
        self._fd = None
        self._events = None
        if not enabled:
            return
        path = pathlib.Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        _take_back(path, resume_step)
        self._fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
        if tensorboard_dir is not None:
            # Imported here, so that a log without event files needs no writer of them.
            from t5x_ssm.training.tensorboard import EventFile

            self._events = EventFile(tensorboard_dir, first_step=resume_step + 1)

    def write(self, step: int, values: Mapping[str, float], split: str = "train") -> None:
        """Appends one line and hands it to the operating system.

        Args:
          step: the step the values belong to.
          values: numbers by name; those that are not finite are written as null.
          split: 'train', or the name of an evaluation; it groups the curves in TensorBoard.

        Raises:
          OSError: the line could not be written whole (the disk is full); then nothing of it stays in the file.
        """
        if self._fd is None:
            return
        row = {"step": step, "split": split} | {k: v if math.isfinite(v) else None for k, v in values.items()}
        line = (json.dumps(row, allow_nan=False) + "\n").encode()
        size = os.fstat(self._fd).st_size
        try:
            if os.write(self._fd, line) != len(line):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError:
            os.ftruncate(self._fd, size)
            raise
        if self._events is not None:
            self._events.write(step, {f"{split}/{name}": value for name, value in values.items()})

    def sync(self) -> None:
        """Makes everything written so far durable; call it before a checkpoint is committed."""
        if self._fd is not None:
            os.fsync(self._fd)
        if self._events is not None:
            self._events.flush()

    def close(self) -> None:
        """Syncs and closes; a second call does nothing."""
        self.sync()
        if self._fd is not None:
            os.close(self._fd)
            self._fd = None
        if self._events is not None:
            self._events.close()
            self._events = None


def history(path: str | os.PathLike, split: str | None = None, timings: bool = True) -> list[dict[str, Any]]:
    """The lines of a `metrics.jsonl`, without a last line that a crash tore.

    Args:
      path: the file.
      split: keep only this split.
      timings: whether to keep the fields that differ between two runs of one computation (under 'time/'), and the lines
        that have no others.

    Raises:
      ValueError: a line other than the last cannot be read.
    """
    rows = []
    for number, row, text in _parse(pathlib.Path(path)):
        if row is None:
            if text.endswith("\n"):
                raise ValueError(f"{path}, line {number}, is not a JSON object: {text[:80]!r}.")
            continue
        if split is None or row["split"] == split:
            kept = {k: v for k, v in row.items() if timings or not k.startswith(TIME_PREFIX)}
            if timings or kept.keys() - {"step", "split"} or kept == row:
                rows.append(kept)
    return rows


def _parse(path: pathlib.Path) -> Iterator[tuple[int, dict[str, Any] | None, str]]:
    """(line number, row, text) of each line; the row is None where the line cannot be read or has no end."""
    with path.open(encoding="utf-8", errors="replace", newline="\n") as file:
        for number, text in enumerate(file, start=1):
            try:
                row = json.loads(text) if text.endswith("\n") else None
            except ValueError:
                row = None
            yield number, row if isinstance(row, dict) and {"step", "split"} <= row.keys() else None, text


def _take_back(path: pathlib.Path, step: int) -> None:
    """Drops the lines after `step`, in one atomic rewrite, and only if there are any."""
    if not path.exists():
        return
    lines = list(_parse(path))
    kept = [text for _, row, text in lines if row is not None and row["step"] <= step]
    if len(kept) == len(lines):
        return
    unreadable = [text for _, row, text in lines if row is None and text.endswith("\n")]
    if unreadable:
        with path.with_name(path.name + ".unreadable").open("a", encoding="utf-8") as aside:
            aside.writelines(unreadable)
    temporary = path.with_name(path.name + ".tmp")
    with temporary.open("w", encoding="utf-8") as file:
        file.writelines(kept)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
