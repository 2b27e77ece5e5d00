"""Writing the token cache of a task: shard by shard, by as many processes as one likes, restartable.

The shards of a split are those of its source (its files, dealt out in turn to at most `MOST_SHARDS`), so that the cache
does not depend on the number of processes. A shard's folder appears by one rename, in a working folder that a later run
goes on with; the task's folder appears by another when all shards are there. Nothing half-made can be taken for a cache.
"""

import array
import concurrent.futures
import contextlib
import fcntl
import logging
import multiprocessing
import os
import pathlib
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import numpy as np

from tasks import cache_files, plain_text, provenance
from tasks.cache_files import DATA_FILES, FEATURE, CacheError

if TYPE_CHECKING:
    import seqio

logger = logging.getLogger(__name__)

MOST_SHARDS = 128
_STALE_SECONDS = 24 * 3600
_PROGRESS_SECONDS = 10.0


def build_task(
    task: "seqio.Task",
    cache_dir: pathlib.Path,
    identity: dict[str, Any],
    vocabulary: dict[str, Any],
    *,
    processes: int = 1,
    prepare: Callable[[], None] = lambda: None,
    published: dict[str, dict[str, int]] | None = None,
    texts: tuple[str, ...] = (FEATURE,),
) -> pathlib.Path:
    """Makes DIR/TASK/FINGERPRINT unless it is there, and returns it.

    Args:
      task: a seqio task whose only feature is `targets`, one of pairs, or a labelled one.
      cache_dir: where caches lie.
      identity: what the contents depend on; its digest is the fingerprint.
      vocabulary: description of the vocabulary.
      processes: how many work at once; above 1 each is a fresh interpreter, which needs the task in its registry.
      prepare: picklable; registers the task in such an interpreter.
      published: {split: {'documents', 'words'}} of the published corpus; where the documents agree, the words are
        recorded.
      texts: the features whose documents are cached; without `targets` among them it is a labelled task.

    Raises:
      CacheError: for tokens or classes outside the vocabulary, or an existing cache that is damaged.
    """
    fingerprint = cache_files.digest(identity)
    target = cache_dir / task.name / fingerprint
    splits = sorted(task.splits)
    if not target.is_dir():
        target.parent.mkdir(parents=True, exist_ok=True)
        with _one_at_a_time(target.parent / f".lock-{fingerprint}"):
            if not target.is_dir():
                _make(task, target, splits, identity, vocabulary, processes, prepare, published or {}, texts)
    for split in splits:
        if (target / split).exists() or not _missing(task, split):
            cache_files.check(target / split)
    return target


def _make(task, target, splits, identity, vocabulary, processes, prepare, published, texts) -> None:
    _remove_stale(target.parent)
    working = target.parent / f".making-{target.name}"
    splits = [split for split in splits if not _missing(task, split)]
    if not splits:
        raise CacheError(f"{task.name!r} has no documents: {_missing(task, sorted(task.splits)[0])}")
    jobs = [(split, index, count) for split in splits for count in [_shards(task, split)] for index in range(count)]
    jobs = [job for job in jobs if not _is_made(working / job[0] / cache_files.shard_name(job[1]))]
    logger.info("Tokenizing %s (%s) into %s: %d shards to make", task.name, ", ".join(splits), target, len(jobs))
    began, tokens = time.monotonic(), 0
    for done, (split, shard) in enumerate(_run(task, jobs, working, vocabulary, processes, prepare, texts), 1):
        tokens += shard["tokens"]
        rate = tokens / max(time.monotonic() - began, 1e-9)
        logger.info(
            "%s %s: %d of %d shards, %s documents in this one, %s tokens a second",
            *(task.name, split, done, len(jobs), f"{shard['documents']:,}", f"{rate:,.0f}"),
        )
    for split in splits:
        _finish_split(task, working / split, split, identity, vocabulary, published.get(split))
    try:
        working.rename(target)
    except OSError:
        # A process on another machine was quicker; its cache has the same contents.
        if not target.is_dir():
            raise


def _run(task, jobs, working, vocabulary, processes, prepare, texts) -> Iterator[tuple[str, dict[str, Any]]]:
    """Makes the shards, and gives (split, manifest) as each is done."""
    if processes == 1 or len(jobs) < 2:
        for split, index, count in jobs:
            yield split, write_shard(task, split, index, count, working, vocabulary, texts)
        return
    # TensorFlow does not survive a fork.
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(min(processes, len(jobs)), context, _set_up, (prepare,)) as pool:
        futures = {pool.submit(_write_registered, task.name, *job, working, vocabulary, texts): job[0] for job in jobs}
        try:
            for future in concurrent.futures.as_completed(futures):
                yield futures[future], future.result()
        except concurrent.futures.process.BrokenProcessPool as error:
            raise CacheError(
                f"A process that tokenised {task.name!r} died, for lack of memory perhaps: try fewer --processes. Finished "
                "shards are kept; start again to go on."
            ) from error
        finally:
            pool.shutdown(cancel_futures=True)


def _set_up(prepare: Callable[[], None]) -> None:
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    prepare()


def _write_registered(name: str, *arguments: Any) -> dict[str, Any]:
    import seqio

    return write_shard(seqio.TaskRegistry.get(name), *arguments)


def write_shard(
    task: "seqio.Task",
    split: str,
    index: int,
    count: int,
    working: pathlib.Path,
    vocabulary: dict[str, Any],
    texts: tuple[str, ...] = (FEATURE,),
) -> dict[str, Any]:
    """Writes shard `index` of `count` of a split below the working folder, and returns its manifest."""
    dtype = np.dtype(np.min_scalar_type(vocabulary["size"] - 1)).newbyteorder("<")
    offsets, lengths, labels = array.array("q", [0]), array.array("q"), array.array("q")
    (working / split).mkdir(parents=True, exist_ok=True)
    os.utime(working)
    counts = getattr(getattr(task, "source", None), "counts", None)
    if counts is not None:
        counts.clear()
    temporary = pathlib.Path(tempfile.mkdtemp(prefix=".shard-", dir=working / split))
    try:
        shown = time.monotonic()
        with open(temporary / "tokens.bin", "wb") as file:
            for tokens, byte_length, label in _documents(task, split, index, count, texts):
                if label is not None:
                    labels.append(_checked_label(label, task.name, split, vocabulary["classes"]))
                if tokens.size and not 0 <= int(tokens.min()) <= int(tokens.max()) < vocabulary["size"]:
                    raise CacheError(
                        f"Document {len(lengths)} of {task.name!r}, split {split!r}, has token ids from {tokens.min()} "
                        f"to {tokens.max()}, outside its vocabulary of {vocabulary['size']}."
                    )
                file.write(tokens.astype(dtype).tobytes())
                offsets.append(offsets[-1] + tokens.size)
                lengths.append(byte_length)
                if time.monotonic() - shown > _PROGRESS_SECONDS:
                    shown = time.monotonic()
                    logger.info("%s %s, shard %d of %d: %s tokens", task.name, split, index, count, f"{offsets[-1]:,}")
        np.save(temporary / "offsets.npy", np.frombuffer(offsets, np.int64))
        np.save(temporary / "bytes.npy", np.array(lengths, np.int64))
        files = DATA_FILES
        if FEATURE not in texts:
            files = (*DATA_FILES, cache_files.LABELS_FILE)
            np.save(temporary / cache_files.LABELS_FILE, np.array(labels, np.int64))
        shard = {
            "documents": len(lengths),
            "tokens": offsets[-1],
            "bytes": sum(lengths),
            "counts": _counted(task, split),
            "files": {
                name: {"size": (temporary / name).stat().st_size, "sha256": cache_files.sha256(temporary / name)}
                for name in files
            },
        }
        cache_files.write_whole(temporary / "manifest.json", shard)
        for name in files:
            cache_files.sync(temporary / name)
        temporary.chmod(0o755)
        made = working / split / cache_files.shard_name(index)
        try:
            temporary.rename(made)
        except OSError:
            if not _is_made(made):
                raise
        return shard
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _counted(task: "seqio.Task", split: str) -> dict[str, int]:
    """What the task's source met in the reading of a shard, if it can tell; see `corpora.source` and `pairs.source`."""
    source = getattr(task, "source", None)
    left_out = getattr(source, "left_out", None)
    counts = left_out(split) if left_out is not None else getattr(source, "counts", None)
    return dict(sorted(counts.items())) if counts else {}


def documents(task: "seqio.Task", split: str, index: int = 0, count: int = 1) -> Iterator[tuple[np.ndarray, int]]:
    """Tokens [n] and text length in bytes of each document of a shard, as the task's preprocessors make them."""
    for tokens, byte_length, _ in _documents(task, split, index, count, (FEATURE,)):
        yield tokens, byte_length


def _documents(
    task: "seqio.Task", split: str, index: int, count: int, texts: tuple[str, ...]
) -> Iterator[tuple[np.ndarray, int, np.ndarray | None]]:
    """As `documents`; of a labelled task also the class ids [1], with the first document of each example."""
    if texts == (FEATURE,) and plain_text.is_plain(task):
        for tokens, byte_length in plain_text.documents(task, split, index, count):
            yield tokens, byte_length, None
        return
    shard = {}
    if count > 1:
        import seqio

        shard = {"shard_info": seqio.ShardInfo(index, count)}
    dataset = task.get_dataset(
        sequence_length=None, split=split, shuffle=False, trim_output_features=False, try_in_mem_cache=False, **shard
    )
    examples = dataset.as_numpy_iterator()
    while True:
        try:
            example = next(examples, None)
        except Exception as error:
            # TensorFlow hides what a source raised in an error of its own.
            raise (getattr(task.source, "failure", None) or error) from None
        if example is None:
            return
        label = None if FEATURE in texts else example[FEATURE]
        for feature in texts:
            tokens = example[feature]
            text = example.get(f"{feature}_pretokenized")
            if not isinstance(text, bytes):
                # What a labelled task classifies need not be text.
                decode = task.output_features[feature].vocabulary.decode
                text = decode([int(t) for t in tokens]).encode("utf-8") if label is None else b""
            yield tokens, len(text), label if feature == texts[0] else None


def _checked_label(label: np.ndarray, name: str, split: str, classes: int) -> int:
    """The single class id of an example."""
    ids = [int(i) for i in np.ravel(label)]
    if len(ids) != 1 or not 0 <= ids[0] < classes:
        raise CacheError(
            f"An example of {name!r}, split {split!r}, has the targets {ids[:8]}; a labelled task has one class id below "
            f"{classes}."
        )
    return ids[0]


def _finish_split(task, directory, split, identity, vocabulary, published) -> None:
    for left in directory.glob(".shard-*"):
        shutil.rmtree(left, ignore_errors=True)
    count = _shards(task, split)
    shards = [cache_files.read_json(directory / cache_files.shard_name(i) / "manifest.json") for i in range(count)]
    total = {name: sum(shard[name] for shard in shards) for name in ("documents", "tokens", "bytes")}
    counts: dict[str, int] = {}
    for shard in shards:
        for name, value in shard.pop("counts").items():
            counts[name] = counts.get(name, 0) + value
    manifest = {
        **identity,
        "split": split,
        **total,
        "counts": counts,
        "dtype": np.dtype(np.min_scalar_type(vocabulary["size"] - 1)).newbyteorder("<").str,
        "vocabulary": vocabulary,
        "made_by": {name: provenance.version(name) for name in ("t5x_ssm", "seqio", "sentencepiece", "python")},
        "shards": shards,
    }
    if published and published["documents"] == total["documents"]:
        manifest["words"] = published["words"]
    cache_files.write_whole(directory / "manifest.json", manifest)


def _shards(task: "seqio.Task", split: str) -> int:
    return min(MOST_SHARDS, max(1, len(task.source.list_shards(split))))


def _missing(task: "seqio.Task", split: str) -> str | None:
    """Why a corpus has no such split here, if it has none; train must be there."""
    missing = getattr(task.source, "missing", None)
    return missing(split) if missing is not None else None


def _is_made(directory: pathlib.Path) -> bool:
    """Whether a shard is whole: left by a killed run, it need not be."""
    if not (directory / "manifest.json").is_file():
        return False
    try:
        cache_files.check_shard(directory, cache_files.read_json(directory / "manifest.json"), "")
    except CacheError:
        shutil.rmtree(directory)
        return False
    return True


@contextlib.contextmanager
def _one_at_a_time(path: pathlib.Path) -> Iterator[None]:
    """Runs of one machine wait for each other; the kernel lets go of a killed one's lock."""
    with open(path, "wb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
        path.unlink(missing_ok=True)


def _remove_stale(folder: pathlib.Path) -> None:
    """Removes what runs of other versions left and nobody goes on with; with a day's grace."""
    for path in folder.glob(".making-*"):
        if time.time() - path.stat().st_mtime > _STALE_SECONDS:
            shutil.rmtree(path, ignore_errors=True)
