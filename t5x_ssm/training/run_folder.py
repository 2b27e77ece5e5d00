"""The run folder (`MODEL_DIR`): which checkpoints it holds, and which configuration it belongs to.

    MODEL_DIR/
      run.json                  the settings that define the run, written at its start
      run.lock                  locked by the process that trains here; says which it is
      checkpoint_<step>/        whole checkpoints; a folder gets this name when all of it is on disk
        state/ dataset/ metadata/
      checkpoint_<step>.orbax-checkpoint-tmp/   one being written, or what a killed run left of it
      bad/checkpoint_<step>-<n>/                checkpoints that could not be read; beside each, why

In an object store a checkpoint has its own name from the start, and is whole when `commit_success.txt` is in it.
"""

import json
import os
import pathlib
import re
from collections.abc import Callable, Mapping
from concurrent import futures
from typing import TypeVar

from absl import logging
from etils import epath
from orbax.checkpoint.path import step as orbax_step

from t5x_ssm.errors import CheckpointError, RunFolderError
from t5x_ssm.training import consensus, places

CHECKPOINT_PREFIX = "checkpoint"
STEP_FORMAT = orbax_step.standard_name_format(step_prefix=CHECKPOINT_PREFIX)
_RUN_FILE = "run.json"
_BAD = "bad"
# Of Orbax.
_COMMITTED, _METADATA = "commit_success.txt", "_CHECKPOINT_METADATA"
_ROWS = 20

T = TypeVar("T")


def local(setting: str, folder: str) -> pathlib.Path:
    """`folder` as a path of a file system, for what a library writes that knows no object stores.

    Raises:
      RunFolderError: it names a store.
    """
    if places.is_store(folder):
        raise RunFolderError(
            f"{setting} = {folder!r}: give a folder of a file system, and copy it to the store from there."
        )
    return pathlib.Path(folder)


def make(model_dir: epath.PathLike) -> None:
    """Makes the folder, if it does not exist. Process 0 does it."""

    def mkdir() -> None:
        try:
            epath.Path(model_dir).mkdir(parents=True, exist_ok=True)
        except OSError as e:
            raise RunFolderError(f"MODEL_DIR={model_dir} cannot be used as a run folder: {e}") from e

    consensus.ask_first(_reaching(model_dir, mkdir))


def _reaching(model_dir: epath.PathLike, function: Callable[[], T]) -> Callable[[], T]:
    """`function`, with the errors of a store's client explained."""

    def explained() -> T:
        with places.reached(model_dir, "MODEL_DIR"):
            return function()

    return explained


def checkpoint_path(model_dir: epath.PathLike, step: int) -> epath.Path:
    """The folder of the checkpoint of `step`, whether it exists or not."""
    return epath.Path(model_dir) / STEP_FORMAT.build_name(step)


def checkpoint_steps(model_dir: epath.PathLike) -> list[int]:
    """Steps of the completely written checkpoints in a run folder, ascending; [] when there is no such folder.

    Reads the folder in this process and changes nothing, so it may be called beside a run that writes there.
    """
    folder = places.place(model_dir)
    if not places.is_store(folder):
        return sorted(found.step for found in STEP_FORMAT.find_all(epath.Path(folder)))
    with places.reached(folder, "MODEL_DIR"), futures.ThreadPoolExecutor() as pool:
        named = [entry for entry in _entries(folder) if re.fullmatch(rf"{CHECKPOINT_PREFIX}_(0|[1-9]\d*)", entry.name)]
        whole = list(pool.map(_is_whole, named))
    return sorted(int(entry.name.rpartition("_")[2]) for entry, is_whole in zip(named, whole, strict=True) if is_whole)


def _entries(folder: places.Place) -> list[places.Place]:
    return list(folder.iterdir()) if folder.exists() else []


def _is_whole(checkpoint: places.Place) -> bool:
    """Whether all of a checkpoint in a store has been written.

    Orbax writes a file at the end that says so. A checkpoint that was copied there from a file system, where a name says it,
    may have none, and must not be taken for a leftover: its metadata have the time at which it was whole.
    """
    if (checkpoint / _COMMITTED).exists():
        return True
    try:
        return json.loads((checkpoint / _METADATA).read_text()).get("commit_timestamp_nsecs") is not None
    except (FileNotFoundError, ValueError, AttributeError):
        return False


def find_checkpoint(path: epath.PathLike, mode: str = "latest") -> epath.Path:
    """Finds the checkpoint that a user's path means; changes nothing.

    Args:
      path: a checkpoint (`MODEL_DIR/checkpoint_1000`) or, for mode 'latest', also a run folder: its newest is taken.
      mode: 'latest' or 'specific', as in `RestoreCheckpointConfig`.

    Raises:
      CheckpointError: there is none; says what was found instead.
    """
    path = places.located(path)
    with places.reached(path, "The checkpoint's path"):
        is_there = path.exists()
    if not is_there:
        there = ", ".join(checkpoint_path(path.parent, step).name for step in checkpoint_steps(path.parent))
        raise CheckpointError(
            f"{path} does not exist; give a checkpoint or a run folder."
            + (f" {path.parent} holds {there}." if there else "")
        )
    if (path / "state").is_dir():
        return path
    steps = checkpoint_steps(path)
    if steps and mode == "latest":
        return checkpoint_path(path, steps[-1])
    if steps:
        raise CheckpointError(
            f"{path} is a run folder, and RestoreCheckpointConfig.mode is 'specific': give one of its checkpoints, "
            f"such as {checkpoint_path(path, steps[-1])}, or take mode='latest'."
        )
    if path.is_file() or (path / "checkpoint").is_file():
        raise CheckpointError(
            f"{path} is a checkpoint of T5X's former format (one msgpack file). Load it with T5X and save it again: "
            "T5X now writes checkpoint_<step>/state with Orbax, which is read here."
        )
    raise CheckpointError(f"{path} holds no checkpoint_<step>/state, so there is nothing to restore from it.")


def remove_leftovers(model_dir: epath.PathLike, step: int | None = None) -> list[str]:
    """Removes what killed or failed writes left: folders that never became checkpoints. Process 0 does it.

    Args:
      model_dir: the run folder, into which no other process writes.
      step: only leftovers of this step; of all steps when None.

    Returns:
      Names of the removed folders.
    """

    def remove() -> list[str]:
        folder = places.located(model_dir)
        step_name = None if step is None else STEP_FORMAT.build_name(step)
        leftovers = [
            entry
            for entry in _entries(folder)
            if entry.name.startswith(f"{CHECKPOINT_PREFIX}_")
            and orbax_step.is_path_temporary(entry)
            and not (places.is_store(entry) and _is_whole(entry))
            and step_name in (None, entry.name.split(".", 1)[0])
        ]
        for entry in leftovers:
            entry.rmtree()
        return sorted(entry.name for entry in leftovers)

    removed = consensus.ask_first(_reaching(model_dir, remove))
    for name in removed:
        logging.warning(
            "Removed %s from %s: its write was cut short, so it never became a checkpoint.", name, model_dir
        )
    return removed


def set_aside(path: epath.Path, reason: str) -> str:
    """Moves a checkpoint that cannot be read to `bad/<name>-<n>` and writes the reason beside it. Process 0 does it.

    Returns:
      A line that says so.
    """

    def move() -> str:
        bad = path.parent / _BAD
        bad.mkdir(parents=True, exist_ok=True)
        number = 0
        while (bad / f"{path.name}-{number}").exists():
            number += 1
        target = bad / f"{path.name}-{number}"
        try:  # First, for in a store a folder is there when a file is in it.
            (bad / f"{target.name}.reason.txt").write_text(reason + "\n")
        except OSError as e:  # A full disk must not keep the run from going on.
            logging.warning("Could not write why %s was set aside: %s", target, e)
        path.rename(target)
        return f"{path} cannot be used and was moved to {target}: {reason}"

    line = consensus.ask_first(_reaching(path.parent, move))
    logging.error(line)
    return line


def set_aside_checkpoints(model_dir: epath.PathLike) -> list[str]:
    """Names of the folders under `bad/`, sorted."""
    return sorted(entry.name for entry in _entries(places.place(model_dir) / _BAD) if entry.is_dir())


def check_run_folder(model_dir: epath.PathLike, description: Mapping[str, str]) -> None:
    """Makes sure that a run folder belongs to this configuration; call it before anything else touches the folder.

    A folder without checkpoints is taken over: its `run.json` is written. One with checkpoints must hold a `run.json`
    that says the same as `description`.

    Args:
      model_dir: the run folder; made when it does not exist.
      description: setting -> value, both strings, of all that makes two runs different runs: network, optimizer, data,
        seed; not how long the run is, nor what it logs.

    Raises:
      RunFolderError: it belongs to another configuration (lists the settings that differ), or to no known one.
    """
    folder = places.place(model_dir, "MODEL_DIR")
    path = folder / _RUN_FILE
    description = {str(key): str(value) for key, value in description.items()}

    def check() -> None:
        try:
            has_checkpoints = bool(checkpoint_steps(folder) or set_aside_checkpoints(folder))
            if has_checkpoints:
                _compare(folder, _read_description(path), description)
            else:
                places.write_whole(path, json.dumps({"description": description}, indent=1, sort_keys=True) + "\n")
        except OSError as e:
            raise RunFolderError(f"MODEL_DIR={model_dir} cannot be used as a run folder: {e}") from e

    make(folder)
    consensus.ask_first(_reaching(folder, check))


def _read_description(path: epath.Path) -> dict[str, str]:
    elsewhere = "Choose another MODEL_DIR; RestoreCheckpointConfig.path can take its parameters from here."
    if not path.exists():
        raise RunFolderError(
            f"{path.parent} has checkpoints but no {path.name}: another program wrote them. {elsewhere}"
        )
    try:
        description = json.loads(path.read_text())["description"]
        return {str(key): str(value) for key, value in description.items()}
    except (ValueError, LookupError, AttributeError, TypeError) as e:
        raise RunFolderError(
            f"{path} cannot be read ({e}), so its checkpoints belong to no known run. {elsewhere}"
        ) from e


def _compare(folder: epath.Path, stored: Mapping[str, str], given: Mapping[str, str]) -> None:
    absent = "(not set)"
    rows = [
        f"  {key}: {stored.get(key, absent)} there, {given.get(key, absent)} here"
        for key in sorted(stored.keys() | given.keys())
        if stored.get(key) != given.get(key)
    ]
    if rows:
        shown = rows[:_ROWS] + ([f"  ... and {len(rows) - _ROWS} more"] if len(rows) > _ROWS else [])
        raise RunFolderError(
            f"MODEL_DIR={os.fspath(folder)} holds a run of another configuration. These settings differ:\n"
            + "\n".join(shown)
            + "\nSet them back to go on with that run, or choose another MODEL_DIR for this one "
            "(RestoreCheckpointConfig.path can start it from that run's parameters)."
        )
