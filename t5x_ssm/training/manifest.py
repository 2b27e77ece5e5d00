"""What a checkpoint says about itself: the JSON items `metadata` and `dataset`.

`metadata` holds the loop's own state and a manifest: shape, type and checksum of every array, a checksum of the
`dataset` item and one of the manifest itself. So a reader knows what it is about to read, and that it has read what was
written.
"""

import json
import zlib
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
from etils import epath

from t5x_ssm.errors import CheckpointDamaged, CheckpointError
from t5x_ssm.training.checksums import checksums

_FORMAT = 1


def make(
    step: int, leaves: Mapping[str, jax.Array], dataset: Any, metadata: dict[str, Any], dtype: str | None
) -> dict[str, Any]:
    """The `metadata` item. A collective, for it computes the checksums of the arrays.

    Args:
      step: steps taken.
      leaves: the arrays as they are stored, by name.
      dataset: the `dataset` item, or None when there is none.
      metadata: the loop's own state.
      dtype: the type that parameters were cast to, or None.
    """
    sums = checksums(list(leaves.values()))
    manifest = {
        "format": _FORMAT,
        "step": step,
        "dtype": dtype,
        "arrays": {
            name: {"shape": list(leaf.shape), "dtype": jnp.dtype(leaf.dtype).name, "checksum": checksum}
            for (name, leaf), checksum in zip(leaves.items(), sums, strict=True)
        },
        "dataset_checksum": None if dataset is None else _crc(dataset),
        "written_by": {
            "jax": jax.__version__,
            "orbax": ocp.__version__,
            "platform": jax.default_backend(),
            "devices": jax.device_count(),
            "processes": jax.process_count(),
        },
        "metadata": metadata,
    }
    return manifest | {"checksum": _crc(manifest)}


def arrays(manifest: Mapping[str, Any]) -> dict[str, jax.ShapeDtypeStruct]:
    """Shapes and types of the stored arrays, by name."""
    return {
        name: jax.ShapeDtypeStruct(tuple(array["shape"]), jnp.dtype(array["dtype"]))
        for name, array in manifest["arrays"].items()
    }


def read(path: epath.Path, step: int | None = None) -> dict[str, Any]:
    """Reads the `metadata` item of the checkpoint at `path`.

    Raises:
      CheckpointDamaged: it is missing, not as it was written, or that of another step than `step`.
      CheckpointError: it cannot be reached, or comes from a later version.
    """
    manifest = _read_json(path / "metadata")
    if not isinstance(manifest, dict) or manifest.pop("checksum", None) != _crc(manifest):
        raise CheckpointDamaged(f"{path / 'metadata'} is not as it was written")
    if manifest["format"] != _FORMAT:
        raise CheckpointError(f"{path} has format {manifest['format']}; this version reads format {_FORMAT}.")
    if step is not None and manifest["step"] != step:
        raise CheckpointDamaged(f"{path} holds step {manifest['step']}")
    return manifest


def read_dataset_state(path: epath.Path, manifest: Mapping[str, Any]) -> Any:
    """This process's position in the data, from the `dataset` item; None when none was stored.

    Raises:
      CheckpointDamaged: it is missing, or not as it was written.
      CheckpointError: each process had its own, and there are more or fewer processes now.
    """
    if manifest["dataset_checksum"] is None:
        return None
    dataset = _read_json(path / "dataset")
    if _crc(dataset) != manifest["dataset_checksum"]:
        raise CheckpointDamaged(f"{path / 'dataset'} is not as it was written")
    states = dataset["states"]
    if len(states) == jax.process_count():
        return states[jax.process_index()]
    if all(state == states[0] for state in states):
        return states[0]
    raise CheckpointError(
        f"{path} was saved by {len(states)} processes, each with its own position in the data, and there are "
        f"{jax.process_count()} now. Start as many as before, or train on an indexed source, which any number resumes."
    )


def _read_json(item: epath.Path) -> Any:
    try:
        return ocp.JsonCheckpointHandler().restore(item)
    except (FileNotFoundError, NotADirectoryError, ValueError) as e:
        raise CheckpointDamaged(f"{item} cannot be read: {type(e).__name__}: {e}") from e
    except OSError as e:
        raise CheckpointError(f"{item} cannot be read: {e}") from e


def _crc(value: Any) -> str:
    return f"{zlib.crc32(json.dumps(value, sort_keys=True, separators=(',', ':')).encode()):08x}"


def exact_json(value: Any, name: str) -> Any:
    """Returns a copy of a value that JSON gives back exactly as it is.

    Raises:
      TypeError: it holds tuples, keys other than strings, or numpy numbers; `name` is the value's in the message.
    """
    if isinstance(value, dict):
        for key in value:
            if not isinstance(key, str):
                raise TypeError(f"{name} has the key {key!r}; keys in a checkpoint are strings")
        return {key: exact_json(item, f"{name}/{key}") for key, item in value.items()}
    if isinstance(value, list):
        return [exact_json(item, f"{name}/{i}") for i, item in enumerate(value)]
    if value is None or type(value) in (bool, int, float, str):
        return value
    raise TypeError(
        f"{name} is a {type(value).__name__}; a checkpoint stores dict, list, str, bool, int, float and None"
    )
