"""What the environment or gin says about the corpora: where they lie, in which vocabulary they are tokenised, and their rates.

    $T5X_SSM_BOOKS=/data/pg19           or in gin   books/corpora.location.path = '/data/pg19'
    $T5X_SSM_BOOKS=tfds:pg19:0.1.1      …           a TFDS data set, where the corpus is one, with its version
    $T5X_SSM_VOCABULARY=/data/32k.model or in gin   corpora.vocabulary.name = '/data/32k.model'
                                                    corpora.rates.books = 2.0, see `tasks.corpora.mixtures`

gin comes first. All are read when data is asked for, never at import. Importing this module is enough for gin to know them; a gin
file that has `from __gin__ import dynamic_registration` sets them before that line.
"""

import copy
import difflib
import os
import pathlib
from collections.abc import Sequence
from typing import Any

from tasks.cache_files import CacheError

try:
    import gin
    from gin import config as gin_config
except ImportError:  # Reading a token cache needs no gin, and without it nothing is set by it.
    gin = None

VOCABULARY, VOCABULARY_VARIABLE = "corpora.vocabulary.name", "T5X_SSM_VOCABULARY"
TFDS = "tfds:"
# All that have a place; tasks of one's own may have others.
NAMES = (
    *("books", "c4", "code", "lm1b", "mathematics", "openwebtext", "pile", "texts", "wiki40b", "wikitext103"),
    *("cnn_dailymail", "glue", "summarization", "superglue", "xsum"),
    *("lra_image", "lra_retrieval", "lra_text", "speech_commands"),
)
_PLACE = "/corpora.location.path"


class CorpusError(CacheError):
    """A corpus that is not where it should be, or not what it should be; the message is for the user."""


def _location(path: str) -> None:
    """What gin may set of a corpus; `bound` reads it."""


def _vocabulary(name: str) -> None:
    """What gin may set of the vocabulary; `bound` reads it."""


def _rates(books: float, code: float, mathematics: float, temperature: float) -> None:
    """What gin may set of the rates; `bound` reads it."""


_LOCATION = "corpora.location"
_DECLARED = {_LOCATION: _location, "corpora.vocabulary": _vocabulary, "corpora.rates": _rates}
if gin is not None:
    for _selector, _function in _DECLARED.items():
        gin.configurable(_selector)(_function)


def variable(corpus: str) -> str:
    """The environment variable that says where a corpus lies."""
    return f"T5X_SSM_{corpus.upper()}"


def bound(parameter: str, default: Any = None) -> Any:
    """The value that gin has for a parameter here.

    It is looked up and not called for, so that gin's operative configuration does not have it; `given` has.
    """
    if gin is None:
        return default
    try:
        return copy.deepcopy(gin.query_parameter(parameter))  # A copy of a reference to a macro is the macro's value.
    except ValueError:
        return default


def value(parameter: str) -> Any:
    """What is set for a parameter, named as in gin: there, or else in the environment; None if it is not set."""
    if parameter == VOCABULARY:
        return bound(parameter) or os.environ.get(VOCABULARY_VARIABLE) or None
    if is_place(parameter):
        return bound(parameter) or os.environ.get(variable(parameter.removesuffix(_PLACE))) or None
    return bound(parameter)


def is_place(parameter: str) -> bool:
    """Whether a parameter says where a corpus lies."""
    return parameter.endswith(_PLACE)


def set_in_gin() -> list[tuple[str, str]]:
    """(scope, selector) of all that gin sets here."""
    if gin is None:
        return []
    return [key for key, bindings in gin_config._CONFIG.items() if key[1] in _DECLARED and bindings]


def given() -> dict[str, Any]:
    """All that gin sets here, by parameter: what another process has to be told to find the same."""
    names = (
        f"{scope}/{selector}.{name}" if scope else f"{selector}.{name}"
        for scope, selector in set_in_gin()
        for name in gin_config._CONFIG[scope, selector]
    )
    return {name: bound(name) for name in names}


def check() -> None:
    """Raises CorpusError, with the nearest names, if gin sets the place of something that is no corpus."""
    for scope, selector in set_in_gin():
        if selector == _LOCATION and scope not in NAMES:
            near = difflib.get_close_matches(scope, NAMES, n=3, cutoff=0.5) or sorted(NAMES)
            raise CorpusError(f"{scope}{_PLACE} is set, but no corpus is named {scope!r}. There is {', '.join(near)}.")


def vocabulary_name() -> str:
    """The vocabulary of the corpora, as `tasks.vocabularies.load` takes it; 'bytes' unless something else is set."""
    return value(VOCABULARY) or "bytes"


def location(corpus: str) -> pathlib.Path:
    """The file or folder of a corpus.

    Raises:
      CorpusError: if it is not set, or there is nothing; the message names the setting.
    """
    path, how = value(corpus + _PLACE), _how(corpus)
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
    place = value(corpus + _PLACE) or ""
    if not place.startswith(TFDS):
        return None
    name, _, version = place.removeprefix(TFDS).partition(":")
    if not (name and version):
        missing = "version" if name else "name"
        raise CorpusError(
            f"{_how(corpus)} is {place!r}; the {missing} of a TFDS data set is missing, as in tfds:glue:2.0.0."
        )
    return f"{name}{'/' + subset if subset else ''}:{version}"


def environment(corpus: str) -> dict[str, str | None]:
    """Under which settings the token cache of a corpus is made; see `tasks.provenance`."""
    return place_environment(corpus) | {f"setting {VOCABULARY}": value(VOCABULARY)}


def place_environment(corpus: str) -> dict[str, str | None]:
    """The same for one with a vocabulary of its own."""
    return {f"setting {corpus}{_PLACE}": value(corpus + _PLACE)}


def rates_environment(tasks: Sequence[str]) -> dict[str, float | None]:
    """The same for the rates of a mixture of these tasks, as far as gin can set them."""
    names = [name for name in ("books", "code", "mathematics") if name in tasks]
    parameters = [f"corpora.rates.{name}" for name in (*names, "temperature")] if names else []
    return {f"setting {parameter}": bound(parameter) for parameter in parameters}


def _how(corpus: str) -> str:
    return f"${variable(corpus)} (or {corpus}{_PLACE} in gin)"
