"""From a token cache to training windows: every batch is a function of (seed, step).

A `TokenStream` is one split of one cached task: the tokens of all its documents, one after the other. Its windows of
any length are the training examples; the offsets of the documents give segment ids and positions, so packing has no
state. `training_rows` puts the streams of a mixture together: row r of the run, counted over all batches from zero,
is found in constant time, whatever r is and however many processes share the batch.
"""

import collections
import fractions
import hashlib
import heapq
import itertools
import pathlib
import sys
from collections.abc import Callable, Sequence
from typing import Any

import grain
import numpy as np

from t5x_ssm.data.token_stream import Batch, TokenStream
from t5x_ssm.errors import DataError
from tasks import cache


class WindowSource:
    """The whole windows of a stream as a random-access source (Grain's protocol: length and index).

    The last tokens of the stream, fewer than one window, are not in it.
    """

    def __init__(self, stream: TokenStream, length: int, *, segments: bool = True):
        self.stream, self.length, self.segments = stream, length, segments
        if len(self) == 0:
            raise DataError(
                f"{stream.task!r} has {len(stream):,} tokens, fewer than one window of task_feature_lengths"
                f"['targets'] = {length:,}."
            )

    def __len__(self) -> int:
        return len(self.stream) // self.length

    def __getitem__(self, index: int) -> Batch:
        start = int(index) * self.length
        return self.stream.window(start, start + self.length, self.length, segments=self.segments)

    def __repr__(self) -> str:
        return f"WindowSource({self.stream.task}, length={self.length}, segments={self.segments})"


class CachedMixture:
    """One split of a cached mixture, or of a task alone: its streams and their rates.

    Attributes:
      name: the mixture's or task's name.
      vocabulary: description of the vocabulary that all streams share (`tasks.vocabularies.describe`).
      streams: one per task.
      rates: one per task, positive.
      made_from: settings and versions that the cache was made under.
    """

    def __init__(
        self,
        path: pathlib.Path,
        split: str,
        *,
        checksums: bool = False,
        open_stream: Callable[..., Any] = TokenStream,
    ):
        """Opens a split of the mixture file `path`, which `tasks.cache.find` gives.

        Args:
          path: the mixture file.
          split: 'train', …
          checksums: reads the split whole and compares.
          open_stream: called with (directory, checksums=…) for each task.

        Raises:
          ValueError: for a split that a task does not have, and for damaged files.
        """
        mixture = cache.read_json(path)
        cache_dir = path.parent.parent
        self.name: str = mixture["name"]
        self.vocabulary: dict = mixture["vocabulary"]
        self.made_from: dict = mixture["environment"]
        self.rates = [component["rate"] for component in mixture["components"]]
        self.streams = []
        for component in mixture["components"]:
            directory = cache_dir / component["directory"]
            splits = sorted(p.parent.name for p in directory.glob("*/manifest.json"))
            if splits and split not in splits:
                raise DataError(f"{component['task']!r} has no split {split!r}; it has {', '.join(splits)}.")
            self.streams.append(open_stream(directory / split, checksums=checksums))

    @property
    def counts(self) -> dict[str, int]:
        """What was left out, replaced or cut in all streams, by name: see `TokenStream.counts`."""
        counts: collections.Counter[str] = collections.Counter()
        for stream in self.streams:
            counts.update(stream.counts)
        return dict(sorted(counts.items()))

    @property
    def checksum(self) -> str:
        """Identifies the contents and rates: with it, a seed and a step, a batch is given."""
        parts = [f"{s.task} {rate!r} {s.checksum}" for s, rate in zip(self.streams, self.rates, strict=True)]
        return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:32]


class ProportionalSchedule(grain.transforms.DatasetSelectionMap):
    """Which stream gives row r, and its how-manieth row that is: exact, without state, in constant time.

    The rows are divided in two, in the exact proportion of the rates and as evenly as integers allow; each part is
    divided again. (Grain's own mixing rounds the rates, so that long runs drift from them.) Two streams hold their
    rates to within one row in every window. More streams cannot in general; here each division can add half a row,
    and three streams stay within one row of their rates in the rows up to any point.
    """

    def __init__(self, rates: Sequence[float]):
        """Rates are relative; each must be positive."""
        if not rates or not all(0 < rate < float("inf") for rate in rates):
            raise DataError(f"The rates of a mixture must be positive, but they are {list(rates)}.")
        # A float means the decimal that it prints as: 0.1 is one tenth.
        order = itertools.count()
        heap = [(fractions.Fraction(str(rate)), next(order), i) for i, rate in enumerate(rates)]
        heapq.heapify(heap)
        while len(heap) > 1:
            # Joining the smallest first keeps the divisions near the root even, where their rounding counts most.
            (small, _, a), (large, _, b) = heapq.heappop(heap), heapq.heappop(heap)
            share = small / (small + large)
            heapq.heappush(heap, (small + large, next(order), (share.numerator, share.denominator, a, b)))
        self._tree = heap[0][2]

    def __len__(self) -> int:
        return sys.maxsize

    def __getitem__(self, row: int) -> tuple[int, int]:
        node, row = self._tree, int(row)
        while not isinstance(node, int):
            numerator, denominator, a, b = node
            # Of the first n rows, n * share go to the first part, rounded to the nearest integer.
            before, after = ((2 * n * numerator + denominator) // (2 * denominator) for n in (row, row + 1))
            node, row = (a, before) if after > before else (b, row - before)
        return node, row


def training_rows(
    mixture: CachedMixture, length: int, *, seed: int, shuffle: bool = True, segments: bool = True
) -> grain.MapDataset:
    """The endless rows of a run: row r is a function of the seed and r alone.

    Args:
      mixture: what to read.
      length: tokens per row.
      seed: any integer. Each stream is shuffled by a permutation of its own, another one in every epoch.
      shuffle: whether the windows of each stream are shuffled, or come in their order.
      segments: whether documents are told apart, see `TokenStream.window`.

    Returns:
      A random-access dataset; index it with r.
    """
    windows = [WindowSource(stream, length, segments=segments) for stream in mixture.streams]
    return endless_rows(mixture, windows, seed=seed, shuffle=shuffle)


def endless_rows(
    mixture: CachedMixture, sources: Sequence[Any], *, seed: int, shuffle: bool = True
) -> grain.MapDataset:
    """The rows of random-access sources, one for each stream of a mixture, at its rates and without end.

    Arguments and result as of `training_rows`.
    """
    parts = []
    for stream, source in zip(mixture.streams, sources, strict=True):
        part = grain.MapDataset.source(source)
        if shuffle:
            # Grain gives epoch e the seed + e; hashed seeds keep runs with seeds 0 and 1 from sharing epochs.
            digest = hashlib.sha256(f"{seed} {stream.task}".encode()).digest()
            part = part.shuffle(seed=int.from_bytes(digest[:4], "little"))
        parts.append(part.repeat())
    return grain.MapDataset.select_from_datasets(parts, ProportionalSchedule(mixture.rates))


def stack(examples: Sequence[Batch]) -> Batch:
    """Rows of equal length as one batch [rows, length]."""
    return {name: np.stack([example[name] for example in examples]) for name in examples[0]}
