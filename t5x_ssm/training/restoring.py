"""Starting from another run's checkpoint, of this engine or of T5X: its parameters, or its whole state."""

import re
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
from etils import epath

from t5x_ssm.errors import CheckpointError, UserError
from t5x_ssm.training import consensus, places, run_folder, stored_tree, verified_arrays
from t5x_ssm.training import manifest as manifests
from t5x_ssm.training.checkpoints import RestoreCheckpointConfig, Restored


class RestoredParameters(NamedTuple):
    """Parameters from a checkpoint; `metadata` is None for a checkpoint of T5X."""

    params: dict[str, Any]
    path: epath.Path
    metadata: dict[str, Any] | None


def restore_parameters(
    restore: RestoreCheckpointConfig | epath.PathLike,
    abstract_params: Mapping[str, Any],
    initial_params: Mapping[str, Any] | None = None,
) -> RestoredParameters:
    """Reads parameters alone, from a checkpoint of this engine or of T5X; writes nothing. All processes call it.

    Args:
      restore: the configuration, or just a path to a checkpoint or a run folder (its newest is taken).
      abstract_params: nested dict of `jax.ShapeDtypeStruct`s with shardings. Floating-point values are cast to its
        types.
      initial_params: arrays of the same structure, for parameters that come from scratch (`fallback_to_scratch`, or
        None in `assignment_map`).

    Raises:
      CheckpointMismatch: the checkpoint's parameters are others; lists them.
      CheckpointDamaged, CheckpointError: it is damaged, cannot be read, or does not exist.
    """
    if not isinstance(restore, RestoreCheckpointConfig):
        restore = RestoreCheckpointConfig(path=str(restore))
    path = _find(restore)
    wanted = verified_arrays.expected_leaves({"target": abstract_params})

    def plan() -> tuple[dict[str, Any] | None, dict[str, Any], dict[str, str]]:
        manifest, arrays = _contents(path)
        targets = {name: leaf for name, leaf in arrays.items() if name.startswith("target/")}
        sources = _sources(path, restore, wanted, targets)
        return manifest, targets, sources

    manifest, targets, sources = consensus.succeed_together(plan)
    scratch = [name for name in wanted if name not in sources]
    if scratch and initial_params is None:
        raise CheckpointError(
            f"{len(scratch)} parameters, such as {scratch[0]}, come from scratch, and were not given."
        )
    placed = {
        old: jax.ShapeDtypeStruct(wanted[new].shape, targets[old].dtype, sharding=wanted[new].sharding)
        for new, old in sources.items()
    }
    read = verified_arrays.read_verified(path, manifest, placed)
    leaves = stored_tree.flatten({"target": initial_params}) if scratch else {}
    for new, old in sources.items():  # Two may share a source, and want it elsewhere.
        leaves[new] = jax.device_put(read[old].astype(wanted[new].dtype), wanted[new].sharding)
    params = stored_tree.fill({"target": abstract_params}, leaves)["target"]
    return RestoredParameters(params, path, None if manifest is None else manifest["metadata"])


def restore_mutables(path: epath.Path, abstract_mutables: Mapping[str, Any]) -> dict[str, Any]:
    """Reads a network's state beside its parameters (`TrainState.flax_mutables`). All processes call it.

    Args:
      path: the checkpoint, as `restore_parameters` found it.
      abstract_mutables: nested dict of `jax.ShapeDtypeStruct`s with shardings; where it is empty nothing is read.

    Raises:
      CheckpointMismatch, CheckpointDamaged, CheckpointError: as `restore_parameters`.
    """
    if not abstract_mutables:
        return {}
    wanted = verified_arrays.expected_leaves({"flax_mutables": abstract_mutables})

    def plan() -> dict[str, Any] | None:
        manifest, arrays = _contents(path)
        stored_tree.compare(path, {n: leaf for n, leaf in arrays.items() if n.startswith("flax_mutables/")}, wanted)
        return manifest

    leaves = verified_arrays.read_verified(path, consensus.succeed_together(plan), wanted)
    return stored_tree.fill({"flax_mutables": abstract_mutables}, leaves)["flax_mutables"]


def restore_state(restore: RestoreCheckpointConfig, abstract_tree: Mapping[str, Any]) -> Restored:
    """Reads parameters, optimizer state and step from a checkpoint of this engine or of T5X. All processes call it.

    Args:
      restore: where it is.
      abstract_tree: T5X's tree of `jax.ShapeDtypeStruct`s with shardings, on any mesh.

    Returns:
      What it holds, without a position in the data, which belongs to the other run.

    Raises:
      CheckpointMismatch: it is of another network or optimizer; lists the leaves.
      CheckpointDamaged, CheckpointError: it is damaged, cannot be read, or does not exist.
    """
    path = _find(restore)
    wanted = verified_arrays.expected_leaves(abstract_tree)

    def plan() -> tuple[dict[str, Any] | None, dict[str, Any]]:
        manifest, arrays = _contents(path)
        if manifest is not None:
            verified_arrays.compare_state(path, manifest, wanted)
            return manifest, wanted
        # T5X stores whole numbers, the step too, in the floating-point type of its checkpoints.
        as_wanted = {
            name: jax.ShapeDtypeStruct(leaf.shape, wanted[name].dtype if name in wanted else leaf.dtype)
            for name, leaf in arrays.items()
        }
        stored_tree.compare(path, as_wanted, wanted)
        return None, {
            name: jax.ShapeDtypeStruct(leaf.shape, arrays[name].dtype, sharding=leaf.sharding)
            for name, leaf in wanted.items()
        }

    manifest, placed = consensus.succeed_together(plan)
    leaves = {
        name: leaf.astype(wanted[name].dtype)
        for name, leaf in verified_arrays.read_verified(path, manifest, placed).items()
    }
    metadata = None if manifest is None else manifest["metadata"]
    return Restored(stored_tree.fill(abstract_tree, leaves), None, metadata, int(leaves["state/step"]))


def _find(restore: RestoreCheckpointConfig) -> epath.Path:
    if restore.path is None:
        raise UserError("RestoreCheckpointConfig.path is not set, so there is nothing to restore from.")
    return places.located(consensus.ask_first(lambda: str(run_folder.find_checkpoint(restore.path, restore.mode))))


def _contents(path: epath.Path) -> tuple[dict[str, Any] | None, dict[str, Any]]:
    """The manifest of a checkpoint (None if T5X wrote it), and its arrays' shapes and types by name."""
    manifest = manifests.read(path) if (path / "metadata").exists() else None
    return manifest, stored_tree.stored_arrays(path / "state") if manifest is None else manifests.arrays(manifest)


def _sources(path, restore: RestoreCheckpointConfig, wanted: Mapping, stored: Mapping) -> dict[str, str]:
    """Which stored array each parameter comes from; those from scratch are absent."""
    sources, used = {}, set()
    for name in wanted:
        old = name
        for pattern, replacement in restore.assignment_map:
            if match := re.fullmatch(pattern, name):
                used.add(pattern)
                old = None if replacement is None else match.expand(replacement)
                break
        if old is not None and (old in stored or not restore.fallback_to_scratch):
            sources[name] = old
    unused = [pattern for pattern, _ in restore.assignment_map if pattern not in used]
    if unused:
        raise UserError(f"RestoreCheckpointConfig.assignment_map: no parameter here matches {', '.join(unused)}.")
    # Floating-point types may differ, for they are cast; anything else may not.
    expected = {}
    for name, old in sources.items():
        cast = old in stored and verified_arrays.is_float(stored[old]) and verified_arrays.is_float(wanted[name])
        expected[old] = jax.ShapeDtypeStruct(wanted[name].shape, stored[old].dtype if cast else wanted[name].dtype)
    if not restore.strict:
        stored = {name: leaf for name, leaf in stored.items() if name in expected}
    stored_tree.compare(path, stored, expected)
    return sources
