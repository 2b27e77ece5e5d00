"""Reading ahead in a background thread, and what every feed that does so has in common."""

import abc
import atexit
import logging
import queue
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any, Generic, TypeVar

import numpy as np

from t5x_ssm.errors import DataError
from tasks import provenance

logger = logging.getLogger(__name__)

T = TypeVar("T")


class Prefetcher(Generic[T]):
    """Calls `produce(0)`, `produce(1)`, … ahead of its consumer, in one thread.

    An exception in `produce` reaches the consumer after the items made before it, and again on every later call.
    """

    def __init__(self, produce: Callable[[int], T], *, depth: int):
        """Starts at once; at most `depth` items wait, one more is being made."""
        if depth < 1:
            raise ValueError(f"The number of batches to prefetch must be at least 1, but it is {depth}.")
        self._produce = produce
        self._items: queue.Queue[tuple[T | None, BaseException | None]] = queue.Queue(maxsize=depth)
        self._stop = threading.Event()
        self._failure: BaseException | None = None
        self.wait_seconds = 0.0
        # A daemon, because the interpreter waits for other threads before it runs exit functions: nothing would ever
        # stop this one. The exit function stops it in time: a daemon that is cut off in native code aborts the process.
        self._thread = threading.Thread(target=self._run, name="prefetch", daemon=True)
        self._thread.start()
        atexit.register(self.close)

    @property
    def ready(self) -> int:
        """Number of items that wait."""
        return self._items.qsize()

    def next(self) -> T:
        """The next item; waits for it if need be, and adds the time to `wait_seconds`."""
        if self._failure is not None:
            raise self._failure
        if self._stop.is_set():
            raise RuntimeError("next() was called on a closed feed.")
        started = time.perf_counter()
        item, failure = self._items.get()
        self.wait_seconds += time.perf_counter() - started
        if failure is not None:
            self._failure = failure
            raise failure
        return item

    def close(self) -> None:
        """Ends the thread; waits until the item being made is done. A second call does nothing."""
        self._stop.set()
        while not self._items.empty():
            self._items.get_nowait()
        self._thread.join()
        atexit.unregister(self.close)

    def _run(self) -> None:
        index = 0
        while not self._stop.is_set():
            try:
                entry = (self._produce(index), None)
            except BaseException as failure:
                entry = (None, failure)
            while not self._stop.is_set():
                try:
                    self._items.put(entry, timeout=0.1)
                    break
                except queue.Full:
                    continue
            if entry[1] is not None:
                return
            index += 1


class PrefetchedFeed(abc.ABC):
    """A training feed whose batches are made ahead: the position it reports is that of the consumer.

    Attributes:
      vocabulary: description of the vocabulary of the batches' tokens.
      identity: everything that the sequence of batches is a function of, besides the position; JSON-able.
      bytes_per_token: bytes of text that a token stands for on average; None where it is not known.
      counts: what was left out, replaced or cut, by name: in all data, where that was counted when it was prepared, else
        in this process's rows up to the batch that `next()` returned last.
      made_from: under which settings the data was found, places included; a position remembers them, and may go on under others
        while the data is the same.
    """

    bytes_per_token: float | None = None

    def __init__(self, vocabulary: dict[str, Any], identity: dict[str, Any], *, prefetch: int):
        self.vocabulary = vocabulary
        self.identity = identity
        self.counts: dict[str, int] = {}
        self.made_from: dict[str, Any] = {}
        self._depth = prefetch
        self._waited = 0.0
        self._prefetcher: Prefetcher | None = None

    @abc.abstractmethod
    def next(self) -> dict[str, np.ndarray]:
        """This process's rows of the next batch, [batch_size / process_count, length] each."""

    @abc.abstractmethod
    def state(self) -> dict[str, Any]:
        """A JSON-able position that belongs to the batch that `next()` returns next."""

    @abc.abstractmethod
    def restore(self, state: Mapping[str, Any]) -> None:
        """Goes to a position that `state()` gave; DataError if it belongs to other data or settings."""

    def close(self) -> None:
        """Ends the background thread. The feed may be used again; it goes on with the same batch."""
        if self._prefetcher is not None:
            self._prefetcher.close()
            self._waited += self._prefetcher.wait_seconds
            self._prefetcher = None

    @property
    def wait_seconds(self) -> float:
        """Time that `next()` has waited for data, over the feed's life."""
        return self._waited + (self._prefetcher.wait_seconds if self._prefetcher else 0.0)

    @property
    def ready(self) -> int:
        """Batches that wait in the queue now."""
        return self._prefetcher.ready if self._prefetcher else 0

    def __enter__(self) -> "PrefetchedFeed":
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def _check_identity(self, state: Mapping[str, Any]) -> None:
        """Raises DataError if a position belongs to other data or settings; says it if the data has merely moved."""
        moved = provenance.differences(state.get("made_from", {}), self.made_from)
        differing = [name for name in self.identity if state.get(name) != self.identity[name]]
        if differing:
            details = "; ".join(
                [*(f"{n}: saved {state.get(n)!r}, now {self.identity[n]!r}" for n in differing), *moved]
            )
            raise DataError(
                f"The saved data position belongs to another data configuration ({details}). Set these back to go on "
                "with this run, or start one in a new MODEL_DIR."
            )
        for change in moved:
            logger.info("%s; the data is the same.", change)
