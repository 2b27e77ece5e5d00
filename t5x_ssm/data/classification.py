"""Labelled sequences from the token cache: an example is padded or cut to a fixed length, a batch is a function of the step."""

import hashlib
import pathlib
from typing import Any

import numpy as np

from t5x_ssm.data import sources
from t5x_ssm.data.evaluation_feeds import RowsInOrder
from t5x_ssm.data.indexed import IndexedRows
from t5x_ssm.data.token_stream import Batch
from t5x_ssm.errors import DataError
from tasks import cache_files, cache_store


class LabelledExamples:
    """One split of one cached labelled task, memory-mapped, as a random-access source (Grain's protocol).

    Attributes:
      task: the task's name.
      checksum: identifies the contents.
      pairs: whether an example is two sequences.
      counts: how many sequences are longer than the length, and cut.
    """

    def __init__(self, directory: pathlib.Path, length: int, *, checksums: bool = False):
        """Opens a split.

        Args:
          directory: DIR/TASK/FINGERPRINT/SPLIT.
          length: positions of an example; longer documents are cut.
          checksums: reads the split whole and compares.

        Raises:
          ValueError: naming a missing, truncated or altered file.
          DataError: the task is not labelled, or has no examples.
        """
        manifest = cache_files.check(directory, checksums=checksums)
        self.task: str = manifest["task"]
        self._length = length
        self._shards: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []
        self.counts = {"cut_inputs": 0}
        digest = hashlib.sha256()
        for index, shard in enumerate(manifest["shards"]):
            folder = directory / cache_files.shard_name(index)
            if cache_files.LABELS_FILE not in shard["files"]:
                raise DataError(
                    f"{self.task!r} has no class ids: its only feature is 'targets'. Train on it with DatasetConfig."
                    "objective='language_model'."
                )
            labels = np.load(folder / cache_files.LABELS_FILE, mmap_mode="r")
            if not len(labels):
                continue
            tokens = cache_store.open_tokens(folder, np.dtype(manifest["dtype"]))
            offsets = np.load(folder / "offsets.npy", mmap_mode="r")
            self.counts["cut_inputs"] += int(np.sum(np.diff(offsets) > length))
            self._shards.append((tokens, offsets, labels))
            digest.update("".join(file["sha256"] for _, file in sorted(shard["files"].items())).encode())
        self.checksum: str = digest.hexdigest()
        self._firsts = np.cumsum([0, *(len(labels) for _, _, labels in self._shards)])
        if not len(self):
            raise DataError(f"{self.task!r} has no examples in this split.")
        self._texts = manifest["documents"] // len(self)
        self.pairs = self._texts == 2

    def __len__(self) -> int:
        return int(self._firsts[-1])

    def __getitem__(self, index: int) -> Batch:
        """`inputs` int32 [L] and `input_lengths` [] (of pairs [2, L] and [2]), `targets` and `weights` []."""
        shard = int(np.searchsorted(self._firsts, int(index), side="right")) - 1
        tokens, offsets, labels = self._shards[shard]
        local = int(index) - int(self._firsts[shard])
        inputs = np.zeros((self._texts, self._length), np.int32)
        lengths = np.zeros(self._texts, np.int32)
        for text in range(self._texts):
            start, stop = offsets[local * self._texts + text : local * self._texts + text + 2]
            lengths[text] = min(stop - start, self._length)
            inputs[text, : lengths[text]] = tokens[start : start + lengths[text]]
        if not self.pairs:
            inputs, lengths = inputs[0], lengths[0]
        label, weight = np.int32(labels[local]), np.int32(1)
        return {"inputs": inputs, "input_lengths": lengths, "targets": label, "weights": weight}

    def __repr__(self) -> str:
        return f"LabelledExamples({self.task}, length={self._length})"


def feature_shapes(rows: int, length: int, *, pairs: bool) -> dict[str, tuple[int, ...]]:
    """Shapes of a batch's features."""
    texts = (2,) if pairs else ()
    shapes = {"inputs": (*texts, length), "input_lengths": texts, "targets": (), "weights": ()}
    return {name: (rows, *shape) for name, shape in shapes.items()}


class ClassificationFeed(IndexedRows):
    """Training batches of the labelled tasks of a mixture; each task is shuffled anew in every epoch."""

    def __init__(
        self, mixture: sources.CachedMixture, identity: dict[str, Any], *, seed: int, shuffle: bool, **feed: int
    ):
        """
        Args:
          mixture: its streams are `LabelledExamples`.
          identity: what the batches are a function of.
          seed, shuffle: see `sources.endless_rows`.
          **feed: batch_size, process_index, process_count and prefetch.
        """
        super().__init__(mixture.vocabulary, identity, **feed)
        self._rows = sources.endless_rows(mixture, mixture.streams, seed=seed, shuffle=shuffle)

    def _row(self, row: int) -> Batch:
        return self._rows[row]


class ClassificationEvaluation(RowsInOrder):
    """Every example of a split once, in order; the last batch is padded with rows of weight 0."""

    def __init__(self, examples: LabelledExamples, vocabulary: dict[str, Any], batch_size: int, **place: int):
        super().__init__(examples.task, vocabulary, len(examples), batch_size, **place)
        self._examples = examples

    def _row(self, row: int) -> Batch:
        if row < len(self._examples):
            return self._examples[row]
        return {name: np.zeros_like(value) for name, value in self._examples[0].items()}
