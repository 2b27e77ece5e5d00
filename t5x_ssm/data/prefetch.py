"""A background thread that keeps a few items ready."""

import queue
import threading
import time
from collections.abc import Callable
from typing import Generic, TypeVar

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
        # A daemon, so that a process whose main thread fails can end.
        self._thread = threading.Thread(target=self._run, name="prefetch", daemon=True)
        self._thread.start()

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
