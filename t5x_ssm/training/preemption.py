"""Being asked to stop: SIGTERM and SIGINT let the current step finish, so that the loop can save and leave."""

import signal
import threading

import jax

from t5x_ssm.training import consensus


class StopRequest:
    """Listens for a request to stop while it is entered as a context.

    A second signal of the same kind acts as it did before, so an impatient user is not locked in.
    """

    SIGNALS = (signal.SIGTERM, signal.SIGINT)

    def __init__(self):
        self._event = threading.Event()
        self._previous: dict[int, object] = {}
        self.signal_name = ""

    def __enter__(self) -> "StopRequest":
        # Python delivers signals to the main thread only; elsewhere (in a notebook's worker, say) nobody listens.
        if threading.current_thread() is threading.main_thread():
            self._previous = {number: signal.signal(number, self._receive) for number in self.SIGNALS}
        return self

    def __exit__(self, *_):
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous = {}

    def _receive(self, number, frame):
        del frame
        self.signal_name = signal.Signals(number).name
        self._event.set()
        signal.signal(number, self._previous.get(number) or signal.SIG_DFL)

    def agreed(self) -> bool:
        """Whether any process was asked to stop. A collective when there are several processes."""
        if jax.process_count() == 1:
            return self._event.is_set()
        return any(consensus.gather_json(self._event.is_set()))
