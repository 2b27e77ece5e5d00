"""Training feeds of which any row can be made at once: the position is (seed, step), good for any number of processes."""

import abc
from collections.abc import Mapping
from typing import Any

from t5x_ssm.data import sources
from t5x_ssm.data.prefetch import PrefetchedFeed, Prefetcher
from t5x_ssm.data.sources import Batch


class IndexedRows(PrefetchedFeed):
    """Batches whose row r, counted over all batches from zero, is a function of r alone."""

    def __init__(
        self,
        vocabulary: dict[str, Any],
        identity: dict[str, Any],
        *,
        batch_size: int,
        process_index: int,
        process_count: int,
        prefetch: int,
    ):
        super().__init__(vocabulary, identity, prefetch=prefetch)
        local = batch_size // process_count
        self._batch_size = batch_size
        self._local_rows = range(process_index * local, (process_index + 1) * local)
        self._step = 0

    @abc.abstractmethod
    def _row(self, row: int) -> Batch:
        """The arrays of a row."""

    def batch(self, step: int) -> Batch:
        """This process's rows of the batch of any step."""
        first = step * self._batch_size
        return sources.stack([self._row(first + row) for row in self._local_rows])

    def next(self) -> Batch:
        if self._prefetcher is None:
            # Only now: a feed that is restored first never reads the beginning.
            start = self._step
            self._prefetcher = Prefetcher(lambda i: self.batch(start + i), depth=self._depth)
        batch = self._prefetcher.next()
        self._step += 1
        return batch

    def state(self) -> dict[str, Any]:
        return {**self.identity, "made_from": self.made_from, "step": self._step}

    def restore(self, state: Mapping[str, Any]) -> None:
        self._check_identity(state)
        self.close()
        self._step = int(state["step"])
