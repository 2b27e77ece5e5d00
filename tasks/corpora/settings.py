"""What the environment or gin says about the corpora: where they lie, and in which vocabulary they are tokenised.

    $T5X_SSM_BOOKS=/data/pg19           or in gin   books/corpora.location.path = '/data/pg19'
    $T5X_SSM_BOOKS=tfds:pg19:0.1.1      …           a TFDS data set, where the corpus is one, with its version
    $T5X_SSM_VOCABULARY=/data/32k.model or in gin   corpora.vocabulary.name = '/data/32k.model'

gin comes first. Both are read when data is asked for, never at import.
"""

import os
import pathlib
from typing import Any

import gin

from tasks.cache_files import CacheError

VOCABULARY_VARIABLE = "T5X_SSM_VOCABULARY"
TFDS = "tfds:"


class CorpusError(CacheError):
    """A corpus that is not where it should be, or not what it should be; the message is for the user."""


def variable(corpus: str) -> str:
    """The environment variable that says where a corpus lies."""
    return f"T5X_SSM_{corpus.upper()}"


@gin.configurable("location", module="corpora")
def _location(path: str) -> None:
    """What gin may set of a corpus; `bound` reads it."""


@gin.configurable("vocabulary", module="corpora")
def _vocabulary(name: str) -> None:
    """What gin may set of the vocabulary; `bound` reads it."""


def bound(parameter: str, default: Any = None) -> Any:
    """The value that gin has for a parameter here.

    It is looked up and not called for: gin writes what is called into a run's configuration, which then could only be read
    where these modules have been imported.
    """
    try:
        return gin.query_parameter(parameter)
    except ValueError:
        return default


def vocabulary_name() -> str:
    """The vocabulary of the corpora, as `tasks.vocabularies.load` takes it; 'bytes' unless something else is set."""
    return bound("corpora.vocabulary.name") or os.environ.get(VOCABULARY_VARIABLE) or "bytes"


def location(corpus: str) -> pathlib.Path:
    """The file or folder of a corpus.

    Raises:
      CorpusError: if it is not set, or there is nothing; the message names the setting.
    """
    path, how = _given(corpus), _how(corpus)
    if not path:
        raise CorpusError(f"Where is the corpus {corpus!r}? Set {how} to its folder.")
    if not os.path.exists(path):
        raise CorpusError(f"{how} is {path!r}, which does not exist.")
    return pathlib.Path(path)


def tfds_name(corpus: str, subset: str | None = None) -> str | None:
    """The TFDS data set that stands where a folder could: 'tfds:glue:2.0.0' and 'sst2' are 'glue/sst2:2.0.0'; None for a
    folder.

    Raises:
      CorpusError: its name or version is missing; seqio asks for both.
    """
    given = _given(corpus) or ""
    if not given.startswith(TFDS):
        return None
    name, _, version = given.removeprefix(TFDS).partition(":")
    if not (name and version):
        missing = "version" if name else "name"
        raise CorpusError(
            f"{_how(corpus)} is {given!r}; the {missing} of a TFDS data set is missing, as in tfds:glue:2.0.0."
        )
    return f"{name}{'/' + subset if subset else ''}:{version}"


def environment(corpus: str) -> dict[str, str | None]:
    """What the token cache of a corpus is made under; see `tasks.cache_files.version`."""
    return {
        f"location {variable(corpus)}": _given(corpus),
        f"variable {VOCABULARY_VARIABLE}": os.environ.get(VOCABULARY_VARIABLE),
    }


def _given(corpus: str) -> str | None:
    return bound(f"{corpus}/corpora.location.path") or os.environ.get(variable(corpus))


def _how(corpus: str) -> str:
    return f"${variable(corpus)} (or {corpus}/corpora.location.path in gin)"
