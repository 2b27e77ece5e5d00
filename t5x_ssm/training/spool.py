"""Files that grow, of a run folder in an object store: they are written on this machine and copied there.

`metrics.jsonl`, `goodput.json` and TensorBoard's events are appended to, or replaced with every line of history, and a store
takes only whole files. So process 0 has them in a folder of its own, fetched at the start, and copies those that have changed
before every checkpoint and otherwise every `UPLOAD_SECONDS`, from a thread, so that training does not wait.

A run that is killed loses nothing by it once it is started again: what came before its checkpoint is in the store, and the lines
after that are written anew. If it is never started again, the lines since the last copy are missing.
"""

import pathlib
import tempfile
import threading
import time
from collections.abc import Callable, Sequence

from absl import logging

from t5x_ssm.errors import RunFolderError
from t5x_ssm.training import places

UPLOAD_SECONDS = 30.0
# Of all time, the part that copying in the background may take: long histories are copied less often.
_SHARE = 0.1


class Spool:
    """The files of this process that grow, while it is entered. Of a folder of a file system they are in their place.

    Attributes:
      folder: where they are written.
    """

    def __init__(
        self,
        run_folder: places.Place,
        names: Sequence[str],
        check: Callable[[], None] = lambda: None,
        enabled: bool = True,
    ):
        """Fetches the files as they are in the store.

        Args:
          run_folder: where they belong.
          names: of the files that an earlier start may have left, and this one goes on with.
          check: raises RunFolderError when they are no longer this start's to write.
          enabled: False on all processes but one; then nothing is fetched or copied.
        """
        self._there = run_folder if enabled and places.is_store(run_folder) else None
        self._check = check
        self.folder = run_folder
        self._copied: dict[str, tuple[int, int]] = {}
        self._copying = threading.Lock()
        self._end = threading.Event()
        if self._there is None:
            return
        self._temporary = tempfile.TemporaryDirectory(prefix="t5x_ssm-")
        self.folder = pathlib.Path(self._temporary.name)
        with places.reached(run_folder, "MODEL_DIR"):
            for name in names:
                if (run_folder / name).exists():
                    (self.folder / name).write_bytes((run_folder / name).read_bytes())
                    self._copied[name] = _state(self.folder / name)
        self._thread = threading.Thread(target=self._copy_now_and_then, name="spool", daemon=True)

    def __enter__(self) -> "Spool":
        if self._there is not None:
            self._thread.start()
        return self

    def __exit__(self, kind, *_) -> None:
        if self._there is None:
            return
        self._end.set()
        self._thread.join()
        try:
            self.upload()
        except RunFolderError as error:
            if kind is None:
                raise
            logging.error("%s", error)  # What ended the run says more.
        finally:
            self._temporary.cleanup()

    def upload(self) -> None:
        """Copies what has changed, and returns when it is in the store.

        Raises:
          RunFolderError: the store cannot be reached, or another start has taken the folder over.
        """
        if self._there is None:
            return
        with self._copying, places.reached(self._there, "MODEL_DIR"):
            changed = {
                path.name: state
                for path in sorted(self.folder.iterdir())
                if path.is_file() and path.suffix != ".tmp" and (state := _state(path)) != self._copied.get(path.name)
            }
            self._check()
            for name, state in changed.items():
                places.copy(self.folder / name, self._there / name)
                self._copied[name] = state

    def _copy_now_and_then(self) -> None:
        pause = UPLOAD_SECONDS
        while not self._end.wait(pause):
            began = time.monotonic()
            try:
                self.upload()
            except RunFolderError as error:
                logging.warning("%s", error)  # The next save meets it in the main thread, if it lasts.
            pause = max(UPLOAD_SECONDS, (time.monotonic() - began) / _SHARE)


def _state(path: pathlib.Path) -> tuple[int, int]:
    """What tells one content of a file from the next."""
    found = path.stat()
    return found.st_size, found.st_mtime_ns
