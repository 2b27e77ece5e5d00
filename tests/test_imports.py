"""Who may import whom: rooms only from rooms below, and training without TensorFlow, seqio or gin."""

import ast
import os
import pathlib
import subprocess
import sys

import pytest
from training_command import ROOT, arguments

PACKAGE = ROOT / "t5x_ssm"
# From the ground up. Everything may import the package's errors.
FLOORS = ("ssm", "parallel", "layers", "models", "data", "inference", "training", "integrations", "entry points")
WITHOUT_CONFIGURATION = ("ssm", "layers", "models", "parallel", "training", "inference")
# Makes a process in which these are not installed.
BLOCK = """
import importlib.machinery, sys
find = importlib.machinery.PathFinder.find_spec
importlib.machinery.PathFinder.find_spec = lambda name, *rest: (
    None if name.split(".")[0] in {blocked!r} else find(name, *rest)
)
"""


def modules(*rooms: str) -> list[str]:
    paths = (path for room in rooms for path in sorted((PACKAGE / room).glob("**/*.py")))
    return [".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__") for path in paths]


def room_of(module: str) -> str | None:
    """The room of `t5x_ssm.training.trainer` is training; what lies at the top is an entry point. None: not a room."""
    parts = module.split(".")
    if parts[0] != "t5x_ssm" or len(parts) == 1 or parts[1] == "errors":
        return None
    if (PACKAGE / parts[1]).is_dir():
        return parts[1]
    return "entry points" if (PACKAGE / f"{parts[1]}.py").is_file() else None


def imported(path: pathlib.Path) -> set[str]:
    """Names that a file imports anywhere, also inside functions; `from a import b` gives a.b."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path} imports relatively, which hides where from"
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def python(code: str, blocked: tuple[str, ...], *given: str, **environment: object) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-c", BLOCK.format(blocked=blocked) + code, *given],
        env={**os.environ, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
        | {name: str(value) for name, value in environment.items()},
        capture_output=True,
        text=True,
    )


def test_no_room_imports_upwards():
    wrong = []
    for path in sorted(PACKAGE.glob("**/*.py")):
        room = room_of(".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"))
        for name in imported(path):
            other = room_of(name)
            if room and other and FLOORS.index(other) > FLOORS.index(room):
                wrong.append(f"{path.relative_to(ROOT)} ({room}) imports {name} ({other})")
    assert not wrong, "\n".join(wrong)


def test_every_folder_is_a_known_room():
    rooms = {path.name for path in PACKAGE.iterdir() if path.is_dir() and list(path.glob("*.py"))}
    assert rooms <= set(FLOORS)
    assert set(WITHOUT_CONFIGURATION) <= rooms


def test_tasks_import_nothing_of_the_package():
    for path in sorted((ROOT / "tasks").glob("**/*.py")):
        assert not [name for name in imported(path) if name.split(".")[0] == "t5x_ssm"], path


def test_the_mathematics_needs_jax_alone():
    allowed = {"jax", "numpy", "math", "functools", "collections", "dataclasses", "typing", "itertools", "t5x_ssm"}
    for path in sorted((PACKAGE / "ssm").glob("*.py")):
        assert {name.split(".")[0] for name in imported(path)} <= allowed, path


def test_the_blocking_blocks():
    done = python("import jax, gin", ("gin",))
    assert "ModuleNotFoundError: No module named 'gin'" in done.stderr


def test_rooms_import_without_tensorflow_seqio_and_gin():
    names = modules(*WITHOUT_CONFIGURATION)
    assert "t5x_ssm.training.trainer" in names
    done = python(
        f"import importlib\nfor name in {names!r}: importlib.import_module(name)",
        ("tensorflow", "seqio", "gin"),
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_training_from_a_token_cache_needs_neither_tensorflow_nor_seqio(tmp_path, training_caches):
    done = python(
        "from t5x_ssm import train\nsys.exit(train.main(sys.argv[1:]))",
        ("tensorflow", "seqio"),
        *arguments(tmp_path / "run", TRAIN_STEPS=3, trainer__TrainerConfig__tensorboard=True),
        **training_caches,
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "run" / "checkpoint_3").is_dir()
    assert list((tmp_path / "run").glob("events.out.tfevents*"))
