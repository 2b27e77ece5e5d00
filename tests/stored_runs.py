"""What two runs must have in common to the bit, read by Orbax and not by the code under test."""

import pathlib

import jax
import numpy as np
import orbax.checkpoint as ocp

from t5x_ssm.training import manifest
from t5x_ssm.training.run_folder import checkpoint_path


def stored(model_dir: pathlib.Path, step: int) -> dict:
    """Everything that a checkpoint says, without the clock."""
    path = checkpoint_path(model_dir, step)
    shapes = ocp.PyTreeCheckpointHandler().metadata(path / "state").tree
    as_numpy = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), shapes)
    tree = ocp.PyTreeCheckpointHandler().restore(
        path / "state", args=ocp.args.PyTreeRestore(jax.tree.map(lambda _: 0, shapes), restore_args=as_numpy)
    )
    arrays = {
        jax.tree_util.keystr(keys): (leaf.dtype.name, leaf.shape, leaf.tobytes())
        for keys, leaf in jax.tree_util.tree_leaves_with_path(tree)
    }
    described = manifest.read(path)
    described["metadata"]["loop"]["window"].pop("time")
    return {
        "arrays": arrays,
        "data": manifest.read_dataset_state(path, described),
        "loop": described["metadata"]["loop"],
    }
