"""One start at a time trains in a run folder.

On a file system that is a lock of the operating system on `run.lock`, which it releases when the process ends, however it
ends: a second start is refused. A store has no locks, and a host that was taken away may run on for a while unseen. So there
the last start wins: it writes its name into `run.lock`, and an earlier one that still runs finds it there before it saves, and
leaves.
"""

import contextlib
import errno
import os
import pathlib
import socket
import time
import uuid
from collections.abc import Callable, Iterator

import jax
from absl import logging

from t5x_ssm.errors import RunFolderError
from t5x_ssm.training import consensus, places, run_folder

_LOCK_FILE = "run.lock"
# A process that was killed a moment ago may not be quite gone.
_LOCK_SECONDS = 5.0


@contextlib.contextmanager
def locked(model_dir: places.Place, may_start: Callable[[], None]) -> Iterator[Callable[[], None]]:
    """Keeps other starts from training in a folder, as far as its place can. Process 0 holds it for all.

    Args:
      model_dir: the run folder; made when it does not exist.
      may_start: raises when this start must not train there, which then goes on undisturbed. All processes call it; on a
        file system under the lock.

    Yields:
      A function for process 0, to be called before it writes: raises RunFolderError when a later start has taken over.

    Raises:
      RunFolderError: another process holds it, or the folder cannot be used.
    """
    run_folder.make(model_dir)
    path = model_dir / _LOCK_FILE
    main = jax.process_index() == 0
    if places.is_store(path):
        may_start()
        name = f"{_holder()}, start {uuid.uuid4().hex}"
        consensus.ask_first(lambda: _claim(path, name))
        yield lambda: _check_claim(path, name)
        return
    file = consensus.succeed_together(lambda: _lock(path) if main else None)
    try:
        may_start()
        yield lambda: None
    finally:
        if file is not None:
            os.close(file)


def _holder() -> str:
    return f"process {os.getpid()} on {socket.gethostname()}"


def _claim(path: places.Place, name: str) -> None:
    with places.reached(path.parent, "MODEL_DIR"):
        path.write_text(name + "\n")


def _check_claim(path: places.Place, name: str) -> None:
    with places.reached(path.parent, "MODEL_DIR"):
        holder = path.read_text().strip() if path.exists() else "none"
    if holder != name:
        raise RunFolderError(
            f"A later start trains in MODEL_DIR={path.parent} ({holder}). This one ends without saving once more; what it saved "
            "before is what the later one went on from."
        )


def _lock(path: pathlib.Path) -> int | None:
    """An open, locked file descriptor; None where the file system has no locks."""
    try:
        import fcntl
    except ImportError:  # Windows
        return None
    try:
        file = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    except OSError as e:
        raise RunFolderError(f"MODEL_DIR={path.parent} cannot be used as a run folder: {e}") from e
    give_up = time.monotonic() + _LOCK_SECONDS
    while True:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as e:
            if e.errno in (errno.EAGAIN, errno.EACCES):
                if time.monotonic() < give_up:
                    time.sleep(0.05)
                    continue
                holder = os.pread(file, 1000, 0).decode(errors="replace").strip()
                os.close(file)
                raise RunFolderError(
                    f"Another process trains in MODEL_DIR={path.parent} ({holder or 'unknown'}). Two would spoil each "
                    "other's checkpoints: wait until it ends, or choose another MODEL_DIR."
                ) from None
            logging.warning(
                "MODEL_DIR=%s cannot be locked (%s): make sure no other process trains there.", path.parent, e
            )
            os.close(file)
            return None
        os.ftruncate(file, 0)
        os.pwrite(file, f"{_holder()}\n".encode(), 0)
        return file
