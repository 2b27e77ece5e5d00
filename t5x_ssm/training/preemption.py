"""Being asked to stop: SIGTERM and SIGINT let the current step finish, so that the loop can save and leave.

Before the first step there is nothing to save, and a compiler may keep Python from noticing a signal for minutes, longer
than a scheduler waits. So SIGTERM then ends the process at once, from a thread of its own.
"""

import os
import signal
import sys
import threading

import jax

from t5x_ssm.training import consensus

STARTING = (
    "{}: stopped before this start took a step, so there is nothing new to save. Start the same command again to go on."
)


class StopRequest:
    """Listens for a request to stop while it is entered as a context, until then for `hold`.

    From `hold` on, a second Ctrl-C acts as it did before, so that an impatient user is not locked in. A second SIGTERM
    does nothing, for launchers pass one on while the process group receives it as well.
    """

    def __init__(self):
        self._event = threading.Event()
        self._previous: dict[int, object] = {}
        self._wakeup: tuple[int, int] | None = None
        self._others: consensus.LateAny | None = None
        self.signal_name = ""

    def __enter__(self) -> "StopRequest":
        # Python delivers signals to the main thread only; elsewhere (in a notebook's worker, say) nobody listens.
        if threading.current_thread() is threading.main_thread():
            read, write = os.pipe()
            os.set_blocking(write, False)
            # The signal's number arrives here even while the main thread is inside a compiler.
            self._wakeup = (write, signal.set_wakeup_fd(write, warn_on_full_buffer=False))
            threading.Thread(target=_leave_on_sigterm, args=(read,), name="stop-request", daemon=True).start()
            self._previous[signal.SIGTERM] = signal.signal(signal.SIGTERM, self._receive)
        return self

    def hold(self) -> None:
        """From now on a request waits for the loop to ask for it. Further calls do nothing."""
        if self._wakeup is not None:
            self._end_watch()
            self._previous[signal.SIGINT] = signal.signal(signal.SIGINT, self._receive)

    def __exit__(self, *_):
        if self._wakeup is not None:
            self._end_watch()
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous = {}

    def _end_watch(self) -> None:
        write, previous = self._wakeup
        self._wakeup = None
        signal.set_wakeup_fd(previous)
        os.close(write)

    def _receive(self, number, frame):
        del frame
        self.signal_name = signal.Signals(number).name
        self._event.set()
        if number == signal.SIGINT:
            signal.signal(number, self._previous[number])

    def agreed(self) -> bool:
        """Whether any process was asked to stop; all get the same answer at the same call.

        With several processes it is a collective, and the answer comes a few calls late (see `consensus.LateAny`).
        """
        if jax.process_count() == 1:
            return self._event.is_set()
        if self._others is None:
            self._others = consensus.LateAny()
        return self._others.ask(self._event.is_set())


def _leave_on_sigterm(read: int) -> None:
    """Reads the numbers of signals until the pipe ends; ends the process at the first SIGTERM."""
    with open(read, "rb", buffering=0) as pipe:
        while number := pipe.read(1):
            if number[0] == signal.SIGTERM:
                print(STARTING.format("SIGTERM"), file=sys.stderr, flush=True)
                os._exit(0)
