"""Where files of a run are: a file system, or Google's object store (`gs://bucket/run`).

A path is a `pathlib.Path` of a file system or an `epath.Path` of the store, which has the same methods. Orbax itself finds and
commits checkpoints by `epath`, so it serves the other files too: one client, one set of credentials. It has two backends
for a store, and takes TensorFlow wherever that is installed; here it is told to use gcsfs, for a run must not load TensorFlow
to write a text file. Arrays go through neither: TensorStore has a client of its own.

In a store nothing is appended to, renamed in one step or locked; a file that is written is there whole or not at all, and a
folder is where files are. What this asks of those who write is in `spool` and `run_folder`.
"""

import contextlib
import importlib.util
import os
import pathlib
import shutil
import tempfile
from collections.abc import Iterator

from etils import epath

from t5x_ssm.errors import RunFolderError, UserError

Place = pathlib.Path | epath.Path

# Read at the first use of a path, which comes after this import.
os.environ.setdefault("EPATH_USE_TF", "0")

_SCHEME = "gs://"
_LIBRARIES = ("gcsfs", "google.cloud.storage")  # The second is Orbax's, and comes with the first.


def is_store(path: epath.PathLike) -> bool:
    """Whether a path is of an object store, and not of a file system."""
    return "://" in os.fspath(path)


def place(path: epath.PathLike, setting: str = "path") -> Place:
    """A path that can be read and written.

    Args:
      path: of a file system, relative or not, or `gs://bucket/folder`.
      setting: names it in a message.

    Raises:
      UserError: it is of another store, or the library for this one is missing.
    """
    text = os.fspath(path)
    if not is_store(text):
        return pathlib.Path(text)
    if not text.startswith(_SCHEME) or not text.removeprefix(_SCHEME).strip("/"):
        raise UserError(
            f"{setting} = {text!r}: give a folder of a file system, or {_SCHEME}BUCKET/FOLDER. Other object stores are not "
            "reached."
        )
    if not all(_installed(name) for name in _LIBRARIES):
        raise UserError(f"{setting} = {text!r}: {_SCHEME} needs the library gcsfs; pip install 't5x_ssm[gcs]'.")
    import fsspec

    # A listing that is kept would hide what TensorStore and other processes write.
    fsspec.config.conf.setdefault("gcs", {}).setdefault("use_listings_cache", False)
    return epath.Path(text.rstrip("/"))


def _installed(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except ModuleNotFoundError:  # Of a package around it.
        return False


def located(path: epath.PathLike) -> epath.Path:
    """`path` as Orbax wants it: absolute, unless it is of a store."""
    found = place(path)
    return found if is_store(found) else epath.Path(os.path.abspath(found))


@contextlib.contextmanager
def reached(path: epath.PathLike, setting: str) -> Iterator[None]:
    """Turns what a client of the store raises inside, but for a missing file, into a RunFolderError that names the setting."""
    try:
        yield
    except (UserError, FileNotFoundError):
        raise
    # Every layer of a client has errors of its own.
    except Exception as error:
        if not is_store(path):
            raise
        raise RunFolderError(
            f"{setting} = {os.fspath(path)!r} cannot be reached ({type(error).__name__}: {error}). Does the bucket exist? Log in "
            "with gcloud auth application-default login, or give this machine's service account access to it."
        ) from error


@contextlib.contextmanager
def writing(folder: Place, setting: str) -> Iterator[pathlib.Path]:
    """A folder of this machine whose files are in `folder` at the end: itself, or one whose files are copied to the store.

    They are copied when the block ends with an error, too; nothing of them is left here.

    Args:
      folder: made when it does not exist.
      setting: names it in a message.

    Raises:
      RunFolderError: the store cannot be reached.
    """
    if not is_store(folder):
        folder.mkdir(parents=True, exist_ok=True)
        yield folder
        return
    with tempfile.TemporaryDirectory(prefix="t5x_ssm-") as name:
        local = pathlib.Path(name)
        try:
            yield local
        finally:
            with reached(folder, setting):
                for path in sorted(local.rglob("*")):
                    if path.is_file():
                        copy(path, folder / path.relative_to(local).as_posix())


def copy(source: pathlib.Path, target: epath.Path) -> None:
    """Copies a file of this machine to the store, in place of what has its name there."""
    with source.open("rb") as read, target.open("wb") as write:
        shutil.copyfileobj(read, write, 2**22)


def write_whole(path: Place, text: str) -> None:
    """Writes a small file that a reader finds as it was or as it will be, and never in part."""
    if is_store(path):
        path.write_text(text)
        return
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(text)
    temporary.replace(path)
