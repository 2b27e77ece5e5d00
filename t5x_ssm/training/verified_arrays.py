"""Reading a checkpoint's arrays so that a changed bit or another network is an error, never a result."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from t5x_ssm.errors import CheckpointDamaged
from t5x_ssm.training import consensus, stored_tree
from t5x_ssm.training import manifest as manifests
from t5x_ssm.training.checksums import checksums


def expected_leaves(abstract_tree: Mapping[str, Any]) -> dict[str, jax.ShapeDtypeStruct]:
    """Leaves by name, with shardings that fit: an error here is the caller's and must not be blamed on a checkpoint."""
    leaves = stored_tree.flatten(abstract_tree)
    for name, leaf in leaves.items():
        if getattr(leaf, "sharding", None) is None:
            raise ValueError(f"{name} has no sharding; arrays are restored only with explicit ones")
        leaf.sharding.shard_shape(tuple(leaf.shape))
    return leaves


def read_verified(path, manifest: Mapping | None, wanted: Mapping[str, Any]) -> dict[str, jax.Array]:
    """Reads arrays in their stored types, verifies their checksums if there are any, and casts them as wanted."""
    stored = {} if manifest is None else manifests.arrays(manifest)
    placed = {
        name: jax.ShapeDtypeStruct(
            leaf.shape, stored[name].dtype if name in stored else leaf.dtype, sharding=leaf.sharding
        )
        for name, leaf in wanted.items()
    }
    arrays = consensus.succeed_together(lambda: stored_tree.read_arrays(path / "state", placed))
    if manifest is not None:
        found = dict(zip(arrays, checksums(list(arrays.values())), strict=True))
        changed = [name for name in arrays if found[name] != manifest["arrays"][name]["checksum"]]
        if changed:
            raise CheckpointDamaged(f"{path}: {len(changed)} arrays are not as they were written, such as {changed[0]}")
    return {name: array.astype(wanted[name].dtype) for name, array in arrays.items()}


def compare_state(path, manifest: Mapping, expected: Mapping[str, Any]) -> None:
    """As `stored_tree.compare`, where parameters that were stored in another type on request are cast back."""
    stored = manifests.arrays(manifest)
    if manifest["dtype"] is not None:
        for name, leaf in stored.items():
            if name in expected and name.startswith("target/") and is_float(leaf) and is_float(expected[name]):
                stored[name] = jax.ShapeDtypeStruct(leaf.shape, expected[name].dtype)
    stored_tree.compare(path, stored, expected)


def is_float(leaf: Any) -> bool:
    return jnp.issubdtype(leaf.dtype, jnp.floating)
