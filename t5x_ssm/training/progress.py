"""What a person watching the run sees: a bar on a terminal, now and then a line elsewhere, one process only."""

import collections
import math
import sys
import time
from collections.abc import Callable, Mapping
from typing import NamedTuple, TextIO

import tqdm

_LN2 = math.log(2.0)


class _Step(NamedTuple):
    """What is remembered of a step: when it was done, its nats or hits, and how many targets and tokens it had."""

    step: int
    time: float
    quality: float
    weights: float
    tokens: float


class Progress:
    """Step, loss, tokens per second and time left.

    The loss is in bits per byte where the bytes of a token are known, otherwise in nats per token; a classifier's accuracy
    takes its place. Loss and speed are means over the last `window` steps.
    """

    def __init__(
        self,
        total_steps: int,
        start_step: int = 0,
        *,
        bytes_per_token: float | None = None,
        enabled: bool = True,
        stream: TextIO | None = None,
        line_seconds: float = 10.0,
        window: int = 50,
        clock: Callable[[], float] = time.monotonic,
    ):
        """Starts showing progress.

        Args:
          total_steps: the step at which the run ends.
          start_step: the step it goes on from.
          bytes_per_token: bytes of text per token, on average; 1 for a byte vocabulary.
          enabled: False on all processes but one; then nothing is shown.
          stream: where to; stderr if None.
          line_seconds: seconds between lines where there is no terminal.
          window: steps over which loss and speed are averaged.
          clock: the time in seconds.
        """
        self._total = total_steps
        self._step = start_step
        self._bytes_per_token = bytes_per_token
        self._enabled = enabled
        self._stream = sys.stderr if stream is None else stream
        self._clock = clock
        self._recent: collections.deque[_Step] = collections.deque(maxlen=window + 1)
        self._shown_at = -math.inf
        self._shown_step: int | None = None
        self._classifies = False
        terminal = enabled and getattr(self._stream, "isatty", lambda: False)()
        self._interval = 0.1 if terminal else line_seconds
        self._bar = None
        if terminal:
            self._bar = tqdm.tqdm(
                total=total_steps,
                initial=start_step,
                file=self._stream,
                dynamic_ncols=True,
                bar_format="{percentage:3.0f}%|{bar}| {desc}",
            )

    def update(self, step: int, metrics: Mapping[str, float]) -> None:
        """Shows that `step` is done.

        Args:
          step: the step.
          metrics: the step's host values; 'nats' (or else 'correct'), 'weights' and 'tokens' (or else 'weights') are read.
        """
        if not self._enabled:
            return
        now = self._clock()
        skipped = metrics.get("skipped", 0.0) > 0
        self._classifies = "nats" not in metrics and "correct" in metrics
        quality = math.nan if skipped else metrics.get("correct" if self._classifies else "nats", math.nan)
        weights = metrics.get("weights", 0.0)
        self._step = step
        self._recent.append(_Step(step, now, quality, weights, metrics.get("tokens", weights)))
        if now - self._shown_at >= self._interval:
            self._show(now)

    def message(self, text: str) -> None:
        """Prints a line without tearing the bar."""
        if not self._enabled:
            return
        if self._bar is not None:
            self._bar.write(text, file=self._stream)
        else:
            print(text, file=self._stream, flush=True)

    def close(self) -> None:
        """Shows the last step, if it is not shown yet, and ends the bar."""
        if not self._enabled:
            return
        if self._recent and self._shown_step != self._step:
            self._show(self._clock())
        if self._bar is not None:
            self._bar.close()

    def _show(self, now: float) -> None:
        self._shown_at, self._shown_step = now, self._step
        if self._bar is None:
            print(self._text(), file=self._stream, flush=True)
        else:
            self._bar.n = self._step
            self._bar.set_description_str(self._text(), refresh=False)
            self._bar.refresh()

    def _text(self) -> str:
        parts = [f"step {self._step:,}/{self._total:,}", self._loss()]
        first, last = self._recent[0], self._recent[-1]
        seconds = last.time - first.time
        # Tokens of the first entry were worked on before the clock was first read.
        tokens = sum(entry.tokens for entry in list(self._recent)[1:])
        if seconds > 0:
            parts.append(f"{_short(tokens / seconds)} tokens/s")
            parts.append(f"{_duration((self._total - last.step) * seconds / (last.step - first.step))} left")
        return "  ".join(part for part in parts if part)

    def _loss(self) -> str:
        finite = [entry for entry in self._recent if math.isfinite(entry.quality)]
        weights = sum(entry.weights for entry in finite)
        if not weights > 0:
            return ""
        mean = sum(entry.quality for entry in finite) / weights
        if self._classifies:
            return f"{mean:.3f} accuracy"
        nats = mean
        if self._bytes_per_token:
            return f"{nats / _LN2 / self._bytes_per_token:.3f} bits/byte"
        return f"{nats:.3f} nats/token"


def _short(number: float) -> str:
    """1234567 as '1.23M'."""
    for limit, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if number >= limit:
            return f"{number / limit:.3g}{unit}" if number < 1000 * limit else f"{number / limit:.0f}{unit}"
    return f"{number:.3g}"


def _duration(seconds: float) -> str:
    """Seconds as 'm:ss' or 'h:mm:ss'."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"
