"""Texts of different lengths as batches of one size, so that they share their executables."""

import itertools
from collections.abc import Iterable, Iterator, Sequence
from typing import TypeVar

import numpy as np

Item = TypeVar("Item")


def batches(items: Iterable[Item], size: int) -> Iterator[tuple[int, list[Item]]]:
    """(index of the first, items) of each batch, in order; the last may be short."""
    items = iter(items)
    for first in itertools.count(step=size):
        batch = list(itertools.islice(items, size))
        if not batch:
            return
        yield first, batch


def padded(rows: Sequence[Sequence[int] | np.ndarray], batch_size: int) -> tuple[np.ndarray, np.ndarray]:
    """Rows of any lengths as (int32 [batch_size, longest], lengths [batch_size]); rows that are missing are empty."""
    lengths = np.zeros(batch_size, np.int64)
    lengths[: len(rows)] = [len(row) for row in rows]
    tokens = np.zeros((batch_size, lengths.max()), np.int32)
    for i, row in enumerate(rows):
        tokens[i, : len(row)] = row
    return tokens, lengths
