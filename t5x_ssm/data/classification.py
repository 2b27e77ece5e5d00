"""Labelled sequences from the token cache: an example is padded or cut to a fixed length, a batch is a function of the step."""

import pathlib
from typing import Any

import numpy as np

from t5x_ssm.data import sources
from t5x_ssm.data.cached_examples import CachedExamples
from t5x_ssm.data.evaluation_feeds import RowsInOrder
from t5x_ssm.data.indexed import IndexedRows
from t5x_ssm.data.token_stream import Batch


class LabelledExamples(CachedExamples):
    """One split of one cached labelled task as a random-access source (Grain's protocol).

    Attributes:
      pairs: whether an example is two sequences.
      counts: how many sequences are longer than the length, and cut.
    """

    def __init__(self, directory: pathlib.Path, length: int, *, checksums: bool = False):
        """Opens a split; arguments and errors as of `CachedExamples`. Documents longer than `length` positions are cut."""
        super().__init__(directory, labelled=True, checksums=checksums)
        self._length = length
        self.counts["cut_inputs"] = int(np.sum(self.sizes() > length))
        self.pairs = self._texts == 2

    def __getitem__(self, index: int) -> Batch:
        """`inputs` int32 [L] and `input_lengths` [] (of pairs [2, L] and [2]), `targets` and `weights` []."""
        inputs = np.zeros((self._texts, self._length), np.int32)
        lengths = np.zeros(self._texts, np.int32)
        for text, tokens in enumerate(self.documents(index)):
            lengths[text] = min(len(tokens), self._length)
            inputs[text, : lengths[text]] = tokens[: lengths[text]]
        if not self.pairs:
            inputs, lengths = inputs[0], lengths[0]
        label, weight = np.int32(self.label(index)), np.int32(1)
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
