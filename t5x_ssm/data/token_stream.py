"""One split of one cached task as one stream of tokens, whatever number of shards it lies in."""

import hashlib
import pathlib
from collections.abc import Sequence

import numpy as np

from t5x_ssm.errors import DataError
from tasks import cache_files, cache_store

Batch = dict[str, np.ndarray]


class TokenStream:
    """One split of one cached task, memory-mapped (of a store, read by ranges): opening it reads manifests, however long it is.

    Attributes:
      task: the task's name.
      num_bytes: length of all documents' text in bytes.
      num_words: words of all documents as their publishers count them, or None.
      counts: what was left out, replaced or cut when the cache was made.
      bos_id: the first input token of a document; seqio's is 0.
      checksum: identifies the contents.
    """

    def __init__(self, directory: pathlib.Path, *, checksums: bool = False):
        """Opens a split; `checksums` reads it whole and compares (sizes are always compared).

        Raises:
          ValueError: naming a missing, truncated or altered file.
        """
        manifest = cache_files.check(directory, checksums=checksums)
        self.task: str = manifest["task"]
        if "texts" in manifest:
            raise DataError(
                f"The token cache of {self.task!r} holds pairs: give TASK_FEATURE_LENGTHS for each of {manifest['texts']}."
            )
        self.num_bytes: int = manifest["bytes"]
        self.num_words: int | None = manifest.get("words")
        counts = manifest.get("counts", {})
        self.counts: dict[str, int] = {name: n for name, n in counts.items() if name not in ("documents", "bytes")}
        self.bos_id: int = manifest.get("vocabulary", {}).get("bos_id", 0)
        digest = hashlib.sha256()
        # An empty shard has nothing to map, and would make two shards begin at one place.
        shards = [(i, shard) for i, shard in enumerate(manifest["shards"]) if shard["tokens"]]
        self._tokens, self._offsets, self._lengths = [], [], []
        dtype = np.dtype(manifest["dtype"])
        for index, shard in shards:
            folder = directory / cache_files.shard_name(index)
            digest.update("".join(shard["files"][name]["sha256"] for name in ("tokens.bin", "offsets.npy")).encode())
            tokens = cache_store.open_tokens(folder, dtype)
            offsets = np.load(folder / "offsets.npy", mmap_mode="r")
            if not tokens.size == shard["tokens"] == offsets[-1] or len(offsets) != shard["documents"] + 1:
                raise DataError(
                    f"The files of the token cache {folder} contradict each other; remove {directory.parent}."
                )
            self._tokens.append(tokens)
            self._offsets.append(offsets)
            self._lengths.append(np.load(folder / "bytes.npy", mmap_mode="r"))
        self.checksum: str = digest.hexdigest()
        self._starts = np.cumsum([0, *(shard["tokens"] for _, shard in shards)])
        self._bytes_before = np.cumsum([0, *(shard["bytes"] for _, shard in shards)])

    def __len__(self) -> int:
        return int(self._starts[-1])

    def read(self, start: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
        """Tokens start…stop, int32, and the places among them where a document begins, without repetitions."""
        tokens, begins = np.empty(stop - start, np.int32), []
        shard = int(np.searchsorted(self._starts, start, side="right")) - 1
        at = start
        while at < stop:
            first = int(self._starts[shard])
            low, high = at - first, min(stop, int(self._starts[shard + 1])) - first
            tokens[at - start : high + first - start] = self._tokens[shard][low:high]
            offsets = self._offsets[shard]
            # A document without tokens begins where the next one does.
            inside = offsets[np.searchsorted(offsets, low) : np.searchsorted(offsets, high)]
            begins.append(np.asarray(inside) + (first - start))
            at, shard = high + first, shard + 1
        return tokens, np.unique(np.concatenate(begins)) if begins else np.zeros(0, np.int64)

    def bytes_before(self, positions: Sequence[int]) -> np.ndarray:
        """Bytes of text before each token position, int64; differences add up exactly to `num_bytes` over the stream.

        Inside a document, bytes are shared out evenly over its tokens.
        """
        return np.array([self._bytes_before_one(int(position)) for position in positions], np.int64)

    def _bytes_before_one(self, position: int) -> int:
        if position >= len(self):
            return self.num_bytes
        shard = int(np.searchsorted(self._starts, position, side="right")) - 1
        offsets, lengths = self._offsets[shard], self._lengths[shard]
        local = position - int(self._starts[shard])
        document = int(np.searchsorted(offsets, local, side="right")) - 1
        into, size = local - int(offsets[document]), int(offsets[document + 1] - offsets[document])
        before = int(self._bytes_before[shard]) + int(np.sum(lengths[:document], dtype=np.int64))
        return before + int(lengths[document]) * into // size

    def window(self, start: int, stop: int, length: int, *, segments: bool = True) -> Batch:
        """Tokens start…stop as one example of a decoder, padded with zeros to `length`.

        Args:
          start: first token of the window.
          stop: end of the window, at most `length` tokens on.
          length: length of the arrays.
          segments: whether documents are told apart. If so, segment ids count the documents of the window from 1
            (a document that continues from an earlier window counts like any other), positions count from 0 in each,
            and the first input token of each is `bos_id`. If not, the window is one running text: no segment ids and
            positions, and `bos_id` stands at its beginning only.

        Returns:
          int32 [length] arrays under the names of seqio's decoder feature converter. The first input token of a
          window is always `bos_id`, as seqio has it, although in the middle of a document the preceding token is known.
        """
        count = stop - start
        targets = np.zeros(length, np.int32)
        targets[:count], begins = self.read(start, stop)
        inputs = np.zeros(length, np.int32)
        inputs[1:count] = targets[: max(count - 1, 0)]
        inputs[:1] = self.bos_id if count else 0
        weights = np.zeros(length, np.int32)
        weights[:count] = 1
        example = {
            "decoder_input_tokens": inputs,
            "decoder_target_tokens": targets,
            "decoder_loss_weights": weights,
        }
        if segments:
            ids, positions = np.zeros(length, np.int32), np.zeros(length, np.int32)
            if count:
                if not len(begins) or begins[0]:
                    begins = np.concatenate([[0], begins])
                inputs[begins] = self.bos_id
                sizes = np.diff(begins, append=count)
                ids[:count] = np.repeat(np.arange(1, len(begins) + 1), sizes)
                positions[:count] = np.arange(count) - np.repeat(begins, sizes)
            example |= {"decoder_segment_ids": ids, "decoder_positions": positions}
        return example
