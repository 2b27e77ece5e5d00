"""The token cache: each task's documents, tokenised once by its seqio preprocessors, as one indexed token stream.

    python -m tasks.cache --mixture=NAME [--cache_dir=DIR] [--module=MODULE]

    DIR/TASK/FINGERPRINT/SPLIT/tokens.bin      every document's tokens, one after the other, little-endian, in the
                                               smallest unsigned type that holds the vocabulary
                               offsets.npy     int64 [documents + 1]: where each document starts, and the end
                               bytes.npy       int64 [documents]: UTF-8 length of each document's text, from which
                                               bits per byte are exact under any vocabulary
                               manifest.json   counts, type, vocabulary, sizes and checksums of the three files
    DIR/NAME/FINGERPRINT.json                  a mixture (or a task alone): its tasks, rates and vocabulary

A task's folder appears whole by one rename, so a killed or concurrent run leaves nothing half-made behind that
could be taken for a cache. The fingerprint covers the task's name, source, preprocessors and vocabulary. Reading
needs only numpy: seqio is imported when a cache is made.
"""

import argparse
import array
import hashlib
import importlib
import importlib.metadata
import importlib.util
import json
import logging
import os
import pathlib
import platform
import re
import shutil
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    import seqio

logger = logging.getLogger(__name__)

FORMAT = 1
FEATURE = "targets"
DATA_FILES = ("tokens.bin", "offsets.npy", "bytes.npy")
_STALE_SECONDS = 24 * 3600


class CacheError(ValueError):
    """A task or mixture that is unknown or cannot be cached, or a damaged cache; the message is for the user."""


def default_cache_dir() -> pathlib.Path:
    """$T5X_SSM_CACHE_DIR, else t5x_ssm in the user's cache folder ($XDG_CACHE_HOME, else ~/.cache)."""
    if own := os.environ.get("T5X_SSM_CACHE_DIR"):
        return pathlib.Path(own)
    return pathlib.Path(os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache") / "t5x_ssm"


def find(name: str, cache_dir: str | os.PathLike | None = None) -> pathlib.Path | None:
    """The newest cache of a task or mixture that was made from the sources of this environment, or None.

    Its files are not looked into; where a task's whole folder was removed, there is no cache.

    Returns:
      The path of its mixture file (DIR/NAME/FINGERPRINT.json).

    Raises:
      CacheError: if that file cannot be read.
    """
    cache_dir = pathlib.Path(cache_dir or default_cache_dir())
    paths = (cache_dir / name).glob("*.json")
    for path in sorted(paths, key=lambda p: (p.stat().st_mtime_ns, p.name), reverse=True):
        mixture = read_json(path)
        if (
            mixture.get("format") == FORMAT
            and all(version(name) == made_from for name, made_from in mixture["environment"].items())
            and all((cache_dir / component["directory"]).is_dir() for component in mixture["components"])
        ):
            return path
    return None


def build(
    name: str, cache_dir: str | os.PathLike | None = None, *, modules: Iterable[str] = ("tasks",)
) -> pathlib.Path:
    """Makes what is missing of a task's or mixture's cache.

    Args:
      name: a registered seqio task or mixture whose only feature is `targets`.
      cache_dir: where caches lie; `default_cache_dir()` if None.
      modules: modules whose import registers tasks; `tasks` stands for all of this package's.

    Returns:
      The path of the mixture file.

    Raises:
      CacheError: for an unknown name (with the nearest ones), other features, a rate that is not positive, tasks of
        different vocabularies, or tokens outside the vocabulary; or if an existing cache is damaged.
    """
    from tasks import vocabularies

    cache_dir = pathlib.Path(cache_dir or default_cache_dir())
    provider = registered(name, modules)
    tasks = list(getattr(provider, "tasks", [provider]))
    components, environment, vocabulary = [], {}, None
    for task in tasks:
        rate = float(provider.get_rate(task)) if len(tasks) > 1 or provider is not task else 1.0
        if not 0 < rate < float("inf"):
            raise CacheError(f"Task {task.name!r} has rate {rate} in mixture {name!r}; a rate must be positive.")
        if set(task.output_features) != {FEATURE}:
            raise CacheError(
                f"Task {task.name!r} has the features {sorted(task.output_features)}; the token cache holds language-"
                f"model tasks, whose only feature is {FEATURE!r}. Train on it with DatasetConfig.source='seqio'."
            )
        found = vocabularies.describe(task.output_features[FEATURE].vocabulary)
        vocabulary = vocabulary or found
        if found["hash"] != vocabulary["hash"]:
            raise CacheError(
                f"The tasks of mixture {name!r} differ in their vocabularies: {tasks[0].name!r} has {vocabulary}, "
                f"{task.name!r} has {found}."
            )
        source = _describe_source(task.source)
        environment.update(source.get("environment", {}))
        directory = _build_task(task, cache_dir, source, found)
        components.append({"task": task.name, "rate": rate, "directory": directory.relative_to(cache_dir).as_posix()})
    mixture = {
        "format": FORMAT,
        "name": name,
        "components": components,
        "vocabulary": vocabulary,
        "environment": environment,
    }
    path = cache_dir / name / f"{_hash(mixture)}.json"
    _write_whole(path, mixture)
    return path


def registered(name: str, modules: Iterable[str] = ("tasks",)) -> "seqio.Task | seqio.Mixture":
    """The seqio task or mixture of that name, after importing the modules that may register it.

    Raises:
      CacheError: if there is none, with the nearest names; or if a module cannot be imported.
    """
    import difflib

    import seqio

    for module in modules:
        try:
            imported = importlib.import_module(module)
        except ModuleNotFoundError as error:
            raise CacheError(f"Cannot import {module!r}, which should register {name!r}: {error}.") from error
        if module == "tasks":
            imported.register()
    names = [*seqio.TaskRegistry.names(), *seqio.MixtureRegistry.names()]
    if name not in names:
        near = difflib.get_close_matches(name, names, n=3, cutoff=0.5)
        hint = f"The nearest names: {', '.join(near)}." if near else f"Registered: {', '.join(sorted(names))}."
        raise CacheError(
            f"No task or mixture is named {name!r}. {hint} A task of yours is registered by importing its module "
            "(DatasetConfig.module)."
        )
    return seqio.get_mixture_or_task(name)


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
    for name, expected in manifest["files"].items():
        path = directory / name
        if not path.is_file():
            raise CacheError(f"The token cache file {path} is missing. {repair}")
        if (size := path.stat().st_size) != expected["size"]:
            raise CacheError(f"The token cache file {path} has {size} bytes instead of {expected['size']}. {repair}")
        if checksums and _sha256(path) != expected["sha256"]:
            raise CacheError(f"The token cache file {path} does not have its recorded checksum. {repair}")
    return manifest


def version(name: str) -> str | None:
    """The present version of something that a source depends on.

    Args:
      name: 'python', the name of an installed distribution, or 'module NAME' for a digest of a module's source.

    Returns:
      The version; None if it is not installed.
    """
    if name == "python":
        return platform.python_version()
    try:
        if name.startswith("module "):
            spec = importlib.util.find_spec(name.removeprefix("module "))
            return _sha256(pathlib.Path(spec.origin))[:16] if spec and spec.origin else None
        return importlib.metadata.version(name)
    except (ModuleNotFoundError, importlib.metadata.PackageNotFoundError):
        return None


def _repair(made_whole: pathlib.Path) -> str:
    return f"Remove {made_whole} and start again: the cache is then made anew."


def _build_task(task: "seqio.Task", cache_dir: pathlib.Path, source: dict, vocabulary: dict) -> pathlib.Path:
    """Makes DIR/TASK/FINGERPRINT unless it is there, and returns it."""
    identity = {
        "format": FORMAT,
        "task": task.name,
        "source": source,
        "preprocessors": [_describe_callable(p) for p in task.preprocessors],
        "vocabulary": vocabulary["hash"],
    }
    target = cache_dir / task.name / _hash(identity)
    splits = sorted(task.splits)
    if target.is_dir():
        for split in splits:
            check(target / split)
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    _remove_stale(target.parent)
    logger.info("Tokenizing %s (%s) into %s", task.name, ", ".join(splits), target)
    temporary = pathlib.Path(tempfile.mkdtemp(prefix=".making-", dir=target.parent))
    try:
        for split in splits:
            _write_split(task, split, temporary / split, identity, vocabulary)
        temporary.chmod(0o755)
        try:
            temporary.rename(target)
        except OSError:
            # Another process was quicker; its cache has the same contents.
            if not target.is_dir():
                raise
            for split in splits:
                check(target / split)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return target


def _write_split(task: "seqio.Task", split: str, directory: pathlib.Path, identity: dict, vocabulary: dict) -> None:
    dtype = np.dtype(np.min_scalar_type(vocabulary["size"] - 1)).newbyteorder("<")
    offsets, lengths = array.array("q", [0]), array.array("q")
    directory.mkdir()
    with open(directory / "tokens.bin", "wb") as file:
        for tokens, byte_length in _documents(task, split):
            if tokens.size and not 0 <= int(tokens.min()) <= int(tokens.max()) < vocabulary["size"]:
                raise CacheError(
                    f"Document {len(lengths)} of {task.name!r}, split {split!r}, has token ids from {tokens.min()} to "
                    f"{tokens.max()}, outside its vocabulary of {vocabulary['size']}."
                )
            file.write(tokens.astype(dtype).tobytes())
            offsets.append(offsets[-1] + tokens.size)
            lengths.append(byte_length)
    np.save(directory / "offsets.npy", np.array(offsets, np.int64))
    np.save(directory / "bytes.npy", np.array(lengths, np.int64))
    manifest = {
        **identity,
        "split": split,
        "documents": len(lengths),
        "tokens": offsets[-1],
        "bytes": sum(lengths),
        "dtype": dtype.str,
        "vocabulary": vocabulary,
        "files": {
            name: {"size": (directory / name).stat().st_size, "sha256": _sha256(directory / name)}
            for name in DATA_FILES
        },
        "made_by": {name: version(name) for name in ("t5x_ssm", "seqio", "python")},
    }
    _write_whole(directory / "manifest.json", manifest)
    for name in DATA_FILES:
        _sync(directory / name)


def _documents(task: "seqio.Task", split: str) -> Iterator[tuple[np.ndarray, int]]:
    """Tokens [n] and text length in bytes of each document, as the task's preprocessors make them."""
    vocabulary = task.output_features[FEATURE].vocabulary
    dataset = task.get_dataset(
        sequence_length=None, split=split, shuffle=False, trim_output_features=False, try_in_mem_cache=False
    )
    for example in dataset.as_numpy_iterator():
        tokens = example[FEATURE]
        text = example.get(f"{FEATURE}_pretokenized")
        if not isinstance(text, bytes):
            text = vocabulary.decode([int(t) for t in tokens]).encode("utf-8")
        yield tokens, len(text)


def _describe_source(source: "seqio.DataSource") -> dict[str, Any]:
    described = {"kind": type(source).__name__, "splits": sorted(source.splits or ()), "repr": _stable(repr(source))}
    # A function says what its data depends on through an attribute: {"environment": {name: version(name)}, …}.
    describe = getattr(getattr(source, "_dataset_fn", None), "describe_source", None)
    return {**described, **describe()} if describe else described


def _describe_callable(function: Any) -> str:
    inner = getattr(function, "func", function)
    name = f"{getattr(inner, '__module__', '')}.{getattr(inner, '__qualname__', type(inner).__qualname__)}"
    settings = [getattr(function, "args", ()), getattr(function, "keywords", {})]
    return name + (_stable(repr(settings)) if any(settings) else "")


def _stable(text: str) -> str:
    """A repr without the memory addresses that differ between runs."""
    return re.sub(r" at 0x[0-9a-f]+", "", text)


def _hash(identity: dict) -> str:
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:16]


def _sha256(path: pathlib.Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _write_whole(path: pathlib.Path, content: dict) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    _sync(temporary)
    temporary.replace(path)


def _sync(path: pathlib.Path) -> None:
    with open(path, "rb") as file:
        os.fsync(file.fileno())


def _remove_stale(folder: pathlib.Path) -> None:
    """Removes what killed runs left; a day's grace, for a run on another machine may still be writing."""
    for path in folder.glob(".making-*"):
        if time.time() - path.stat().st_mtime > _STALE_SECONDS:
            shutil.rmtree(path, ignore_errors=True)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m tasks.cache", description="Makes the token cache of a mixture.")
    parser.add_argument("--mixture", required=True, help="a registered seqio task or mixture")
    parser.add_argument("--cache_dir", default=None, help=f"where caches lie (default: {default_cache_dir()})")
    parser.add_argument("--module", action="append", default=[], help="a module that registers tasks; repeatable")
    flags = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    try:
        path = build(flags.mixture, flags.cache_dir, modules=("tasks", *flags.module))
        cache_dir = path.parent.parent
        for component in read_json(path)["components"]:
            for manifest_path in sorted((cache_dir / component["directory"]).glob("*/manifest.json")):
                m = read_json(manifest_path)
                print(
                    f"{m['task']:<24} {m['split']:<12} rate {component['rate']:<8g} {m['documents']:>10,} documents "
                    f"{m['tokens']:>14,} tokens {m['bytes']:>14,} bytes"
                )
        print(path)
    except (ValueError, OSError) as error:
        sys.exit(f"tasks.cache: {error}")


if __name__ == "__main__":
    main()
