"""TensorBoard event files, written by the caller's own thread.

tensorboardX's `SummaryWriter` hands events to a thread whose queue `flush` does not empty, and names files by the second,
so that two runs of one second share a file. Its record writer underneath has neither habit, and is used directly.
"""

import os
import time
from collections.abc import Mapping

from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.proto.summary_pb2 import Summary

FLUSH_SECONDS = 10.0


class EventFile:
    """One event file of scalars."""

    def __init__(self, folder: str | os.PathLike, first_step: int):
        """Creates the file.

        Args:
          folder: its folder; made if missing.
          first_step: TensorBoard forgets what older files of the folder say about this step and later ones.
        """
        os.makedirs(folder, exist_ok=True)
        self._writer = EventsWriter(os.path.join(folder, "events"), filename_suffix=f".{os.getpid()}.{time.time_ns()}")
        start = SessionLog(status=SessionLog.START)
        self._writer.write_event(Event(wall_time=time.time(), step=first_step, session_log=start))
        self.flush()

    def write(self, step: int, scalars: Mapping[str, float]) -> None:
        """Writes scalars by tag; they are on disk at the latest at the next `flush`."""
        values = [Summary.Value(tag=tag, simple_value=value) for tag, value in scalars.items()]
        self._writer.write_event(Event(wall_time=time.time(), step=step, summary=Summary(value=values)))
        if time.monotonic() - self._flushed_at > FLUSH_SECONDS:
            self.flush()

    def flush(self) -> None:
        """Makes everything written so far durable."""
        self._writer.flush()
        self._flushed_at = time.monotonic()

    def close(self) -> None:
        """Flushes and closes."""
        self._writer.close()
