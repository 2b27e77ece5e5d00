"""Paths of file systems and of an object store, and what is said where a store cannot be used."""

import pathlib
import sys

import pytest

from t5x_ssm.errors import RunFolderError, UserError
from t5x_ssm.training import places


def test_a_path_of_a_file_system_stays_as_it_is(tmp_path):
    assert places.place("runs/a") == pathlib.Path("runs/a")
    assert isinstance(places.place(tmp_path), pathlib.Path)
    with places.writing(tmp_path / "new", "MODEL_DIR") as folder:
        assert folder == tmp_path / "new" and folder.is_dir()


@pytest.mark.parametrize("path", ["s3://bucket/run", "gs://", "memory://run"])
def test_other_stores_are_refused(path):
    with pytest.raises(UserError, match=rf"MODEL_DIR = '{path}'.*gs://BUCKET/FOLDER"):
        places.place(path, "MODEL_DIR")


@pytest.mark.parametrize("library", ["gcsfs", "google.cloud.storage"])
def test_a_missing_library_is_named_with_what_brings_it(monkeypatch, library):
    monkeypatch.setitem(sys.modules, library, None)
    with pytest.raises(UserError, match=r"MODEL_DIR = 'gs://bucket/run'.*pip install 't5x_ssm\[gcs\]'"):
        places.place("gs://bucket/run", "MODEL_DIR")


def test_files_are_read_as_others_have_written_them(store):
    path = places.place("gs://bucket/run/") / "config.gin"
    assert not path.exists()
    places.write_whole(path, "first")
    assert path.read_text() == "first" and [*path.parent.iterdir()] == [path]
    store.write("bucket/run/config.gin", b"another process's")
    store.write("bucket/run/other", b"")
    assert path.read_text() == "another process's"
    assert sorted(found.name for found in path.parent.iterdir()) == ["config.gin", "other"]


def test_what_is_written_here_is_copied_after_an_error_too(store):
    with (
        pytest.raises(ZeroDivisionError),
        places.writing(places.place("gs://bucket/run/bad_batches"), "MODEL_DIR") as folder,
    ):
        (folder / "deep").mkdir()
        (folder / "deep" / "batch").write_bytes(b"rows")
        raise ZeroDivisionError
    assert store.objects == {"bucket/run/bad_batches/deep/batch": b"rows"}
    assert not folder.exists()


def test_a_store_without_access_is_named(store):
    store.forbidden = ("POST",)
    folder = places.place("gs://bucket/run", "MODEL_DIR")
    message = r"MODEL_DIR = 'gs://bucket/run' cannot be reached(?s:.*)no access.*gcloud"
    with pytest.raises(RunFolderError, match=message), places.reached(folder, "MODEL_DIR"):
        places.write_whole(folder / "run.json", "{}")
    with pytest.raises(ZeroDivisionError), places.reached("runs/a", "MODEL_DIR"):
        raise ZeroDivisionError
