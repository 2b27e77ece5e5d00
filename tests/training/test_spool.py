"""Files that grow, of a run folder in a store: what is there when a run is killed, and what the next start finds."""

import time

import pytest

from t5x_ssm.errors import RunFolderError
from t5x_ssm.training import places, spool
from t5x_ssm.training.metrics import MetricsLog, history

METRICS = "metrics.jsonl"
URL = "gs://bucket/run"


def test_a_killed_start_loses_what_came_after_its_last_upload(store, tmp_path):
    first = spool.Spool(places.place(URL), [METRICS])
    log = MetricsLog(first.folder / METRICS, tensorboard_dir=first.folder)
    for step in (1, 2, 3):
        log.write(step, {"loss": step / 3})
        if step == 2:
            log.sync()
            first.upload()
    written = (first.folder / METRICS).read_bytes()
    assert store.objects[f"bucket/run/{METRICS}"] == b"".join(written.splitlines(keepends=True)[:2])
    events = next(path for path in first.folder.iterdir() if path.name.startswith("events"))
    assert events.read_bytes().startswith(store.objects[f"bucket/run/{events.name}"])

    with spool.Spool(places.place(URL), [METRICS, "goodput.json"]) as second:
        assert not (second.folder / "goodput.json").exists()
        again = MetricsLog(second.folder / METRICS, resume_step=2)
        for step in (3, 4):
            again.write(step, {"loss": step / 3})
        again.close()
    assert not second.folder.exists()
    (tmp_path / METRICS).write_bytes(store.objects[f"bucket/run/{METRICS}"])
    assert [row["step"] for row in history(tmp_path / METRICS)] == [1, 2, 3, 4]


def test_files_are_copied_now_and_then(store, monkeypatch):
    monkeypatch.setattr(spool, "UPLOAD_SECONDS", 0.02)
    with spool.Spool(places.place(URL), []) as files:
        (files.folder / "goodput.json").write_text("{}")
        (files.folder / "goodput.json.tmp").write_text("{")
        give_up = time.monotonic() + 20
        while not store.objects and time.monotonic() < give_up:
            time.sleep(0.01)
        assert store.objects == {"bucket/run/goodput.json": b"{}"}


def test_files_of_a_folder_that_a_later_start_has_taken_are_left_alone(store):
    store.write(f"bucket/run/{METRICS}", b"earlier\n")

    def taken():
        raise RunFolderError("a later start")

    files = spool.Spool(places.place(URL), [METRICS], taken)
    (files.folder / METRICS).write_bytes(b"earlier\nlater\n")
    with pytest.raises(RunFolderError, match="a later start"):
        files.upload()
    assert store.objects == {f"bucket/run/{METRICS}": b"earlier\n"}


def test_in_a_file_system_files_are_in_their_place(tmp_path):
    with spool.Spool(tmp_path, [METRICS]) as files:
        assert files.folder == tmp_path
        files.upload()
    assert not [*tmp_path.iterdir()]
