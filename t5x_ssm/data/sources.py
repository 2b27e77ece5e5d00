"""From a token cache to training windows: every batch is a function of (seed, step).

A `TokenStream` is one split of one cached task: the tokens of all its documents, one after the other. Its windows of
any length are the training examples; the offsets of the documents give segment ids and positions, so packing has no
state. `training_rows` puts the streams of a mixture together: row r of the run, counted over all batches from zero,
is found in constant time, whatever r is and however many processes share the batch.
"""

import fractions
import hashlib
import heapq
import itertools
import pathlib
import sys
from collections.abc import Sequence

import grain
import numpy as np

from t5x_ssm.errors import DataError
from tasks import cache

Batch = dict[str, np.ndarray]


class TokenStream:
    """One split of one cached task, memory-mapped.

    Attributes:
      task: the task's name.
      tokens: [tokens] unsigned, every document's tokens in order, EOS included where the task appends one.
      offsets: int64 [documents + 1], where each document starts, and the end.
      byte_lengths: int64 [documents], length of each document's text.
      checksum: identifies the contents.
    """

    def __init__(self, directory: pathlib.Path, *, checksums: bool = False):
        """Opens a split; `checksums` reads it whole and compares (sizes are always compared).

        Raises:
          ValueError: naming a missing, truncated or altered file.
        """
        manifest = cache.check(directory, checksums=checksums)
        self.task: str = manifest["task"]
        self.checksum: str = manifest["files"]["tokens.bin"]["sha256"]
        dtype = np.dtype(manifest["dtype"])
        if manifest["tokens"]:
            self.tokens = np.memmap(directory / "tokens.bin", dtype, mode="r")
        else:
            self.tokens = np.zeros(0, dtype)
        self.offsets = np.load(directory / "offsets.npy", mmap_mode="r")
        self.byte_lengths = np.load(directory / "bytes.npy", mmap_mode="r")
        if self.tokens.size != manifest["tokens"] or self.offsets[-1] != self.tokens.size:
            raise DataError(
                f"The files of the token cache {directory} contradict each other; remove {directory.parent}."
            )

    def __len__(self) -> int:
        return self.tokens.size

    @property
    def num_bytes(self) -> int:
        """Length of all documents' text in bytes."""
        return int(np.sum(self.byte_lengths, dtype=np.int64))

    def bytes_before(self, positions: Sequence[int]) -> np.ndarray:
        """Bytes of text before each token position, int64; differences add up exactly to `num_bytes` over the stream.

        Inside a document, bytes are shared out evenly over its tokens.
        """
        positions = np.asarray(positions, np.int64)
        ends = np.concatenate([[0], np.cumsum(self.byte_lengths, dtype=np.int64)])
        document = np.searchsorted(self.offsets, positions, side="right") - 1
        inside = np.minimum(document, len(self.byte_lengths) - 1)
        length = self.offsets[inside + 1] - self.offsets[inside]
        into = self.byte_lengths[inside] * (positions - self.offsets[inside]) // np.maximum(length, 1)
        return np.where(document == len(self.byte_lengths), ends[-1], ends[inside] + into)

    def window(self, start: int, stop: int, length: int, *, segments: bool = True) -> Batch:
        """Tokens start…stop as one example of a decoder, padded with zeros to `length`.

        Args:
          start: first token of the window.
          stop: end of the window, at most `length` tokens on.
          length: length of the arrays.
          segments: whether documents are told apart. If so, segment ids count the documents of the window from 1
            (a document that continues from an earlier window counts like any other), positions count from 0 in each,
            and the first input token of each is 0 (BOS). If not, the window is one running text: no segment ids and
            positions, and BOS stands at its beginning only.

        Returns:
          int32 [length] arrays under the names of seqio's decoder feature converter. The first input token of a
          window is always 0, as seqio has it, although in the middle of a document the preceding token is known.
        """
        count = stop - start
        targets = np.zeros(length, np.int32)
        targets[:count] = self.tokens[start:stop]
        inputs = np.zeros(length, np.int32)
        inputs[1:count] = targets[: max(count - 1, 0)]
        weights = np.zeros(length, np.int32)
        weights[:count] = 1
        example = {
            "decoder_input_tokens": inputs,
            "decoder_target_tokens": targets,
            "decoder_loss_weights": weights,
        }
        if segments:
            low, high = np.searchsorted(self.offsets, [start + 1, stop], side="left")
            # A document without tokens begins where the next one does, and is no segment.
            begins = np.concatenate([[0], np.unique(self.offsets[low:high]) - start])
            inputs[begins] = 0
            which = np.searchsorted(begins, np.arange(count), side="right")
            ids, positions = np.zeros(length, np.int32), np.zeros(length, np.int32)
            ids[:count] = which
            positions[:count] = np.arange(count) - begins[which - 1]
            example |= {"decoder_segment_ids": ids, "decoder_positions": positions}
        return example


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
    """

    def __init__(self, path: pathlib.Path, split: str, *, checksums: bool = False):
        """Opens a split of the mixture file `path`, which `tasks.cache.find` gives.

        Raises:
          ValueError: for a split that a task does not have, and for damaged files.
        """
        mixture = cache.read_json(path)
        cache_dir = path.parent.parent
        self.name: str = mixture["name"]
        self.vocabulary: dict = mixture["vocabulary"]
        self.rates = [component["rate"] for component in mixture["components"]]
        self.streams = []
        for component in mixture["components"]:
            directory = cache_dir / component["directory"]
            splits = sorted(p.parent.name for p in directory.glob("*/manifest.json"))
            if splits and split not in splits:
                raise DataError(f"{component['task']!r} has no split {split!r}; it has {', '.join(splits)}.")
            self.streams.append(TokenStream(directory / split, checksums=checksums))

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
    parts = []
    for stream in mixture.streams:
        part = grain.MapDataset.source(WindowSource(stream, length, segments=segments))
        if shuffle:
            # Grain gives epoch e the seed + e; hashed seeds keep runs with seeds 0 and 1 from sharing epochs.
            digest = hashlib.sha256(f"{seed} {stream.task}".encode()).digest()
            part = part.shuffle(seed=int.from_bytes(digest[:4], "little"))
        parts.append(part.repeat())
    return grain.MapDataset.select_from_datasets(parts, ProportionalSchedule(mixture.rates))


def stack(examples: Sequence[Batch]) -> Batch:
    """Rows of equal length as one batch [rows, length]."""
    return {name: np.stack([example[name] for example in examples]) for name in examples[0]}
