"""Shows what a mixture holds: `python -m tasks.inspect --mixture=NAME [--split=train] [--length=4096] [--examples=2]`.

Prints, for every task, documents, tokens and bytes, how much padding rows of a length would have, and decoded documents
with their boundaries; writes a histogram of document lengths as PNG. It reads the token cache, and makes a missing one.
"""

import argparse
import itertools
import logging
import os
import pathlib
import sys
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from tasks import cache, cache_files


def document_lengths(directory: pathlib.Path, manifest: dict[str, Any]) -> np.ndarray:
    """Tokens of every document of a split, int64 [documents]."""
    parts = [
        np.diff(np.load(directory / cache_files.shard_name(i) / "offsets.npy")) for i in range(len(manifest["shards"]))
    ]
    return np.concatenate(parts)


def documents(directory: pathlib.Path, manifest: dict[str, Any]) -> Iterator[np.ndarray]:
    """Tokens of the documents of a split, in order, memory-mapped."""
    for index, shard in enumerate(manifest["shards"]):
        folder = directory / cache_files.shard_name(index)
        offsets = np.load(folder / "offsets.npy", mmap_mode="r")
        tokens = np.memmap(folder / "tokens.bin", manifest["dtype"], mode="r") if shard["tokens"] else []
        for start, stop in itertools.pairwise(offsets):
            yield tokens[start:stop]


def padding(lengths: np.ndarray, length: int) -> float:
    """The part of rows of `length` tokens that is padding when every document, or piece of one, has rows of its own.

    Windows of the stream, which training reads, have none.
    """
    rows = int(np.sum(-(-lengths // length)))
    return 1 - int(lengths.sum()) / (rows * length) if rows else 0.0


def report(path: pathlib.Path, split: str, *, length: int, examples: int, characters: int, vocabulary: Any) -> str:
    """The text that the command prints about a mixture file's split."""
    lines = []
    for directory, manifest, rate in _splits(path, split):
        lengths = document_lengths(directory, manifest)
        # Of pairs, which are never windows of a stream: the names of an example's documents.
        names = manifest.get("texts") or ["document"]
        windows = "" if "texts" in manifest else ", 0.0% in windows of the stream"
        lines.append(cache.summary(manifest, rate))
        if len(lengths):
            quantiles = ", ".join(f"{int(q):,}" for q in np.quantile(lengths, [0, 0.25, 0.5, 0.75, 1]))
            per_token = manifest["bytes"] / max(manifest["tokens"], 1)
            lines.append(
                f"  document lengths (least, quartiles, most) {quantiles} tokens; {per_token:.3f} bytes a token; at length "
                f"{length:,}: {padding(lengths, length):.1%} padding with a document a row{windows}"
            )
        for number, tokens in zip(range(examples * len(names)), documents(directory, manifest), strict=False):
            text = vocabulary.decode([int(token) for token in tokens[: 4 * characters]])
            if not isinstance(text, str):  # Symbols, pixels and samples of labelled tasks.
                text = " ".join(map(str, text))
            shown = text[:characters] + (" …" if len(text) > characters or len(tokens) > 4 * characters else "")
            lines += [
                f"  ┌── {names[number % len(names)]} {number // len(names)}, {len(tokens):,} tokens",
                *(f"  │ {line}" for line in shown.split("\n")),
            ]
            lines.append(f"  └── end of {names[number % len(names)]}")
    return "\n".join(lines)


def write_histogram(path: pathlib.Path, split: str, target: pathlib.Path) -> None:
    """Draws the lengths of documents, a curve for each task.

    Raises:
      CacheError: if matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise cache.CacheError(
            "The histogram needs matplotlib; install t5x_ssm[plots], or give --histogram=''."
        ) from None
    axes = (figure := Figure(figsize=(8, 4.5), layout="constrained")).subplots()
    found = {m["task"]: document_lengths(d, m) for d, m, _ in _splits(path, split)}
    longest = max((int(lengths.max()) for lengths in found.values() if len(lengths)), default=1)
    edges = np.geomspace(1, max(longest, 2), 50)
    for task, lengths in found.items():
        axes.hist(lengths, edges, histtype="step", label=f"{task} ({len(lengths):,})")
    axes.set(xscale="log", xlabel="tokens in a document", ylabel="documents", title=f"{path.parent.name}, {split}")
    axes.legend()
    target.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(target)


def _splits(path: pathlib.Path, split: str) -> Iterator[tuple[pathlib.Path, dict[str, Any], float]]:
    for component in cache.read_json(path)["components"]:
        directory = path.parent.parent / component["directory"] / split
        if not directory.is_dir():
            have = sorted(p.parent.name for p in directory.parent.glob("*/manifest.json"))
            raise cache.CacheError(f"{component['task']!r} has no split {split!r}; it has {', '.join(have)}.")
        yield directory, cache.check(directory), component["rate"]


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m tasks.inspect", description=__doc__.split(":")[0])
    parser.add_argument("--mixture", required=True, help="a registered seqio task or mixture")
    parser.add_argument("--split", default="train")
    parser.add_argument("--length", type=int, default=4096, help="tokens per row, for the padding")
    parser.add_argument("--examples", type=int, default=2, help="documents to show of each task")
    parser.add_argument("--characters", type=int, default=400, help="how much of a document to show")
    parser.add_argument("--output_dir", "--cache_dir", default=None, help="where caches lie")
    parser.add_argument("--histogram", default=None, help="PNG to write (default: MIXTURE-SPLIT.png); '' for none")
    cache.add_registration_flags(parser)
    flags = cache.parse_flags(parser, arguments)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    if flags.length < 1:
        sys.exit(f"tasks.inspect: --length={flags.length}; a row has at least 1 token.")
    modules = ("tasks", *flags.module)
    try:
        path = cache.build(
            flags.mixture,
            flags.output_dir,
            modules=modules,
            gin_files=flags.gin_file,
            gin_bindings=flags.gin_bindings,
        )
        vocabulary = next(iter(cache.registered(flags.mixture, modules).output_features.values())).vocabulary
        shown = {"length": flags.length, "examples": flags.examples, "characters": flags.characters}
        print(report(path, flags.split, vocabulary=vocabulary, **shown))
        histogram = f"{flags.mixture}-{flags.split}.png" if flags.histogram is None else flags.histogram
        if histogram:
            write_histogram(path, flags.split, pathlib.Path(histogram))
            print(histogram)
    except (ValueError, OSError) as error:
        sys.exit(f"tasks.inspect: {error}")


if __name__ == "__main__":
    main()
