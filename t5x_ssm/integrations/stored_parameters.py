"""Parameters alone, without a network or an optimizer: out of checkpoints, and into checkpoints that others start from.

Everything here is arrays by name (`decoder/segment_0/block_0/mixer/ssm/d`), held by this one process.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from t5x_ssm.errors import CheckpointError
from t5x_ssm.training import checkpoints, places, restoring, run_folder, stored_tree

_PREFIX = "target/"


class StoredParameters(NamedTuple):
    """What `read` finds.

    Attributes:
      arrays: by name, as they are stored.
      step: the training step.
      metadata: what the run stored with them, its vocabulary among it; {} where T5X wrote the checkpoint.
      path: the checkpoint.
    """

    arrays: dict[str, np.ndarray]
    step: int
    metadata: dict[str, Any]
    path: places.Place


def read(checkpoint_path: str) -> StoredParameters:
    """Reads the parameters of a checkpoint of this engine or of T5X, whatever network they are of.

    Args:
      checkpoint_path: a checkpoint, or a run folder, whose newest is taken.

    Raises:
      CheckpointError: there is none, or it cannot be read.
    """
    path = run_folder.find_checkpoint(checkpoint_path)
    host = jax.sharding.SingleDeviceSharding(jax.local_devices(backend="cpu")[0])
    shapes = {
        name.removeprefix(_PREFIX): jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=host)
        for name, leaf in stored_tree.stored_arrays(path / "state").items()
        if name.startswith(_PREFIX)
    }
    if not shapes:
        raise CheckpointError(f"{path} holds no parameters.")
    restored = restoring.restore_parameters(str(path), stored_tree.unflatten(shapes))
    arrays = {name: np.asarray(leaf) for name, leaf in stored_tree.flatten(restored.params).items()}
    step = int(path.name.rpartition("_")[2])
    return StoredParameters(arrays, step, restored.metadata or {}, places.place(path))


def write(
    model_dir: str, arrays: Mapping[str, np.ndarray], step: int, metadata: Mapping[str, Any], config: str | None = None
) -> places.Place:
    """Writes a checkpoint that has parameters and no optimizer: `RestoreCheckpointConfig.path` takes it.

    Args:
      model_dir: the run folder; it must not have a checkpoint of this step.
      arrays: by name.
      step: names the checkpoint.
      metadata: stored with it.
      config: contents of the folder's config.gin, with which programs read `--model_dir`; None writes none.

    Returns:
      The checkpoint's path.
    """
    folder = places.place(model_dir, "--output_dir")
    target = stored_tree.unflatten({name: jnp.asarray(array) for name, array in arrays.items()})
    tree = {"target": target, "state": {"step": jnp.asarray(step, jnp.int32), "param_states": {}}}
    settings = checkpoints.SaveCheckpointConfig(save_dataset=False, asynchronous=False)
    with checkpoints.Checkpointer(folder, settings) as checkpointer:
        checkpointer.save(step, tree, None, metadata)
    if config is not None:
        (folder / "config.gin").write_text(config)
    return places.place(run_folder.checkpoint_path(folder, step))


def configuration_beside(checkpoint: places.Place) -> str | None:
    """The config.gin of the run that a checkpoint lies in, or None."""
    path = checkpoint.parent / "config.gin"
    return path.read_text() if path.is_file() else None
