"""The `state` item of a checkpoint: a tree of arrays by name, as Orbax and T5X store it.

A tree is nested dicts with string keys, and a leaf's name is its path, `target/decoder/embed/embedding`.
"""

import contextlib
import gc
import json
import sys
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
from absl import logging
from etils import epath
from flax import traverse_util

from t5x_ssm.errors import CheckpointDamaged, CheckpointError, CheckpointMismatch, CheckpointUnreadable

_ROWS = 20

# Marks of errors that say nothing against the files: too little memory, no access, a store out of reach.
_OTHER_CAUSES = (
    "RESOURCE_EXHAUSTED",
    "PERMISSION_DENIED",
    "UNAUTHENTICATED",
    "UNAVAILABLE",
    "DEADLINE_EXCEEDED",
    "CANCELLED",
    "ABORTED",
)
# Errors that come from what the files hold. Others, such as a KeyError, may as well be a defect of a library.
_FILE_ERRORS = (FileNotFoundError, NotADirectoryError, IsADirectoryError, UnicodeDecodeError, json.JSONDecodeError)
_FILE_MARKS = ("OUT_OF_RANGE", "DATA_LOSS", "NOT_FOUND", "FAILED_PRECONDITION", "INVALID_ARGUMENT")


def flatten(tree: Mapping[str, Any]) -> dict[str, Any]:
    """Leaves by name, in the order of the names.

    Raises:
      TypeError: a node is no dict with string keys free of '/', which a checkpoint could not give back as it was.
    """
    flat = traverse_util.flatten_dict(dict(tree))
    for path, leaf in flat.items():
        if not all(isinstance(key, str) and key and "/" not in key for key in path):
            raise TypeError(f"checkpoint trees have string keys without '/', and {path} is none")
        if not (hasattr(leaf, "shape") and hasattr(leaf, "dtype")):
            raise TypeError(f"{'/'.join(path)} is a {type(leaf).__name__}; leaves of checkpoint trees are arrays")
    return {"/".join(path): flat[path] for path in sorted(flat)}


def unflatten(leaves: Mapping[str, Any]) -> dict[str, Any]:
    """The tree with these leaves."""
    return traverse_util.unflatten_dict(dict(leaves), sep="/")


def fill(tree: Mapping[str, Any], leaves: Mapping[str, Any]) -> dict[str, Any]:
    """A tree of the structure of `tree`, empty nodes included, with the leaves of these names."""
    flat = traverse_util.flatten_dict(dict(tree), keep_empty_nodes=True)
    return traverse_util.unflatten_dict(
        {path: leaf if leaf is traverse_util.empty_node else leaves["/".join(path)] for path, leaf in flat.items()}
    )


def describe(leaf: Any) -> str:
    """Type and shape of an array, such as float32[512, 64]."""
    return f"{jnp.dtype(leaf.dtype).name}[{', '.join(map(str, leaf.shape))}]"


def compare(where: Any, stored: Mapping[str, Any], expected: Mapping[str, Any]) -> None:
    """Checks that a checkpoint holds the arrays that this configuration expects.

    Args:
      where: names the checkpoint in the message.
      stored: name -> anything with shape and dtype, as the checkpoint has them.
      expected: the same, as this configuration has them.

    Raises:
      CheckpointMismatch: lists what is missing, unexpected, or of another shape or type.
    """
    missing = [name for name in expected if name not in stored]
    unexpected = [name for name in stored if name not in expected]
    different = [name for name in expected if name in stored and describe(stored[name]) != describe(expected[name])]
    rows = [f"  missing in the checkpoint: {name} {describe(expected[name])}" for name in missing]
    rows += [f"  only in the checkpoint: {name} {describe(stored[name])}" for name in unexpected]
    rows += [
        f"  different: {name} is {describe(stored[name])} in the checkpoint, {describe(expected[name])} here"
        for name in different
    ]
    if rows:
        network_differs = any(name.startswith("target/") for name in (*missing, *unexpected, *different))
        culprit = "another network" if network_differs else "the same network under another optimizer"
        shown = rows[:_ROWS] + ([f"  ... and {len(rows) - _ROWS} more"] if len(rows) > _ROWS else [])
        raise CheckpointMismatch(f"{where} is a checkpoint of {culprit}:\n" + "\n".join(shown))


def stored_arrays(path: epath.Path) -> dict[str, jax.ShapeDtypeStruct]:
    """Shapes and types of the arrays in a `state` item, by name; reads no array.

    Raises:
      CheckpointDamaged: the item is missing or unreadable.
    """
    try:
        tree = ocp.PyTreeCheckpointHandler().metadata(path).tree
        flat = traverse_util.flatten_dict(tree)
        return {
            "/".join(map(str, keys)): jax.ShapeDtypeStruct(tuple(leaf.shape), leaf.dtype)
            for keys, leaf in sorted(flat.items())
            if getattr(leaf, "dtype", None) is not None
        }
    except Exception as e:
        raise _explained(path, e) from e


def read_arrays(path: epath.Path, wanted: Mapping[str, jax.ShapeDtypeStruct]) -> dict[str, jax.Array]:
    """Reads arrays of a `state` item onto the devices that their shardings name, whatever mesh wrote them.

    Args:
      path: the item's folder.
      wanted: name -> shape and dtype, which must be the stored ones, and a sharding.

    Returns:
      name -> array. In a run of several processes this is not a collective: each reads its own shards.

    Raises:
      CheckpointDamaged: the files are at fault.
      CheckpointUnreadable: they may be.
      CheckpointError: they are not: no memory, no access, a store out of reach.
    """
    restore_args = {
        name: ocp.ArrayRestoreArgs(sharding=leaf.sharding, global_shape=tuple(leaf.shape), dtype=leaf.dtype)
        for name, leaf in wanted.items()
    }
    try:
        args = ocp.args.PyTreeRestore(unflatten(wanted), restore_args=unflatten(restore_args), partial_restore=True)
        with _abandoned_reads_in_debug_log():
            tree = ocp.PyTreeCheckpointHandler().restore(path, args=args)
        found = flatten(tree)
        missing = [name for name in wanted if not isinstance(found.get(name), jax.Array)]
        if missing:
            raise CheckpointDamaged(f"{path} has lost {len(missing)} arrays, among them {missing[0]}")
        return {name: found[name] for name in wanted}
    except Exception as e:
        raise _explained(path, e) from e


@contextlib.contextmanager
def _abandoned_reads_in_debug_log():
    """When one read fails, Orbax abandons the others, and Python would print a page about each of them."""
    hook = sys.unraisablehook
    sys.unraisablehook = lambda event: logging.debug("while reading a checkpoint: %r", event.exc_value)
    try:
        yield
    except Exception:
        gc.collect()
        raise
    finally:
        sys.unraisablehook = hook


def reason(error: BaseException) -> str:
    """What went wrong, without the pages that Orbax and TensorStore add to it."""
    while type(error) is Exception and (error.__cause__ or error.__context__):  # Orbax's wrapper, which says less.
        error = error.__cause__ or error.__context__
    text = str(error).split(" [tensorstore_spec", 1)[0].split(" [source locations", 1)[0]
    if len(text) > 600:  # The cause of all stands at the end.
        text = f"{text[:250]} ... {text[-300:]}"
    return f"{type(error).__name__}: {text}"


def _explained(path: epath.Path, error: Exception) -> CheckpointError:
    """What an error while reading says about the files."""
    if isinstance(error, CheckpointError):
        return error
    text = reason(error)
    message = f"{path} cannot be read: {text}"
    if isinstance(error, MemoryError | PermissionError) or any(mark in text for mark in _OTHER_CAUSES):
        return CheckpointError(message)
    if isinstance(error, _FILE_ERRORS) or any(mark in text for mark in _FILE_MARKS):
        return CheckpointDamaged(message)
    return CheckpointUnreadable(message)
