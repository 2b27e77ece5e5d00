"""Labelled examples as a seqio data source, and their registration as tasks."""

import collections
import itertools
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import seqio
import tensorflow as tf

from tasks.cache_files import FEATURE
from tasks.corpora.settings import CorpusError
from tasks.long_range_arena.generated import SPLITS
from tasks.python_source import PythonSource

# At most so many examples of a split, so that a pipeline can be tried in minutes.
LIMIT_VARIABLE = "T5X_SSM_LRA_LIMIT"

Example = Mapping[str, Any]


class LabelledSource(PythonSource):
    """Examples of `inputs` (and `inputs2`), token ids, and `targets`, one class id; in shards that are read one by one."""

    def __init__(
        self,
        name: str,
        shards: Callable[[str], Sequence[str]],
        read: Callable[[str, str], Iterator[Example]],
        splits: Sequence[str],
        *,
        texts: Sequence[str],
        describe: Callable[[], dict[str, Any]],
    ):
        """
        Args:
          name: of the task.
          shards: from a split to the names of its shards; called when data is asked for.
          read: from a split and a shard to its examples, always the same.
          splits: their names.
          texts: the features beside `targets`.
          describe: what the examples depend on, for the token cache; see `tasks.provenance.version`.
        """
        super().__init__(splits=tuple(splits))
        self._name, self._texts = name, tuple(texts)
        self._shards, self._read, self._describe = shards, read, describe

    def __repr__(self) -> str:
        return f"LabelledSource({self._name})"

    def list_shards(self, split: str) -> list[str]:
        shards = list(self._shards(split))
        # Of a limited split, only the whole can be read.
        return shards if _limit() is None else shards[:1]

    def describe_source(self) -> dict[str, Any]:
        """What the token cache records of this source."""
        described = self._describe()
        limit = {f"variable {LIMIT_VARIABLE}": os.environ.get(LIMIT_VARIABLE) or None}
        return {**described, "environment": described.get("environment", {}) | limit}

    def get_dataset(
        self,
        split: str,
        shuffle: bool = True,
        seed: int | None = None,
        shard_info: seqio.ShardInfo | None = None,
        **_: Any,
    ) -> tf.data.Dataset:
        shards, limit = list(self._shards(split)), _limit()
        if shard_info is not None and shard_info.num_shards > 1:
            shards = shards[shard_info.index :: shard_info.num_shards]
        if shuffle and limit is None:
            random = np.random.default_rng(None if seed is None else int(seed))
            shards = [shards[i] for i in random.permutation(len(shards))]

        def examples() -> Iterator[Example]:
            iterators = (self._read(split, shard) for shard in shards)
            # A limited number is taken in turn, because a shard may hold a single class.
            read = itertools.chain.from_iterable(iterators) if limit is None else _alternating(iterators)
            for example in itertools.islice(read, limit):
                yield {name: np.asarray(example[name], np.int32) for name in (*self._texts, FEATURE)}

        signature = {name: tf.TensorSpec((None,), tf.int32) for name in self._texts} | {
            FEATURE: tf.TensorSpec((1,), tf.int32)
        }
        return self.generated(examples, signature)


def register(
    name: str,
    shards: Callable[[str], Sequence[str]],
    read: Callable[[str, str], Iterator[Example]],
    *,
    vocabulary: seqio.Vocabulary,
    num_classes: int,
    texts: Sequence[str] = ("inputs",),
    describe: Callable[[], dict[str, Any]],
) -> None:
    """Registers a labelled task with the splits of the arena; arguments as of `LabelledSource`."""
    features = {text: seqio.Feature(vocabulary=vocabulary, add_eos=False) for text in texts}
    classes = seqio.Feature(vocabulary=seqio.PassThroughVocabulary(num_classes), add_eos=False)
    seqio.TaskRegistry.add(
        name,
        source=LabelledSource(name, shards, read, SPLITS, texts=texts, describe=describe),
        preprocessors=[seqio.CacheDatasetPlaceholder()],
        output_features={**features, FEATURE: classes},
        metric_fns=[],
    )


def _alternating(iterators: Iterable[Iterator[Example]]) -> Iterator[Example]:
    """The first of each, the second of each, …"""
    waiting = collections.deque(iterators)
    while waiting:
        iterator = waiting.popleft()
        for example in itertools.islice(iterator, 1):
            waiting.append(iterator)
            yield example


def _limit() -> int | None:
    text = os.environ.get(LIMIT_VARIABLE)
    if not text:
        return None
    if not (text.isdigit() and int(text) > 0):
        raise CorpusError(f"${LIMIT_VARIABLE} = {text!r}; it must be a positive number of examples.")
    return int(text)
