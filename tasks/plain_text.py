"""Documents of plain corpora as tokens, without TensorFlow between the file and the tokenizer.

Most tasks do no more than tokenise each document of a file and close it. Of their seconds, TensorFlow's edition of SentencePiece and
the way there take the larger part (`benchmarks/caching.py`), so that the token cache calls the tokenizer itself. The tokens are
the same. A task with any other step goes through seqio.
"""

import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np

from tasks.cache_files import FEATURE

if TYPE_CHECKING:
    import seqio


def is_plain(task: "seqio.Task") -> bool:
    """Whether a task only tokenises the documents of its source by SentencePiece, and closes them."""
    # A source is of this class only if its module is there; importing it would load TensorFlow.
    corpora = sys.modules.get("tasks.corpora.source")
    if corpora is None or not isinstance(getattr(task, "source", None), corpora.CorpusSource):
        return False
    import seqio

    from tasks.pieces import split_long_documents

    # The last two change nothing in whole documents.
    rest = [seqio.CacheDatasetPlaceholder, split_long_documents]
    steps = [step for step in task.preprocessors if step not in rest and type(step) not in rest]
    return steps == [seqio.preprocessors.tokenize, seqio.preprocessors.append_eos] and isinstance(
        _vocabulary(task), seqio.SentencePieceVocabulary
    )


def documents(task: "seqio.Task", split: str, index: int, count: int) -> Iterator[tuple[np.ndarray, int]]:
    """Tokens int32 [n] and length in bytes of each document of shard `index` of `count`; the task is plain."""
    vocabulary = _vocabulary(task)
    end = np.array([vocabulary.eos_id] if task.output_features[FEATURE].add_eos else [], np.int32)
    for text in task.source.documents(split, task.source.list_shards(split)[index::count]):
        ids = vocabulary.tokenizer.encode(text.decode("utf-8"), return_type="numpy")  # No list of Python's numbers.
        yield np.concatenate([ids.astype(np.int32, copy=False), end]), len(text)


def _vocabulary(task: "seqio.Task") -> Any:
    """The task's vocabulary; if it is chosen at its first use, the one chosen."""
    vocabulary = task.output_features[FEATURE].vocabulary
    return getattr(vocabulary, "opened", vocabulary)
