"""The examples of a cached task that are more than text: labelled sequences, and pairs of an input and a target."""

import hashlib
import itertools
import pathlib
from typing import NamedTuple

import numpy as np

from t5x_ssm.errors import DataError
from tasks import cache_files, cache_store


class _Shard(NamedTuple):
    tokens: np.ndarray
    offsets: np.ndarray
    labels: np.ndarray | None


class CachedExamples:
    """One split of one cached task, memory-mapped: an example is one or two documents of it, one after the other.

    Attributes:
      task: the task's name.
      checksum: identifies the contents.
      counts: what was left out, replaced or cut when the cache was made.
    """

    def __init__(self, directory: pathlib.Path, *, labelled: bool, checksums: bool = False):
        """Opens a split.

        Args:
          directory: DIR/TASK/FINGERPRINT/SPLIT.
          labelled: whether examples have classes, or are pairs.
          checksums: reads the split whole and compares.

        Raises:
          ValueError: naming a missing, truncated or altered file.
          DataError: it is a cache of something else, or has no examples.
        """
        manifest = cache_files.check(directory, checksums=checksums)
        self.task: str = manifest["task"]
        counts = manifest.get("counts", {})
        self.counts: dict[str, int] = {name: n for name, n in counts.items() if name not in ("documents", "bytes")}
        self._shards: list[_Shard] = []
        digest, firsts = hashlib.sha256(), [0]
        for index, shard in enumerate(manifest["shards"]):
            folder = directory / cache_files.shard_name(index)
            self._check_kind(manifest, shard, labelled)
            labels = np.load(folder / cache_files.LABELS_FILE, mmap_mode="r") if labelled else None
            count = shard["documents"] // len(cache_files.PAIR_FEATURES) if labels is None else len(labels)
            if not count:
                continue
            tokens = cache_store.open_tokens(folder, np.dtype(manifest["dtype"]))
            self._shards.append(_Shard(tokens, np.load(folder / "offsets.npy", mmap_mode="r"), labels))
            firsts.append(firsts[-1] + count)
            digest.update("".join(file["sha256"] for _, file in sorted(shard["files"].items())).encode())
        self.checksum: str = digest.hexdigest()
        self._firsts = np.array(firsts)
        if not len(self):
            raise DataError(f"{self.task!r} has no examples in this split.")
        self._texts = manifest["documents"] // len(self)

    def _check_kind(self, manifest: dict, shard: dict, labelled: bool) -> None:
        pairs = tuple(manifest.get("texts", ())) == cache_files.PAIR_FEATURES
        if labelled and cache_files.LABELS_FILE not in shard["files"]:
            kind = "its targets are texts" if pairs else "its only feature is 'targets'"
            objective = "sequence_to_sequence" if pairs else "language_model"
            raise DataError(
                f"{self.task!r} has no class ids: {kind}. Train on it with DatasetConfig.objective={objective!r}."
            )
        if not labelled and not pairs:
            raise DataError(
                f"The token cache of {self.task!r} does not hold pairs of 'inputs' and 'targets', which TASK_FEATURE_LENGTHS "
                "has lengths for."
            )

    def __len__(self) -> int:
        return int(self._firsts[-1])

    def documents(self, index: int) -> list[np.ndarray]:
        """The tokens of each document of an example, whole."""
        shard, local = self._find(index)
        ends = shard.offsets[local * self._texts : (local + 1) * self._texts + 1]
        return [shard.tokens[start:stop] for start, stop in itertools.pairwise(ends)]

    def label(self, index: int) -> int:
        """The class of a labelled example."""
        shard, local = self._find(index)
        return int(shard.labels[local])

    def sizes(self) -> np.ndarray:
        """Tokens of every document, int64 [examples, documents of each]."""
        return np.concatenate([np.diff(shard.offsets) for shard in self._shards]).reshape(len(self), self._texts)

    def _find(self, index: int) -> tuple[_Shard, int]:
        shard = int(np.searchsorted(self._firsts, int(index), side="right")) - 1
        return self._shards[shard], int(index) - int(self._firsts[shard])
