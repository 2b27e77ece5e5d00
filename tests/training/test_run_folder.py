"""Whose a run folder is, and which checkpoint a path means."""

import json
import pathlib

import pytest

from t5x_ssm.errors import CheckpointError, RunFolderError
from t5x_ssm.training import run_folder

SETTINGS = {"network.num_layers": "12", "optimizer.learning_rate": "0.001", "seed": "0"}


def add_checkpoint(folder: pathlib.Path, step: int) -> pathlib.Path:
    path = folder / f"checkpoint_{step}"
    (path / "state").mkdir(parents=True)
    return path


def test_a_folder_belongs_to_the_configuration_that_wrote_its_checkpoints(tmp_path):
    folder = tmp_path / "not" / "there" / "yet"
    run_folder.check_run_folder(folder, SETTINGS)
    add_checkpoint(folder, 10)
    run_folder.check_run_folder(folder, dict(reversed(SETTINGS.items())))
    other = {"network.num_layers": "24", "seed": "0", "data.task": "books"}
    with pytest.raises(RunFolderError) as error:
        run_folder.check_run_folder(folder, other)
    lines = str(error.value).splitlines()
    assert lines[1:4] == [
        "  data.task: (not set) there, books here",
        "  network.num_layers: 12 there, 24 here",
        "  optimizer.learning_rate: 0.001 there, (not set) here",
    ]
    assert "seed" not in str(error.value) and "MODEL_DIR" in lines[0] and "another MODEL_DIR" in lines[-1]
    assert json.loads((folder / "run.json").read_text())["description"] == SETTINGS


def test_long_lists_of_differences_are_cut(tmp_path):
    run_folder.check_run_folder(tmp_path, {f"key{i:02}": "a" for i in range(30)})
    add_checkpoint(tmp_path, 1)
    with pytest.raises(RunFolderError, match=r"key19: a there(.|\n)*\.\.\. and 10 more"):
        run_folder.check_run_folder(tmp_path, {f"key{i:02}": "b" for i in range(30)})


def test_a_folder_without_checkpoints_is_taken_over(tmp_path):
    run_folder.check_run_folder(tmp_path, {"seed": "1"})
    (tmp_path / "checkpoint_5.orbax-checkpoint-tmp").mkdir()
    (tmp_path / "run.json.tmp").write_text("cut sho")
    run_folder.check_run_folder(tmp_path, SETTINGS)
    assert json.loads((tmp_path / "run.json").read_text())["description"] == SETTINGS


def test_checkpoints_set_aside_still_hold_the_folder(tmp_path):
    run_folder.check_run_folder(tmp_path, SETTINGS)
    (tmp_path / "bad" / "checkpoint_5-0").mkdir(parents=True)
    with pytest.raises(RunFolderError, match="seed: 0 there, 1 here"):
        run_folder.check_run_folder(tmp_path, SETTINGS | {"seed": "1"})


@pytest.mark.parametrize("content", [None, "", "{}", '{"description": 3}', '{"descr'])
def test_checkpoints_of_an_unknown_run_are_refused(tmp_path, content):
    add_checkpoint(tmp_path, 1)
    if content is not None:
        (tmp_path / "run.json").write_text(content)
    with pytest.raises(RunFolderError, match=r"run\.json"):
        run_folder.check_run_folder(tmp_path, SETTINGS)
    assert (tmp_path / "checkpoint_1").exists()


def test_a_folder_that_cannot_be_made_is_a_clear_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(RunFolderError, match=r"MODEL_DIR=.*file"):
        run_folder.check_run_folder(tmp_path / "file" / "run", SETTINGS)


def test_find_checkpoint(tmp_path):
    for step in (9, 10, 2):
        add_checkpoint(tmp_path, step)
    (tmp_path / "checkpoint_11.orbax-checkpoint-tmp" / "state").mkdir(parents=True)
    (tmp_path / "checkpoint_best").mkdir()
    assert run_folder.checkpoint_steps(tmp_path) == [2, 9, 10]
    assert run_folder.find_checkpoint(tmp_path).name == "checkpoint_10"
    assert run_folder.find_checkpoint(tmp_path / "checkpoint_9").name == "checkpoint_9"
    assert run_folder.find_checkpoint(tmp_path / "checkpoint_9", "specific").name == "checkpoint_9"
    with pytest.raises(CheckpointError, match=r"specific.*checkpoint_10"):
        run_folder.find_checkpoint(tmp_path, "specific")
    with pytest.raises(CheckpointError, match="does not exist"):
        run_folder.find_checkpoint(tmp_path / "checkpoint_7")
    with pytest.raises(CheckpointError, match="holds no checkpoint"):
        run_folder.find_checkpoint(tmp_path / "checkpoint_best")
    (tmp_path / "checkpoint_best" / "checkpoint").write_bytes(b"\x80")
    with pytest.raises(CheckpointError, match="former format"):
        run_folder.find_checkpoint(tmp_path / "checkpoint_best")


def test_set_aside_deletes_nothing(tmp_path):
    for number in range(2):
        path = add_checkpoint(tmp_path, 3)
        (path / "state" / "data").write_text(f"content {number}")
        line = run_folder.set_aside(path, f"reason {number}")
        assert f"reason {number}" in line and not path.exists()
    assert run_folder.set_aside_checkpoints(tmp_path) == ["checkpoint_3-0", "checkpoint_3-1"]
    for number in range(2):
        assert (tmp_path / f"bad/checkpoint_3-{number}/state/data").read_text() == f"content {number}"
        assert (tmp_path / f"bad/checkpoint_3-{number}.reason.txt").read_text() == f"reason {number}\n"
