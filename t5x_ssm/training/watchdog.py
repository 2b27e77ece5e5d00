"""Ends a run that stands still, and says where it stood.

A device that hangs, a collective that a dead process never joins, a file system that does not answer: none of them raises.
A process that leaves with an error is started again by its launcher; one that hangs holds a whole pod.
"""

import faulthandler
import os
import sys
import threading
import time

STATUS = 75  # EX_TEMPFAIL of sysexits.h: the same command may succeed when it is started again.


class Watchdog:
    """While entered, ends the process when `beat` has not been called for `seconds`; None never does."""

    def __init__(self, seconds: float | None, setting: str):
        """`setting` is what the message names."""
        self._seconds, self._setting = seconds, setting
        self._last = time.monotonic()
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def __enter__(self) -> "Watchdog":
        self.beat()
        if self._seconds is not None:
            self._thread.start()
        return self

    def __exit__(self, *_) -> None:
        self._end.set()

    def beat(self) -> None:
        """Says that the run moves."""
        self._last = time.monotonic()

    def _watch(self) -> None:
        while not self._end.wait(max(self._last + self._seconds - time.monotonic(), 0.01)):
            if time.monotonic() - self._last < self._seconds:
                continue
            print(
                f"No step has finished for {self._seconds:g} s ({self._setting}); this process ends with status {STATUS}. "
                "Its threads are at:",
                file=sys.__stderr__,
                flush=True,
            )
            faulthandler.dump_traceback(sys.__stderr__)
            os._exit(STATUS)
