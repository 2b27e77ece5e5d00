"""Real runs of several processes, as `python -m launch.local` starts them."""

import os
import pathlib
import re
import shutil
import signal
import sys
import time

import numpy as np
import pytest
from training_command import Command, arguments

from t5x_ssm.training.metrics import history
from t5x_ssm.training.run_folder import checkpoint_steps

pytestmark = pytest.mark.slow

SETTINGS = {"EVAL_PERIOD": 0, "TRAIN_STEPS": 8, "checkpoints__SaveCheckpointConfig__period": 4}


class Run(Command):
    """`launch.local` with a training command, or the training command alone on as many devices."""

    def __init__(self, given, *, log, processes=1, devices=1, **environment):
        flags = f"--xla_force_host_platform_device_count={devices}"
        module = ["t5x_ssm.train", *given]
        if processes > 1:
            module = ["launch.local", f"--processes={processes}", f"--devices_per_process={devices}", "--", *given]
        super().__init__(given, log=log, module=module, XLA_FLAGS=flags, **environment)


def finished(given, **keywords):
    status, text = Run(given, **keywords).finish()
    assert status == 0, text
    return text


def curves(model_dir: pathlib.Path) -> list[dict]:
    return history(model_dir / "metrics.jsonl", timings=False)


def assert_equal_curves(found, expected):
    assert [(line["step"], line["split"]) for line in found] == [(line["step"], line["split"]) for line in expected]
    for one, other in zip(found, expected, strict=True):
        assert one.keys() == other.keys()
        for name in one.keys() - {"split"}:
            np.testing.assert_allclose(one[name], other[name], rtol=1e-5, err_msg=name)


@pytest.fixture(scope="module")
def alone(tmp_path_factory, training_caches):
    """The run of one process and four devices."""
    folder = tmp_path_factory.mktemp("alone")
    finished(arguments(folder / "run", **SETTINGS), log=folder / "log.txt", devices=4, **training_caches)
    return folder / "run"


@pytest.fixture(scope="module")
def two(tmp_path_factory, training_caches):
    """The same run of two processes with two devices each."""
    folder = tmp_path_factory.mktemp("two")
    keywords = {"processes": 2, "devices": 2, **training_caches}
    finished(arguments(folder / "run", **SETTINGS), log=folder / "log.txt", **keywords)
    return folder / "run"


def test_two_processes_train_as_one_does(alone, two):
    assert [line["step"] for line in curves(two) if line["split"] == "train"] == [4, 8]
    assert_equal_curves(curves(two), curves(alone))
    assert checkpoint_steps(two) == [4, 8]


@pytest.mark.nightly
def test_four_processes_train_as_one_does(tmp_path, training_caches, alone):
    keywords = {"processes": 4, "devices": 1, **training_caches}
    finished(arguments(tmp_path / "run", **SETTINGS), log=tmp_path / "log.txt", **keywords)
    assert_equal_curves(curves(tmp_path / "run"), curves(alone))


@pytest.mark.parametrize(
    ("processes", "devices", "mesh"),
    [
        (1, 4, {"data": 1, "fsdp": 2, "model": 2}),
        pytest.param(1, 1, {}, marks=pytest.mark.nightly),
        pytest.param(4, 2, {"data": 2, "fsdp": 2, "model": 2}, marks=pytest.mark.nightly),
        # One axis over both processes, which then hold the same rows.
        pytest.param(2, 1, {"data": 1, "model": 2}, marks=pytest.mark.nightly),
        pytest.param(2, 1, {"data": 1, "sequence": 2}, marks=pytest.mark.nightly),
    ],
)
def test_another_mesh_and_number_of_processes_goes_on(tmp_path, training_caches, alone, two, processes, devices, mesh):
    run = tmp_path / "run"
    shutil.copytree(two, run)
    shutil.rmtree(run / "checkpoint_8")
    axes = {f"mesh__MeshConfig__{axis}": size for axis, size in mesh.items()}
    keywords = {"processes": processes, "devices": devices, **training_caches}
    text = finished(arguments(run, **SETTINGS | axes), log=tmp_path / "log.txt", **keywords)
    assert "from step 4 of 8" in text
    assert_equal_curves(curves(run), curves(alone))


def children(command: Command) -> list[int]:
    """Process ids by process index."""
    found = {}
    for folder in pathlib.Path("/proc").iterdir():
        if not folder.name.isdigit():
            continue
        try:
            parent = int(re.search(r"PPid:\s+(\d+)", (folder / "status").read_text())[1])
            if parent == command.process.pid:
                index = re.search(rb"JAX_PROCESS_ID=(\d+)", (folder / "environ").read_bytes())
                found[int(index[1])] = int(folder.name)
        except (OSError, TypeError):
            continue
    return [found[index] for index in sorted(found)]


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="finds processes in /proc")
def test_a_signal_to_one_process_saves_on_all_and_a_dead_one_stops_all(tmp_path, training_caches):
    long = SETTINGS | {"TRAIN_STEPS": 100_000, "checkpoints__SaveCheckpointConfig__period": None}
    long |= {"trainer__TrainerConfig__log_period": 1}
    given = arguments(tmp_path / "run", **long)
    keywords = {"processes": 2, "devices": 2, **training_caches}

    def steps() -> int:
        file = tmp_path / "run/metrics.jsonl"
        return file.read_text().count("\n") if file.exists() else 0

    command = Run(given, log=tmp_path / "0.txt", **keywords)
    try:
        assert command.until(lambda: steps() >= 3), command.text()
        os.kill(children(command)[1], signal.SIGTERM)
        status, text = command.finish(60)
        assert status == 0, text
        saved = [int(step) for step in re.findall(r"at step (\d+): saved", text)]
        assert len(saved) == 2 and saved[0] == saved[1]
        assert "SIGTERM at step" in text and "A request to another process at step" in text
        assert checkpoint_steps(tmp_path / "run") == saved[:1]

        command, before = Run(given, log=tmp_path / "1.txt", **keywords), steps()
        assert command.until(lambda: steps() > before + 3), command.text()
        began = time.monotonic()
        os.kill(children(command)[1], signal.SIGKILL)
        status, text = command.finish(60)
        assert time.monotonic() - began < 30
        assert status == 128 + signal.SIGKILL
        assert "process 1 was ended by SIGKILL; stopping the others" in text
        assert f"from step {saved[0]} of" in text
        assert children(command) == []
    finally:
        command.kill()
