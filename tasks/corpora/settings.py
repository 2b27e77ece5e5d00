"""What the environment or gin says about the corpora: where they lie, and in which vocabulary they are tokenised.

    $T5X_SSM_BOOKS=/data/pg19           or in gin   books/corpora.location.path = '/data/pg19'
    $T5X_SSM_VOCABULARY=/data/32k.model or in gin   corpora.vocabulary.name = '/data/32k.model'

gin comes first. Both are read when data is asked for, never at import.
"""

import os
import pathlib

import gin

from tasks.cache_files import CacheError

VOCABULARY_VARIABLE = "T5X_SSM_VOCABULARY"


class CorpusError(CacheError):
    """A corpus that is not where it should be, or not what it should be; the message is for the user."""


def variable(corpus: str) -> str:
    """The environment variable that says where a corpus lies."""
    return f"T5X_SSM_{corpus.upper()}"


@gin.configurable("location", module="corpora")
def _location(path: str | None = None) -> str | None:
    return path


@gin.configurable("vocabulary", module="corpora")
def _vocabulary(name: str | None = None) -> str | None:
    return name


def vocabulary_name() -> str:
    """The vocabulary of the corpora, as `tasks.vocabularies.load` takes it; 'bytes' unless something else is set."""
    return _vocabulary() or os.environ.get(VOCABULARY_VARIABLE) or "bytes"


def location(corpus: str) -> pathlib.Path:
    """The file or folder of a corpus.

    Raises:
      CorpusError: if it is not set, or there is nothing; the message names the setting.
    """
    with gin.config_scope(corpus):
        given = _location()
    path = given or os.environ.get(variable(corpus))
    how = f"${variable(corpus)} (or {corpus}/corpora.location.path in gin)"
    if not path:
        raise CorpusError(f"Where is the corpus {corpus!r}? Set {how} to its folder.")
    if not os.path.exists(path):
        raise CorpusError(f"{how} is {path!r}, which does not exist.")
    return pathlib.Path(path)
