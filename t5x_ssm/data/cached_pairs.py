"""Training on pairs of an input and a target text from the token cache, packed or not; a batch is a function of (seed, step)."""

import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from t5x_ssm.data import sources
from t5x_ssm.data.cached_examples import CachedExamples
from t5x_ssm.data.indexed import IndexedRows
from t5x_ssm.data.pairs import INPUTS, TARGETS, Pair, pair_row
from t5x_ssm.data.token_stream import Batch


class CachedPairs(CachedExamples):
    """The pairs of one split of one cached task, as a sequence; what is longer than its length is cut.

    Attributes:
      counts: also `cut_inputs` and `cut_targets`, how many of all are.
    """

    def __init__(self, directory: pathlib.Path, lengths: Mapping[str, int], *, checksums: bool = False):
        """Opens a split; arguments and errors as of `CachedExamples`, and the `lengths` of inputs and targets."""
        super().__init__(directory, labelled=False, checksums=checksums)
        self.lengths = dict(lengths)
        whole = self.sizes()
        self.cut_sizes = np.minimum(whole, [self.lengths[INPUTS], self.lengths[TARGETS]])
        cut = np.sum(whole > self.cut_sizes, axis=0)
        self.counts |= {"cut_inputs": int(cut[0]), "cut_targets": int(cut[1])}

    def __getitem__(self, index: int) -> Pair:
        inputs, targets = self.documents(index)
        return inputs[: self.lengths[INPUTS]], targets[: self.lengths[TARGETS]]


class PairRows:
    """The rows of pairs as a random-access source (Grain's protocol): a pair a row, or as many as fit, in their order.

    Packing is that of seqio: a row ends before the first pair that does not fit. Which pairs share a row is found when the
    source is opened, from their sizes alone, and stays so; rows are shuffled as wholes.
    """

    def __init__(self, pairs: CachedPairs, *, encoder: bool, pack: bool):
        """`encoder` is whether inputs are an encoder's, or the beginning of the decoder's text."""
        self._pairs, self._encoder, self._packed = pairs, encoder, pack
        rooms = [pairs.lengths[INPUTS], pairs.lengths[TARGETS]]
        sizes = pairs.cut_sizes
        if not encoder:
            sizes, rooms = sizes.sum(1, keepdims=True), [sum(rooms)]
        self._begins = row_begins(sizes, rooms) if pack else np.arange(len(pairs) + 1)

    def __len__(self) -> int:
        return len(self._begins) - 1

    def __getitem__(self, row: int) -> Batch:
        begin, end = self._begins[int(row) : int(row) + 2]
        taken = [self._pairs[index] for index in range(begin, end)]
        return pair_row(taken, self._pairs.lengths, encoder=self._encoder, packed=self._packed)

    def __repr__(self) -> str:
        return f"PairRows({self._pairs.task}, {self._pairs.lengths}, pack={self._packed})"


def row_begins(sizes: np.ndarray, rooms: Sequence[int]) -> np.ndarray:
    """Where rows begin that take examples in order for as long as they fit.

    Args:
      sizes: int [examples, parts]; none is larger than its room.
      rooms: of a row, for each part.

    Returns:
      int64 [rows + 1]: the first example of each row, and the number of examples.
    """
    before = [np.concatenate([[0], np.cumsum(part)]) for part in sizes.T]
    begins = [0]
    while (at := begins[-1]) < len(sizes):
        ends = (np.searchsorted(b, b[at] + room, side="right") for b, room in zip(before, rooms, strict=True))
        begins.append(int(min(ends)) - 1)
    return np.array(begins)


class PairsFeed(IndexedRows):
    """Training batches of the pairs of a mixture; each task's rows are shuffled anew in every epoch."""

    def __init__(
        self,
        mixture: sources.CachedMixture,
        identity: dict[str, Any],
        *,
        encoder: bool,
        pack: bool,
        seed: int,
        shuffle: bool,
        **feed: int,
    ):
        """
        Args:
          mixture: its streams are `CachedPairs`.
          identity: what the batches are a function of.
          encoder, pack: see `PairRows`.
          seed, shuffle: see `sources.endless_rows`.
          **feed: batch_size, process_index, process_count and prefetch.
        """
        super().__init__(mixture.vocabulary, identity, **feed)
        rows = [PairRows(pairs, encoder=encoder, pack=pack) for pairs in mixture.streams]
        self._rows = sources.endless_rows(mixture, rows, seed=seed, shuffle=shuffle)

    def _row(self, row: int) -> Batch:
        return self._rows[row]
