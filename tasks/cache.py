"""The token cache: each task's documents, tokenised once by its seqio preprocessors, as one indexed token stream.

    python -m tasks.cache --mixture=NAME [--output_dir=DIR] [--processes=N] [--module=MODULE]
                          [--gin_file=FILE] [--gin.NAME=VALUE]

DIR may be of an object store (gs://bucket/folder): then the cache is made in this machine's cache folder, and copied
(`tasks.cache_store`). The output does not depend on --processes. Killed and started again, it goes on with the shards that were not finished.
`tasks.cache_files` has the layout. A task's folder appears whole by one rename, so a killed or concurrent run leaves
nothing half-made behind that could be taken for a cache. The fingerprint covers the task's name, source, preprocessors and
vocabulary. Reading needs only numpy: seqio is imported when a cache is made.
"""

import argparse
import functools
import importlib
import logging
import os
import pathlib
import re
import sys
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from tasks import cache_store, provenance
from tasks.cache_files import (
    FEATURE,
    FORMAT,
    LABELLED_FEATURES,
    PAIR_FEATURES,
    CacheError,
    check,
    digest,
    read_json,
    write_whole,
)
from tasks.corpora import settings
from tasks.provenance import version

if TYPE_CHECKING:
    import seqio

__all__ = [
    "FEATURE",
    "FORMAT",
    "CacheError",
    "build",
    "check",
    "default_cache_dir",
    "find",
    "read_json",
    "registered",
    "version",
]


logger = logging.getLogger(__name__)

# In the cache folder: copies of what is small of caches in stores.
STORES = "stores"


def default_cache_dir() -> pathlib.Path:
    """$T5X_SSM_CACHE_DIR, else t5x_ssm in the user's cache folder ($XDG_CACHE_HOME, else ~/.cache).

    Raises:
      CacheError: that variable names a store.
    """
    if own := os.environ.get("T5X_SSM_CACHE_DIR"):
        if cache_store.is_url(own):
            raise CacheError(
                f"T5X_SSM_CACHE_DIR is {own!r}; it is the cache folder of this machine. A store is named by DatasetConfig."
                "cache_dir and by --output_dir."
            )
        return pathlib.Path(own)
    return pathlib.Path(os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache") / "t5x_ssm"


def find(name: str, cache_dir: str | os.PathLike | None = None) -> pathlib.Path | None:
    """The newest cache of a task or mixture that was made from the sources of this environment, or None.

    Its files are not looked into; where a task's whole folder was removed, there is no cache.

    Args:
      name: the mixture's or task's name.
      cache_dir: where caches lie, a folder or the URL of a store; `default_cache_dir()` if None.

    Returns:
      The path of its mixture file (DIR/NAME/FINGERPRINT.json); of a store's, that in this machine's copy.

    Raises:
      CacheError: if that file, or the store, cannot be read.
    """
    if cache_dir and cache_store.is_url(cache_dir):
        cache_dir = cache_store.mirror(name, str(cache_dir), default_cache_dir() / STORES)
    cache_dir = pathlib.Path(cache_dir or default_cache_dir())
    paths = (cache_dir / name).glob("*.json")
    others = []
    for path in sorted(paths, key=lambda p: (p.stat().st_mtime_ns, p.name), reverse=True):
        mixture = read_json(path)
        whole = all((cache_dir / component["directory"]).is_dir() for component in mixture["components"])
        if mixture.get("format") == FORMAT and whole:
            if not (changes := provenance.changes(mixture["environment"])):
                return path
            others.append((path, changes))
    if others:
        logger.info("The token cache %s is not the one that is meant: %s.", others[0][0], "; ".join(others[0][1]))
    return None


def build(
    name: str,
    cache_dir: str | os.PathLike | None = None,
    *,
    modules: Iterable[str] = ("tasks",),
    processes: int = 1,
    gin_files: Sequence[str] = (),
    gin_bindings: Sequence[str] = (),
) -> pathlib.Path:
    """Makes what is missing of a task's or mixture's cache.

    Args:
      name: a registered seqio task or mixture whose only feature is `targets`; or of tasks of pairs, `inputs` and `targets` in
        one vocabulary; or of labelled tasks (see `tasks.cache_files`), whose `targets` have a `seqio.PassThroughVocabulary`
        of as many ids as there are classes.
      cache_dir: where caches lie, a folder or the URL of a store; `default_cache_dir()` if None.
      modules: modules whose import registers tasks; `tasks` stands for all of this package's.
      processes: how many work at once; above 1, `modules` have to register the tasks in each.
      gin_files, gin_bindings: settings of the corpora, which those processes need too.

    Returns:
      The path of the mixture file; of a store's, that in this machine's copy.

    Raises:
      CacheError: for an unknown name (with the nearest ones), other features, a rate that is not positive, tasks of
        different vocabularies, a corpus that cannot be found or read, or tokens outside the vocabulary; or if an existing
        cache is damaged.
    """
    from tasks import cache_writer, vocabularies

    if processes < 1:
        raise CacheError(f"--processes={processes}; it must be at least 1.")
    if cache_dir and cache_store.is_url(cache_dir):
        cache_store.Store(str(cache_dir))  # A package that is missing is better missed before the work than after it.
        rest = {"modules": modules, "processes": processes, "gin_files": gin_files, "gin_bindings": gin_bindings}
        cache_store.publish(build(name, **rest), str(cache_dir))
        return find(name, cache_dir)
    cache_dir = pathlib.Path(cache_dir or default_cache_dir())
    registration = functools.partial(prepare, tuple(modules), tuple(gin_files), tuple(gin_bindings))
    registration()
    provider = registered(name, modules)
    tasks = list(getattr(provider, "tasks", [provider]))
    components, vocabulary = [], None
    environment: dict[str, Any] = settings.rates_environment([task.name for task in tasks]) if len(tasks) > 1 else {}
    for task in tasks:
        try:
            rate = float(provider.get_rate(task)) if len(tasks) > 1 or provider is not task else 1.0
        except ValueError as error:
            raise CacheError(f"The rate of {task.name!r} in mixture {name!r}: {error}") from error
        if not 0 < rate < float("inf"):
            raise CacheError(f"Task {task.name!r} has rate {rate} in mixture {name!r}; a rate must be positive.")
        texts = _text_features(task)
        found = vocabularies.describe(task.output_features[texts[0]].vocabulary)
        if FEATURE not in texts:
            found["classes"] = int(task.output_features[FEATURE].vocabulary.vocab_size)
        vocabulary = vocabulary or found
        if found["hash"] != vocabulary["hash"]:
            raise CacheError(
                f"The tasks of mixture {name!r} differ in their vocabularies: {tasks[0].name!r} has {vocabulary}, "
                f"{task.name!r} has {found}."
            )
        source = describe_source(task.source)
        environment.update(source.get("environment", {}))
        identity = {
            "format": FORMAT,
            "task": task.name,
            "source": source,
            "preprocessors": [_describe_callable(p) for p in task.preprocessors],
            "vocabulary": found["hash"],
            **({"texts": texts} if texts == PAIR_FEATURES else {}),
        }
        directory = cache_writer.build_task(
            task,
            cache_dir,
            identity,
            found,
            processes=processes,
            prepare=registration,
            published=source.get("published"),
            texts=texts,
        )
        components.append({"task": task.name, "rate": rate, "directory": directory.relative_to(cache_dir).as_posix()})
    mixture = {
        "format": FORMAT,
        "name": name,
        "components": components,
        "vocabulary": vocabulary,
        "environment": environment,
    }
    path = cache_dir / name / f"{digest(mixture)}.json"
    write_whole(path, mixture)
    return path


def _text_features(task: "seqio.Task") -> tuple[str, ...]:
    """The features whose documents are cached: `targets` of a language-model task, the inputs of a labelled one, and both of a
    task of pairs."""
    import seqio

    from tasks import vocabularies

    features = task.output_features
    if set(features) == {FEATURE}:
        return (FEATURE,)
    of_text = not isinstance(features[FEATURE].vocabulary, seqio.PassThroughVocabulary)
    if set(features) == set(PAIR_FEATURES) and of_text:
        if not task.supports_caching:
            raise CacheError(
                f"Task {task.name!r} has no seqio.CacheDatasetPlaceholder among its preprocessors, and is not to be cached."
            )
        inputs, targets = (vocabularies.describe(features[name].vocabulary) for name in PAIR_FEATURES)
        if inputs["hash"] != targets["hash"]:
            raise CacheError(
                f"The inputs and targets of {task.name!r} differ in their vocabularies: {inputs} and {targets}."
            )
        return PAIR_FEATURES
    for texts in LABELLED_FEATURES:
        if set(features) == {*texts, FEATURE} and not of_text:
            return texts
    raise CacheError(
        f"Task {task.name!r} has the features {sorted(features)}; the token cache holds language-model tasks, whose only "
        f"feature is {FEATURE!r}, pairs of texts, {' and '.join(PAIR_FEATURES)}, and labelled ones. Train on it with "
        "DatasetConfig.source='seqio'."
    )


def prepare(modules: Sequence[str], gin_files: Sequence[str], gin_bindings: Sequence[str]) -> None:
    """Registers tasks and reads their settings, in this process.

    Raises:
      CacheError: a module cannot be imported, or a place is set of a corpus that does not exist.
    """
    for module in modules:
        try:
            imported = importlib.import_module(module)
        except ModuleNotFoundError as error:
            raise CacheError(f"Cannot import {module!r}, which should register tasks: {error}.") from error
        except ValueError as error:  # seqio's, for a name that is taken.
            raise CacheError(f"{module!r}, which should register tasks, cannot: {error}") from error
        if module == "tasks":
            imported.register()
    if gin_files or gin_bindings:
        import gin

        gin.parse_config_files_and_bindings(list(gin_files), list(gin_bindings))
    if set(modules) <= {"tasks"}:
        settings.check()


def registered(name: str, modules: Iterable[str] = ("tasks",)) -> "seqio.Task | seqio.Mixture":
    """The seqio task or mixture of that name, after importing the modules that may register it.

    Raises:
      CacheError: if there is none, with the nearest names; or if a module cannot be imported.
    """
    import difflib

    import seqio

    prepare(tuple(modules), (), ())
    names = [*seqio.TaskRegistry.names(), *seqio.MixtureRegistry.names()]
    if name not in names:
        near = difflib.get_close_matches(name, names, n=3, cutoff=0.5)
        hint = f"The nearest names: {', '.join(near)}." if near else f"Registered: {', '.join(sorted(names))}."
        raise CacheError(
            f"No task or mixture is named {name!r}. {hint} A task of yours is registered by importing its module "
            "(DatasetConfig.module)."
        )
    return seqio.get_mixture_or_task(name)


def describe_source(source: "seqio.DataSource") -> dict[str, Any]:
    """What the contents of a source depend on, JSON-able; its `environment` is what `tasks.provenance` compares."""
    described = {"kind": type(source).__name__, "splits": sorted(source.splits or ()), "repr": _stable(repr(source))}
    # A source or its function says what its data depends on: {"environment": {name: version(name)}, …}.
    own = getattr(source, "describe_source", None)
    describe = own or getattr(getattr(source, "_dataset_fn", None), "describe_source", None)
    return {**described, **describe()} if describe else described


def _describe_callable(function: Any) -> str:
    inner = getattr(function, "func", function)
    name = f"{getattr(inner, '__module__', '')}.{getattr(inner, '__qualname__', type(inner).__qualname__)}"
    settings = [getattr(function, "args", ()), getattr(function, "keywords", {})]
    return name + (_stable(repr(settings)) if any(settings) else "")


def _stable(text: str) -> str:
    """A repr without the memory addresses that differ between runs."""
    return re.sub(r" at 0x[0-9a-f]+", "", text)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m tasks.cache", description="Makes the token cache of a mixture.")
    parser.add_argument("--mixture", required=True, help="a registered seqio task or mixture")
    parser.add_argument(
        "--output_dir", "--cache_dir", default=None, help=f"where caches lie (default: {default_cache_dir()})"
    )
    parser.add_argument("--processes", type=int, default=1, help="how many work at once")
    add_registration_flags(parser)
    flags = parse_flags(parser, arguments)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    try:
        path = build(
            flags.mixture,
            flags.output_dir,
            modules=("tasks", *flags.module),
            processes=flags.processes,
            gin_files=flags.gin_file,
            gin_bindings=flags.gin_bindings,
        )
        for manifest, rate in manifests(path):
            print(summary(manifest, rate))
        print(path)
    except (ValueError, OSError) as error:
        sys.exit(f"tasks.cache: {error}")


def add_registration_flags(parser: argparse.ArgumentParser) -> None:
    """Flags of every tool here: what registers the tasks, and their settings."""
    parser.add_argument("--module", action="append", default=[], help="a module that registers tasks; repeatable")
    parser.add_argument("--gin_file", action="append", default=[], help="settings of the corpora; repeatable")


def parse_flags(parser: argparse.ArgumentParser, arguments: Sequence[str] | None) -> argparse.Namespace:
    """Parses a command line with `--gin.NAME=VALUE` in it; those become `gin_bindings`. A VALUE that is not gin syntax is
    taken as a string."""
    given = sys.argv[1:] if arguments is None else arguments
    bindings = []
    for argument in (a for a in given if a.startswith("--gin.")):
        name, equals, value = argument.removeprefix("--gin.").partition("=")
        if not (name and equals):
            parser.error(f"{argument}: a gin flag is written --gin.NAME=VALUE")
        plain = re.fullmatch(r"[\d.eE+-]+|True|False|None|[\['\"(@%{].*", value)
        bindings.append(f"{name} = {value if plain else repr(value)}")
    flags = parser.parse_args([a for a in given if not a.startswith("--gin.")])
    flags.gin_bindings = bindings
    return flags


def manifests(path: pathlib.Path) -> list[tuple[dict[str, Any], float]]:
    """The manifests of all splits of a mixture file's tasks, each with its task's rate."""
    found = []
    for component in read_json(path)["components"]:
        for manifest in sorted((path.parent.parent / component["directory"]).glob("*/manifest.json")):
            found.append((read_json(manifest), component["rate"]))
    return found


def summary(manifest: dict[str, Any], rate: float) -> str:
    """A line about a split: its size, and what was left out, replaced or cut on the way."""
    m = manifest
    line = (
        f"{m['task']:<24} {m['split']:<12} rate {rate:<8g} {m['documents']:>10,} documents "
        f"{m['tokens']:>14,} tokens {m['bytes']:>14,} bytes"
    )
    words = {
        "empty": "empty documents left out",
        "invalid_utf8": "documents with invalid UTF-8 replaced",
        "cut": "cuts in long files",
    }
    notes = [f"{m['counts'][name]:,} {text}" for name, text in words.items() if m["counts"].get(name)]
    return "; ".join([line, *notes])


if __name__ == "__main__":
    main()
