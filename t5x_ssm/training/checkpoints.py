"""Checkpoints: saving without holding up training, and restoring only what is whole.

A checkpoint is the folder `MODEL_DIR/checkpoint_<step>` with three Orbax items:
  state     T5X's tree, `{'target': params, 'state': {'step', 'param_states'}}`; either engine's initialises the other
  dataset   JSON: the position of the data pipeline, for the batch after this step
  metadata  JSON: the loop's own state, and a manifest with shape, type and checksum of every array
It is written under a temporary name and renamed when all of it is on disk, or in an object store marked as whole when all of
it is there. So a process may die at any moment: there is the newest whole checkpoint, and perhaps a leftover that the next
start removes. Checksums do not depend on the mesh, so
every restore verifies every array it reads, on any number of devices.
"""

import contextlib
import dataclasses
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import orbax.checkpoint as ocp
from absl import logging
from etils import epath

from t5x_ssm.errors import CheckpointDamaged, CheckpointError, CheckpointUnreadable, UserError
from t5x_ssm.training import consensus, places, run_folder, stored_tree, verified_arrays
from t5x_ssm.training import manifest as manifests
from t5x_ssm.training.parameter_groups import STATE_SPACE_PATTERN


@dataclasses.dataclass(frozen=True)
class SaveCheckpointConfig:
    """When checkpoints are saved, how, and which are kept.

    Attributes:
      period: steps between checkpoints; None saves only at `checkpoint_steps` and where the loop wants it.
      keep: how many of the newest to keep; None keeps all.
      keep_period: also keep, for good, every checkpoint whose step is a multiple of this.
      checkpoint_steps: also save at these steps, and keep those for good.
      dtype: type in which floating-point parameters are stored, 'float32' or 'bfloat16'; None as they are. If it is
        narrower than theirs, the run does not resume bit-exactly. The optimizer's state is always stored as it is, and so
        are state spaces, whose kernels a rounded pole or step would ruin.
      save_dataset: whether to store the position of the data pipeline.
      asynchronous: write in the background while training goes on; `save` returns when the arrays are copied.
    """

    period: int | None = 1000
    keep: int | None = None
    keep_period: int | None = None
    checkpoint_steps: Sequence[int] = ()
    dtype: str | None = None
    save_dataset: bool = True
    asynchronous: bool = True

    def __post_init__(self):
        for name in ("period", "keep", "keep_period"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UserError(f"SaveCheckpointConfig.{name} is {value}; it must be at least 1, or None.")
        if self.dtype not in (None, "float32", "bfloat16"):
            raise UserError(f"SaveCheckpointConfig.dtype is {self.dtype!r}; it must be 'float32', 'bfloat16' or None.")


@dataclasses.dataclass(frozen=True)
class RestoreCheckpointConfig:
    """From which other checkpoint a new run starts. A run's own checkpoints always come first.

    Attributes:
      path: a checkpoint, or a run folder, of this engine or of T5X; None starts from scratch.
      what: 'parameters', for a new run from them; or 'state', the optimizer's state and the step too, to go on with a run
        of the other engine, or in another folder. Data begins at its start either way.
      mode: 'latest' takes the newest of a run folder; 'specific' takes `path` itself.
      assignment_map: pairs (pattern, replacement). Where the regular expression matches the whole name of a parameter
        here (`target/decoder/...`), the replacement is its name in the checkpoint, or None to start it from scratch.
      strict: whether parameters of the checkpoint that are not used are an error.
      fallback_to_scratch: whether parameters that the checkpoint lacks are initialised from scratch, or an error.
    """

    path: str | None = None
    what: str = "parameters"
    mode: str = "latest"
    assignment_map: Sequence[tuple[str, str | None]] = ()
    strict: bool = True
    fallback_to_scratch: bool = False

    def __post_init__(self):
        for name, choices in (("what", ("parameters", "state")), ("mode", ("latest", "specific"))):
            if (value := getattr(self, name)) not in choices:
                raise UserError(
                    f"RestoreCheckpointConfig.{name} is {value!r}; it must be {' or '.join(map(repr, choices))}."
                )
        if self.what == "state" and (self.assignment_map or self.fallback_to_scratch or not self.strict):
            raise UserError(
                "RestoreCheckpointConfig.what = 'state' takes everything as it is; assignment_map, strict and "
                "fallback_to_scratch go with what = 'parameters'."
            )
        for pattern, _ in self.assignment_map:
            try:
                re.compile(pattern)
            except re.error as e:
                raise UserError(f"RestoreCheckpointConfig.assignment_map: {pattern!r} is no regex ({e}).") from None


@dataclasses.dataclass(frozen=True)
class CheckpointConfig:
    """Checkpointing of a run."""

    save: SaveCheckpointConfig = SaveCheckpointConfig()
    restore: RestoreCheckpointConfig = RestoreCheckpointConfig()


class Restored(NamedTuple):
    """A restored checkpoint.

    Attributes:
      tree: arrays in the structure, shardings and types that were asked for.
      dataset_state: what was given to `save`, or None when that run did not store it.
      metadata: what was given to `save`; None for a checkpoint of T5X.
      step: its step.
      set_aside: lines about newer checkpoints that could not be used.
    """

    tree: dict[str, Any]
    dataset_state: Any
    metadata: dict[str, Any] | None
    step: int
    set_aside: tuple[str, ...] = ()


class Checkpointer:
    """Saves and restores the checkpoints of one run folder, which no other running process writes.

    In a run of several processes all of them call every method, in the same order.
    """

    def __init__(self, model_dir: epath.PathLike, config: SaveCheckpointConfig = SaveCheckpointConfig()):
        """Opens the folder (made when it does not exist) and removes what a killed write left there."""
        self._directory = places.located(model_dir)
        self._config = config
        self._saving: int | None = None
        self._own_steps: set[int] = set()
        run_folder.make(self._directory)
        run_folder.remove_leftovers(self._directory)
        self._manager = self._make_manager()

    def _make_manager(self) -> ocp.CheckpointManager:
        keep = ocp.checkpoint_managers
        policies = [keep.LatestN(self._config.keep), keep.CustomSteps(list(self._config.checkpoint_steps))]
        if self._config.keep_period is not None:
            policies.append(keep.EveryNSteps(self._config.keep_period))
        options = ocp.CheckpointManagerOptions(
            step_name_format=run_folder.STEP_FORMAT,
            preservation_policy=keep.AnyPreservationPolicy(policies),
            enable_async_checkpointing=self._config.asynchronous,
            lightweight_initialize=True,  # A damaged checkpoint must not keep the folder from being opened.
            # Both would wait for all processes, and after a failed save a process makes its manager alone.
            create=False,
            save_root_metadata=False,
        )
        return ocp.CheckpointManager(self._directory, options=options)

    def __enter__(self) -> "Checkpointer":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def steps(self) -> list[int]:
        """Steps of the completely written checkpoints, ascending."""
        return consensus.ask_first(lambda: run_folder.checkpoint_steps(self._directory))

    def latest_step(self) -> int | None:
        """The newest of `steps`, or None."""
        return max(self.steps(), default=None)

    def due(self, step: int) -> bool:
        """Whether the configuration asks for a checkpoint at this step."""
        return step in self._config.checkpoint_steps or (
            self._config.period is not None and step > 0 and step % self._config.period == 0
        )

    def save(
        self,
        step: int,
        tree: Mapping[str, Any],
        dataset_state: Any,
        metadata: Mapping[str, Any],
    ) -> bool:
        """Saves a checkpoint, whether one is `due` or not.

        With `asynchronous` it returns when the arrays may be changed, or donated, again. It waits for the save before
        it, if that is still being written.

        Args:
          step: steps taken; it names the checkpoint.
          tree: T5X's tree of `jax.Array`s: nested dicts, with the parameters under 'target'.
          dataset_state: JSON-able position of the data pipeline. Processes may have different ones.
          metadata: JSON-able dict of whatever else the run needs to go on; that of process 0 is stored.

        Returns:
          Whether a save was begun; False when this run has saved this step already, or has started from it.

        Raises:
          CheckpointError: this save, or the one before it, could not be written; older checkpoints are as they were.
        """
        self.wait()
        if step in self._own_steps:
            return False
        if step in self.steps():
            raise CheckpointError(
                f"{run_folder.checkpoint_path(self._directory, step)} exists already, and this run did not start from "
                "it. Move it away, or choose another MODEL_DIR."
            )
        leaves = stored_tree.flatten(tree)
        if self._config.dtype is not None:
            for name, leaf in leaves.items():
                projection = name.startswith("target/") and not re.search(STATE_SPACE_PATTERN, name)
                if projection and verified_arrays.is_float(leaf):
                    leaves[name] = leaf.astype(self._config.dtype)
        items = {"state": ocp.args.PyTreeSave(stored_tree.fill(tree, leaves))}
        dataset = None
        if self._config.save_dataset:
            dataset = {"states": consensus.gather_json(manifests.exact_json(dataset_state, "dataset_state"))}
            items["dataset"] = ocp.args.JsonSave(dataset)
        manifest = manifests.make(
            step, leaves, dataset, manifests.exact_json(dict(metadata), "metadata"), self._config.dtype
        )
        items["metadata"] = ocp.args.JsonSave(manifest)
        self._saving = step
        try:
            self._manager.save(step, args=ocp.args.Composite(**items), force=True)
        except Exception as e:
            raise self._failed_save(e) from e
        if not self._config.asynchronous:
            self.wait()
        return True

    def check(self) -> None:
        """Raises if a save in the background has failed by now. Cheap and local: meant for every step.

        Raises:
          CheckpointError: as in `wait`.
        """
        if self._saving is not None and not self._manager.is_saving_in_progress():
            self.wait()

    def wait(self) -> None:
        """Waits until the save in the background, if any, is complete.

        Raises:
          CheckpointError: it could not be written; the older checkpoints are as they were.
        """
        if self._saving is None:
            return
        try:
            self._manager.wait_until_finished()
        except Exception as e:
            raise self._failed_save(e) from e
        self._own_steps.add(self._saving)
        self._saving = None

    def close(self) -> None:
        """Waits as `wait` does, and releases the threads."""
        try:
            self.wait()
        finally:
            self._manager.close()

    def _failed_save(self, error: Exception) -> CheckpointError:
        """Makes the folder usable again after a failed save and says what happened."""
        step, self._saving = self._saving, None
        path = run_folder.checkpoint_path(self._directory, step)
        # A failed manager counts the step as saved, and may report its failure again.
        with contextlib.suppress(Exception):
            self._manager.close()
        self._manager = self._make_manager()
        if jax.process_count() == 1:  # Others may not know of the failure yet, and would not join in.
            with contextlib.suppress(OSError, UserError):
                run_folder.remove_leftovers(self._directory, step)
        try:
            newest = max(run_folder.checkpoint_steps(self._directory), default=None)
            fallback = "There is no older one." if newest is None else f"The newest whole one is checkpoint_{newest}."
        except UserError as e:  # The store that could not be written cannot be read either.
            fallback = str(e)
        reason = stored_tree.reason(error)
        if "No space left" in reason:
            reason = (
                f"its disk is full. Free some space, or keep fewer checkpoints (SaveCheckpointConfig.keep). [{reason}]"
            )
        return CheckpointError(f"{path} could not be written: {reason}\n{fallback}")

    def restore(self, abstract_tree: Mapping[str, Any], step: int | None = None) -> Restored | None:
        """Restores the newest checkpoint that is whole, or exactly that of `step`.

        Newer ones that turn out to be damaged are moved to `MODEL_DIR/bad`. Nothing is deleted.

        Args:
          abstract_tree: T5X's tree of `jax.ShapeDtypeStruct`s with shardings, on any mesh.
          step: a step; then nothing is moved and nothing else is tried.

        Returns:
          The restored checkpoint; None when the folder never held any.

        Raises:
          CheckpointMismatch: it is whole but of another network or optimizer.
          CheckpointDamaged: it, or every one there was, is damaged.
          CheckpointUnreadable: it, or every one, could not be read, though the files may be whole; they stay in place.
          CheckpointError: the store is out of reach, memory is short, or there is none of that step.
        """
        self.wait()
        expected = verified_arrays.expected_leaves(abstract_tree)
        steps = self.steps()
        if step is not None:
            if step not in steps:
                raise CheckpointError(f"{self._directory} has no checkpoint of step {step}; it has {steps}.")
            return self._restored(abstract_tree, expected, step)
        failed: dict[int, CheckpointError] = {}
        for candidate in reversed(steps):
            try:
                restored = self._restored(abstract_tree, expected, candidate)
            except (CheckpointDamaged, CheckpointUnreadable) as e:
                logging.info("%s", e)
                failed[candidate] = e
                continue
            # That an older one can be read shows that the program is not at fault, so all that failed are set aside.
            return restored._replace(set_aside=self._set_aside(failed))
        moved = self._set_aside({at: e for at, e in failed.items() if isinstance(e, CheckpointDamaged)})
        unclear = [str(e) for e in failed.values() if isinstance(e, CheckpointUnreadable)]
        if unclear:
            raise CheckpointUnreadable(
                "\n".join([f"No checkpoint in {self._directory} can be read.", *moved, *unclear])
                + "\nNothing shows that the last files are at fault; have the versions of jax or orbax changed?"
            )
        bad = consensus.ask_first(lambda: run_folder.set_aside_checkpoints(self._directory))
        if bad:
            lines = moved or [f"Set aside earlier, in {self._directory / 'bad'}: {', '.join(bad)}."]
            raise CheckpointDamaged(
                "\n".join([f"No whole checkpoint is left in {self._directory}.", *lines])
                + "\nTo start from scratch, choose another MODEL_DIR or move the folder 'bad' away."
            )
        return None

    def _set_aside(self, failed: Mapping[int, CheckpointError]) -> tuple[str, ...]:
        lines = tuple(
            run_folder.set_aside(run_folder.checkpoint_path(self._directory, step), str(e))
            for step, e in failed.items()
        )
        self._manager.reload()
        return lines

    def _restored(self, abstract_tree: Mapping[str, Any], expected: Mapping[str, Any], step: int) -> Restored:
        path = run_folder.checkpoint_path(self._directory, step)
        logging.info("Restoring %s.", path)
        stored = consensus.succeed_together(lambda: manifests.read(path, step))
        consensus.succeed_together(lambda: verified_arrays.compare_state(path, stored, expected))
        dataset_state = consensus.succeed_together(lambda: manifests.read_dataset_state(path, stored))
        leaves = verified_arrays.read_verified(path, stored, expected)
        self._own_steps.add(step)
        return Restored(stored_tree.fill(abstract_tree, leaves), dataset_state, stored["metadata"], step)
