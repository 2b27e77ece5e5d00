"""How fast the indexed feed is: `python -m benchmarks.feeding [--length=4096] [--repeats=7]`.

On one core, in one run:
  feed    tokens a second of the training feed (mixture, shuffling, packing, prefetching and all) over a warm local cache of the
          embedded corpora, beside a plain memory-mapped numpy reader that cuts random windows and shifts them
  large   a cache of 100 million documents that is made here of holes and hard links: opening it as a training feed and
          reading the batch at a step of a billion, in a process of its own, with the memory that the process grew by
Writes benchmarks/results/feeding.json.
"""

import argparse
import json
import os
import pathlib
import subprocess
import sys
import tempfile
import time

import numpy as np

from benchmarks import report, timing
from t5x_ssm.data.feed import DatasetConfig, open_feed
from t5x_ssm.data.sources import CachedMixture
from tasks import cache

MIXTURE = "embedded_books_code_math"
BATCH = 32
SHARDS, DOCUMENTS, DOCUMENT = 100, 1_000_000, 100
FAR = 1_000_000_000


def plain_reader(streams: list[np.ndarray], length: int, seed: int = 0):
    """Batches of random windows, each as inputs and targets."""
    random = np.random.default_rng(seed)
    while True:
        targets = np.empty((BATCH, length), np.int32)
        for row in targets:
            tokens = streams[random.integers(len(streams))]
            start = int(random.integers(len(tokens) - length))
            row[:] = tokens[start : start + length]
        inputs = np.zeros_like(targets)
        inputs[:, 1:] = targets[:, :-1]
        yield {"decoder_input_tokens": inputs, "decoder_target_tokens": targets}


def tokens_a_second(batches, length: int, seconds: float = 2.0) -> float:
    """Tokens of target a second of wall time."""
    batches()
    count, began = 0, time.perf_counter()
    while (elapsed := time.perf_counter() - began) < seconds:
        batches()
        count += 1
    return count * BATCH * length / elapsed


def feed(length: int, repeats: int) -> dict:
    """The feed beside the plain reader, in turns."""
    config = DatasetConfig(MIXTURE, {"targets": length}, "train", BATCH)
    indexed = open_feed(config)
    mixture = CachedMixture(cache.find(MIXTURE), "train")
    plain = plain_reader(
        [array for stream in mixture.streams for array in stream._tokens if len(array) > length], length
    )
    speeds: dict[str, list[float]] = {"feed": [], "plain": []}
    for _ in range(repeats):
        speeds["feed"].append(tokens_a_second(indexed.next, length))
        speeds["plain"].append(tokens_a_second(plain.__next__, length))
    indexed.close()
    return {
        "length": length,
        "batch": BATCH,
        "tokens_per_second": {name: report.spread(values) for name, values in speeds.items()},
        "feed_over_plain": timing.ratios(speeds["feed"], speeds["plain"]),
    }


def make_large_cache(root: pathlib.Path) -> None:
    """One task of 100 shards of a million documents: the first shard's files, and hard links to them."""
    split = root / "large" / "made" / "train"
    first = split / "00000"
    first.mkdir(parents=True)
    with (first / "tokens.bin").open("wb") as file:
        file.truncate(2 * DOCUMENTS * DOCUMENT)
    np.save(first / "offsets.npy", np.arange(DOCUMENTS + 1, dtype=np.int64) * DOCUMENT)
    np.save(first / "bytes.npy", np.full(DOCUMENTS, DOCUMENT, np.int64))
    files = {path.name: {"size": path.stat().st_size, "sha256": "0" * 64} for path in first.iterdir()}
    for index in range(1, SHARDS):
        shard = split / f"{index:05d}"
        shard.mkdir()
        for name in files:
            os.link(first / name, shard / name)
    count = {"documents": DOCUMENTS, "tokens": DOCUMENTS * DOCUMENT, "bytes": DOCUMENTS * DOCUMENT}
    shard = {**count, "files": files}
    vocabulary = {"name": "bytes", "size": 259, "extra_ids": 0, "pad_id": 0, "eos_id": 1, "unk_id": 2, "hash": "0"}
    manifest = {
        "format": cache.FORMAT,
        "task": "large",
        **{name: SHARDS * value for name, value in count.items()},
        "dtype": "<u2",
        "vocabulary": vocabulary,
        "shards": [shard] * SHARDS,
    }
    (split / "manifest.json").write_text(json.dumps(manifest))
    component = {"task": "large", "rate": 1.0, "directory": "large/made"}
    mixture = {"name": "large", "components": [component], "vocabulary": vocabulary, "environment": {}}
    (root / "large" / "made.json").write_text(json.dumps({"format": cache.FORMAT, **mixture}))


def resident_bytes() -> int:
    """Memory of this process, pages of mapped files included."""
    return int(pathlib.Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def open_large(root: str, length: int) -> None:
    """Run in a process of its own: prints seconds and memory of opening the large cache and of seeking in it."""
    config = DatasetConfig("large", {"targets": length}, "train", BATCH, cache_dir=root)
    before, began = resident_bytes(), time.perf_counter()
    indexed = open_feed(config)
    opened = time.perf_counter()
    indexed.restore({**indexed.state(), "step": FAR})
    indexed.next()
    figures = {
        "seconds_to_open": opened - began,
        "seconds_to_seek_and_read": time.perf_counter() - opened,
        "grown_MiB": (resident_bytes() - before) / 2**20,
    }
    indexed.close()
    print(json.dumps(figures))


def large(length: int, repeats: int) -> dict:
    """Opening and seeking."""
    with tempfile.TemporaryDirectory() as root:
        make_large_cache(pathlib.Path(root))
        command = [sys.executable, "-m", "benchmarks.feeding", f"--length={length}", f"--open_large={root}"]
        runs = [
            json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()[-1])
            for _ in range(repeats)
        ]
    return {
        "documents": SHARDS * DOCUMENTS,
        "tokens": SHARDS * DOCUMENTS * DOCUMENT,
        "step": FAR,
        **{name: report.spread([run[name] for run in runs]) for name in runs[0]},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--length", type=int, default=4096)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--open_large", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.open_large:
        return open_large(options.open_large, options.length)
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    report.write("feeding", {"feed": feed(options.length, options.repeats), "large": large(options.length, 3)})


if __name__ == "__main__":
    main()
