"""What all corpora have in common as seqio tasks: whole documents, tokenised, each closed by the end-of-text token."""

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import seqio

from tasks import vocabularies
from tasks.corpora import formats, settings
from tasks.corpora.source import CorpusSource
from tasks.pieces import split_long_documents

# In pieces of the sequence length.
_SHUFFLE_BUFFER_SIZE = 1024
SPLITS = ("train", "validation", "test")


@functools.cache
def vocabulary() -> seqio.Vocabulary:
    """The one vocabulary of all corpora; which one, is decided when it is first used."""
    return vocabularies.deferred(settings.vocabulary_name)


def register(
    name: str,
    read: formats.Reader,
    patterns: Mapping[str, Sequence[str]],
    *,
    corpus: str | None = None,
    **source: Any,
) -> None:
    """Registers a corpus as the task `name`; `corpus` (the name if None) says where it lies, the rest is that of
    `CorpusSource`."""
    seqio.TaskRegistry.add(
        name,
        source=CorpusSource(corpus or name, read, patterns, **source),
        preprocessors=[
            seqio.preprocessors.tokenize,
            seqio.preprocessors.append_eos,
            seqio.CacheDatasetPlaceholder(),
            split_long_documents,
        ],
        output_features={"targets": seqio.Feature(vocabulary=vocabulary(), add_eos=True)},
        metric_fns=[],
        shuffle_buffer_size=_SHUFFLE_BUFFER_SIZE,
    )
