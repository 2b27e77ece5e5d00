"""The synthetic languages of the H3 paper, whose sentences end in a token that only recall can predict.

Fu et al., "Hungry Hungry Hippos" (2212.14052), section 3.1. An *induction head* repeats what followed a trigger, and
*associative recall* what followed a key:

    7 0 => 3 12 … 5 => 3         the trigger `=>` stands once among random symbols; at the end, what followed it
    2 7 0 5 2 7 … => 0 5         pairs of a key and its value, a map drawn for each sentence; at the end, a key and its value

A vocabulary has `=>`, a no-op `.` that no sentence contains, and numbers; ids are the symbols' places in the order of strings,
so `.` is 0, which may pad, and `=>` is last. Sentences of a language are drawn from one seeded stream without repetition: no
two are equal, in whichever split they are.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence

import numpy as np

NO_OP, TRIGGER = ".", "=>"
# How many sentences the paper has; the stream gives the ones of `train` first.
SPLITS = {"train": 5000, "validation": 500}


@dataclasses.dataclass(frozen=True)
class Language:
    """One of the two languages at one size.

    Attributes:
      kind: a key of `KINDS`.
      length: symbols before those of the question.
      vocabulary_size: the two special symbols included.
    """

    kind: str
    length: int
    vocabulary_size: int

    def __post_init__(self):
        if self.kind not in KINDS:
            raise ValueError(f"kind = {self.kind!r}; it is one of {', '.join(KINDS)}.")
        if self.length < 2 or self.vocabulary_size < 4:
            raise ValueError(f"{self} is too small: a sentence needs two symbols, and two to choose from.")

    @property
    def symbols(self) -> tuple[str, ...]:
        """The symbols in the order of their ids."""
        return tuple(sorted([NO_OP, TRIGGER, *map(str, range(self.vocabulary_size - 2))]))


def induction_head(random: np.random.Generator, numbers: Sequence[str], length: int) -> list[str]:
    """A sentence: `length` symbols, then the trigger and what followed it the first time."""
    sentence = list(random.choice(numbers, length))
    place = random.integers(length - 1)
    sentence[place] = TRIGGER
    return [*sentence, TRIGGER, sentence[place + 1]]


def associative_recall(random: np.random.Generator, numbers: Sequence[str], length: int) -> list[str]:
    """A sentence: `length // 2` pairs, then the trigger, a key among theirs and its value.

    The first half of the numbers are keys, the others values; the map from keys to values is this sentence's own.
    """
    half = len(numbers) // 2
    keys, values = numbers[:half], numbers[half:]
    value_of = dict(zip(keys, random.choice(values, half), strict=True))
    seen = list(random.choice(keys, length // 2))
    asked = random.choice(sorted(set(seen)))
    return [*(symbol for key in seen for symbol in (key, value_of[key])), TRIGGER, asked, value_of[asked]]


KINDS: dict[str, Callable[[np.random.Generator, Sequence[str], int], list[str]]] = {
    "induction_head": induction_head,
    "associative_recall": associative_recall,
}
# The sizes of the paper, and the one at which it asks whether recall carries over to twice the length.
LANGUAGES = {
    "induction_head": Language("induction_head", length=30, vocabulary_size=20),
    "associative_recall": Language("associative_recall", length=20, vocabulary_size=10),
    "associative_recall_40": Language("associative_recall", length=40, vocabulary_size=10),
}


@functools.lru_cache(maxsize=16)
def sentences(language: Language, split: str, seed: int = 0) -> np.ndarray:
    """All sentences of a split as ids.

    Args:
      language: which language.
      split: a key of SPLITS.
      seed: of the stream; another seed is another corpus.

    Returns:
      int32 [SPLITS[split], L], read-only; the last token is the answer.

    Raises:
      ValueError: the language has too few sentences.
    """
    random = np.random.default_rng(seed)
    symbols = language.symbols
    numbers = [symbol for symbol in symbols if symbol not in (NO_OP, TRIGGER)]
    ids = {symbol: i for i, symbol in enumerate(symbols)}
    make, wanted = KINDS[language.kind], sum(SPLITS.values())
    found: dict[tuple[int, ...], None] = {}
    for _ in range(20 * wanted):
        found.setdefault(tuple(ids[symbol] for symbol in make(random, numbers, language.length)))
        if len(found) == wanted:
            break
    else:
        raise ValueError(f"{language} has fewer than {wanted} sentences that are easily found.")
    rows = np.array(list(found), np.int32)
    rows.flags.writeable = False
    first = 0 if split == "train" else SPLITS["train"]
    return rows[first : first + SPLITS[split]]
