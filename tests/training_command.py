"""The real command `python -m t5x_ssm.train`, at a size that is compiled and trained in seconds."""

import contextlib
import os
import pathlib
import signal
import subprocess
import sys
import time

import numpy as np
from token_caches import write_mixture

ROOT = pathlib.Path(__file__).resolve().parent.parent
MIXTURE = "prose_and_code"
SETTINGS = {
    "MIXTURE_OR_TASK_NAME": MIXTURE,
    "TASK_FEATURE_LENGTHS": {"targets": 32},
    "BATCH_SIZE": 4,
    "TRAIN_STEPS": 12,
    "WARMUP_STEPS": 2,
    "EVAL_STEPS": 2,
    "EVAL_PERIOD": 6,
    "decoder.Decoder.embed_dim": 16,
    "decoder.Decoder.num_layers": 1,
    "gss.GSS.state_size": 4,
    "trainer.TrainerConfig.log_period": 4,
    "trainer.TrainerConfig.tensorboard": False,
}


def write_corpus(root: pathlib.Path, **mixture) -> None:
    """A token cache of two tasks with uneven rates, under the name `MIXTURE`; it is not made by seqio."""
    random = np.random.default_rng(0)

    def documents(count):
        return [[*random.integers(60, 90, random.integers(5, 90)).tolist(), 1] for _ in range(count)]

    tasks = {task: {"train": documents(120), "validation": documents(12)} for task in ("prose", "code")}
    write_mixture(root, MIXTURE, tasks, rates=[2.0, 1.0], **mixture)


def arguments(model_dir, **settings) -> list[str]:
    """Arguments of a tiny run; a setting's dots are written as two underscores."""
    named = {name.replace("__", "."): value for name, value in settings.items()}
    bindings = {"MODEL_DIR": model_dir} | SETTINGS | named
    return ["--gin_file=quickstart.gin", *(f"--gin.{name}={value}" for name, value in bindings.items())]


class Command:
    """A training process in a process group of its own; its standard error goes to a file."""

    def __init__(self, given: list[str], *, log: pathlib.Path, module: list[str] | None = None, **environment: object):
        """`module` runs another module, with its own arguments, than the training command."""
        self.log = log
        with log.open("wb") as file:
            self.process = subprocess.Popen(
                [sys.executable, "-m", *(module or ["t5x_ssm.train", *given])],
                env={**os.environ, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
                | {name: str(value) for name, value in environment.items()},
                stdout=file,
                stderr=file,
                start_new_session=True,
            )

    def running(self) -> bool:
        return self.process.poll() is None

    def kill(self) -> None:
        """SIGKILL to the whole group, or what is left of it."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()

    def finish(self, timeout: float = 300.0) -> tuple[int, str]:
        """Waits for the end; returns the exit status and everything that was printed."""
        try:
            status = self.process.wait(timeout)
        except subprocess.TimeoutExpired:
            self.kill()
            raise AssertionError(f"The command did not end in {timeout} s:\n{self.text()}") from None
        return status, self.text()

    def until(self, condition, timeout: float = 300.0) -> bool:
        """Waits until `condition()` is true; False when the process ends before."""
        give_up = time.monotonic() + timeout
        while not condition():
            if not self.running():
                return condition()
            assert time.monotonic() < give_up, f"Nothing came of it in {timeout} s:\n{self.text()}"
            time.sleep(0.001)
        return True

    def text(self) -> str:
        return self.log.read_text(errors="replace")


def run(given: list[str], *, log: pathlib.Path, **environment: object) -> tuple[int, str]:
    """Runs the command to its end."""
    return Command(given, log=log, **environment).finish()
