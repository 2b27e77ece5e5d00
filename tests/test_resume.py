"""A run that is killed at any moment, and started again with the same command, ends as if nothing had happened.

The real command runs in a process group of its own. The model has dropout, two microbatches, and lines of history at
steps that checkpoints do not fall on.
"""

import os
import pathlib
import random
import re
import signal
import time

import pytest
from stored_runs import stored
from training_command import Command, arguments, run

from t5x_ssm.training.metrics import history
from t5x_ssm.training.run_folder import checkpoint_steps

STEPS = 60
LOG_PERIOD = 7
SETTINGS = {
    "TRAIN_STEPS": STEPS,
    "EVAL_PERIOD": 25,
    "decoder__Decoder__dropout_rate": 0.1,
    "trainer__TrainerConfig__num_microbatches": 2,
    "trainer__TrainerConfig__log_period": LOG_PERIOD,
    "checkpoints__SaveCheckpointConfig__period": 2,
    "checkpoints__SaveCheckpointConfig__keep": 2,
}

pytestmark = pytest.mark.slow


class Starts:
    """Starts of one run, each with a log of its own."""

    def __init__(self, folder: pathlib.Path, environment):
        self.model_dir = folder / "run"
        self._folder, self._environment = folder, environment
        self.commands: list[Command] = []

    def start(self) -> Command:
        log = self._folder / f"start_{len(self.commands)}.txt"
        self.commands.append(Command(arguments(self.model_dir, **SETTINGS), log=log, **self._environment))
        return self.commands[-1]

    def resumed_from(self) -> list[int]:
        """The steps from which later starts went on."""
        texts = (command.text() for command in self.commands)
        return [int(step) for text in texts for step in re.findall(r"Continuing \S+ from step (\d+)", text)]

    def half_written(self) -> set[str]:
        """Names of checkpoints that are being written."""
        if not self.model_dir.exists():
            return set()
        return {name for name in os.listdir(self.model_dir) if ".orbax-checkpoint-tmp" in name}

    def newest(self) -> int:
        return max(checkpoint_steps(self.model_dir), default=0)


def assert_as_if_nothing_had_happened(model_dir: pathlib.Path, reference: pathlib.Path) -> None:
    found, expected = stored(model_dir, STEPS), stored(reference, STEPS)
    assert len(expected["arrays"]) > 20
    assert found["arrays"].keys() == expected["arrays"].keys()
    assert [name for name in expected["arrays"] if found["arrays"][name] != expected["arrays"][name]] == []
    assert found == expected
    lines = history(model_dir / "metrics.jsonl", timings=False)
    assert lines == history(reference / "metrics.jsonl", timings=False)
    train = [line for line in lines if line["split"] == "train"]
    assert [line["step"] for line in train] == [*range(LOG_PERIOD, STEPS, LOG_PERIOD), STEPS]
    assert sum(line["steps"] for line in train) == train[-1]["steps_total"] == STEPS
    assert len({(line["step"], line["split"]) for line in lines}) == len(lines)
    assert checkpoint_steps(model_dir) == checkpoint_steps(reference) == [STEPS - 2, STEPS]
    assert not [name for name in os.listdir(model_dir) if "tmp" in name]


@pytest.fixture(scope="module")
def reference(tmp_path_factory, training_caches):
    """The run that is never interrupted."""
    folder = tmp_path_factory.mktemp("reference")
    status, text = run(arguments(folder / "run", **SETTINGS), log=folder / "log.txt", **training_caches)
    assert status == 0, text
    return folder / "run"


def test_killed_at_any_moment(tmp_path, training_caches, reference):
    seed = random.randrange(1 << 32)
    print(f"seed {seed}")  # Shown if the test fails.
    draw = random.Random(seed)
    starts = Starts(tmp_path, training_caches)

    in_a_write, first_step_after = 0, 0.0
    while in_a_write < 3:
        began = time.monotonic()
        command, newest = starts.start(), starts.newest()
        assert command.until(lambda: starts.newest() > newest), command.text()  # noqa: B023
        first_step_after = time.monotonic() - began
        target = starts.newest() + 2 * draw.randrange(3)
        assert command.until(lambda: starts.newest() >= target and starts.half_written()), command.text()  # noqa: B023
        command.kill()
        in_a_write += bool(starts.half_written())
        assert len(starts.commands) < 9, "the write is over too soon to be met"

    killed = 0
    for _ in range(3):
        command = starts.start()
        # Into the first steps at most: all 60 may take less time than the start.
        moment = time.monotonic() + draw.uniform(0, 1.25 * first_step_after)
        command.until(lambda: time.monotonic() > moment)  # noqa: B023
        killed += command.running()
        command.kill()
    assert killed, "the run ended before it could be killed at a random time"

    status, text = starts.start().finish()
    assert status == 0, text
    assert any(step % LOG_PERIOD for step in starts.resumed_from())
    assert_as_if_nothing_had_happened(starts.model_dir, reference)


def test_asked_to_stop(tmp_path, training_caches, reference):
    starts = Starts(tmp_path, training_caches)
    command = starts.start()
    assert command.until(lambda: starts.newest() >= 4), command.text()
    # Launchers pass the signal on, while the group receives it as well.
    command.process.send_signal(signal.SIGTERM)
    command.process.send_signal(signal.SIGTERM)
    status, text = command.finish()
    assert status == 0, text
    step = int(re.search(r"SIGTERM at step (\d+): saved. Start the same command again to go on", text)[1])
    assert 4 <= step < STEPS
    assert starts.newest() == step

    status, text = starts.start().finish()
    assert status == 0, text
    assert starts.resumed_from() == [step]
    assert_as_if_nothing_had_happened(starts.model_dir, reference)


def test_asked_to_stop_while_compiling(tmp_path, training_caches):
    cold = training_caches | {"JAX_COMPILATION_CACHE_DIR": tmp_path / "xla"}
    starts = Starts(tmp_path, cold)
    command = starts.start()
    assert command.until(lambda: (starts.model_dir / "metrics.jsonl").exists()), command.text()
    time.sleep(1)
    command.process.send_signal(signal.SIGTERM)
    status, text = command.finish()
    assert status == 0, text
    assert text.splitlines()[-1].startswith("SIGTERM: stopped before this start took a step")
    assert "Traceback" not in text
    assert starts.newest() == 0
