"""Two starts in one run folder: on a file system the second is refused, in a store the first leaves."""

import pytest

from t5x_ssm.errors import RunFolderError
from t5x_ssm.training import folder_lock, places


def may_start():
    """As a start of the right configuration finds it."""


def must_not_start():
    raise RunFolderError("another configuration")


def test_a_second_start_in_a_folder_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(folder_lock, "_LOCK_SECONDS", 0.1)
    with folder_lock.locked(tmp_path / "run", may_start) as check:
        check()
        with pytest.raises(RunFolderError, match=r"Another process trains in MODEL_DIR=\S+run \(process \d+ on"):
            folder_lock.locked(tmp_path / "run", may_start).__enter__()
    with pytest.raises(RunFolderError, match="another configuration"):
        folder_lock.locked(tmp_path / "run", must_not_start).__enter__()
    with folder_lock.locked(tmp_path / "run", may_start) as check:
        check()


def test_in_a_store_the_last_start_that_may_train_wins(store):
    folder = places.place("gs://bucket/run")
    with folder_lock.locked(folder, may_start) as first:
        first()
        with pytest.raises(RunFolderError, match="another configuration"):
            folder_lock.locked(folder, must_not_start).__enter__()
        first()
        with folder_lock.locked(folder, may_start) as second:
            second()
            message = r"A later start trains in MODEL_DIR=gs://bucket/run \(process \d+ on"
            with pytest.raises(RunFolderError, match=message):
                first()
            second()
    # What a killed start has left there keeps nobody out.
    with folder_lock.locked(folder, may_start) as third:
        third()
