"""The files of a token cache: their layout, their checks, and how they appear whole. Needs only numpy.

    DIR/TASK/FINGERPRINT/SPLIT/manifest.json           counts, type, vocabulary, and the list of shards
    DIR/TASK/FINGERPRINT/SPLIT/00000/tokens.bin        the shard's tokens, one document after the other, little-endian,
                                                       in the smallest unsigned type that holds the vocabulary
                                    /offsets.npy       int64 [documents + 1]: where each document starts, and the end
                                    /bytes.npy         int64 [documents]: UTF-8 length of each document's text, from
                                                       which bits per byte are exact under any vocabulary
                                    /labels.npy        int64 [examples]: the class of each example, for labelled tasks
                                    /manifest.json     the shard's counts, sizes and checksums
    DIR/NAME/FINGERPRINT.json                          a mixture (or a task alone): its tasks, rates and vocabulary

The stream of a split is that of its shards, one after the other. A labelled task has class ids as `targets` and its texts
(tokens, pixels, …) as `inputs`, or for pairs `inputs` and `inputs2`: these are its documents, one or two an example. A task of pairs has texts as `inputs` and as
`targets`, two documents an example, and no labels.
"""

import hashlib
import json
import os
import pathlib
from typing import Any

import numpy as np

FORMAT = 2
FEATURE = "targets"
# Of labelled tasks: the features whose documents are classified together.
LABELLED_FEATURES = (("inputs",), ("inputs", "inputs2"))
# Of tasks of pairs: the features whose documents belong together, the manifest's `texts`.
PAIR_FEATURES = ("inputs", "targets")
LABELS_FILE = "labels.npy"
TOKENS, MANIFEST = "tokens.bin", "manifest.json"
DATA_FILES = (TOKENS, "offsets.npy", "bytes.npy")
# Stands for a shard's tokens in the copy of a cache that lies in a store, see `tasks.cache_store`.
TOKENS_URL = "tokens.url"


class CacheError(ValueError):
    """A task or mixture that is unknown or cannot be cached, or a damaged cache; the message is for the user."""


def shard_name(index: int) -> str:
    """The folder of a shard below that of its split."""
    return f"{index:05d}"


def read_json(path: pathlib.Path) -> dict[str, Any]:
    """Reads a mixture file or a manifest; CacheError, with its name, if it is missing or broken."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        made_whole = path.parent.parent if path.name == "manifest.json" else path
        raise CacheError(f"The token cache file {path} cannot be read: {error}. {_repair(made_whole)}") from error


def check(directory: pathlib.Path, *, checksums: bool = False) -> dict[str, Any]:
    """Checks one split of a cached task against its manifest, and returns the manifest.

    Args:
      directory: DIR/TASK/FINGERPRINT/SPLIT.
      checksums: also reads every file and compares its SHA-256; sizes are always compared.

    Raises:
      CacheError: naming the missing, truncated or altered file.
    """
    manifest = read_json(directory / "manifest.json")
    repair = _repair(directory.parent)
    if manifest.get("format") != FORMAT:
        raise CacheError(f"{directory} has the cache format {manifest.get('format')}, not {FORMAT}. {repair}")
    for index, shard in enumerate(manifest["shards"]):
        check_shard(directory / shard_name(index), shard, repair, checksums=checksums)
    return manifest


def check_shard(directory: pathlib.Path, shard: dict[str, Any], repair: str, *, checksums: bool = False) -> None:
    """Checks a shard's files against its manifest; as `check`, whose messages end with `repair`."""
    for name, expected in shard["files"].items():
        path = directory / name
        pointer = directory / TOKENS_URL
        stored = name == TOKENS and pointer.is_file()
        try:
            size = json.loads(pointer.read_text())["size"] if stored else path.stat().st_size
        except OSError:
            raise CacheError(f"The token cache file {path} is missing. {repair}") from None
        if size != expected["size"]:
            raise CacheError(f"The token cache file {path} has {size} bytes instead of {expected['size']}. {repair}")
        if checksums and _checksum(path, pointer if stored else None) != expected["sha256"]:
            raise CacheError(f"The token cache file {path} does not have its recorded checksum. {repair}")


def _checksum(path: pathlib.Path, pointer: pathlib.Path | None) -> str:
    if pointer is None:
        return sha256(path)
    from tasks import cache_store

    return cache_store.StoredTokens(pointer, np.dtype(np.uint8)).sha256()


def digest(identity: dict[str, Any]) -> str:
    """Sixteen characters that stand for a JSON-able identity."""
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:16]


def sha256(path: pathlib.Path) -> str:
    """SHA-256 of a file."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_whole(path: pathlib.Path, content: dict[str, Any]) -> None:
    """Writes a JSON file that is there whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    sync(temporary)
    temporary.replace(path)


def sync(path: pathlib.Path) -> None:
    """Has a file's contents on the disk."""
    with open(path, "rb") as file:
        os.fsync(file.fileno())


def _repair(made_whole: pathlib.Path) -> str:
    return f"Remove {made_whole} and start again: the cache is then made anew."
