"""The answer that a model finds most likely, from the likelihoods of all: a seqio metric (targets, scores).

`place` is the task's postprocess function: it turns an example, one choice of one question, into what the metrics read.
"""

import collections
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple


class Choice(NamedTuple):
    """One choice of a question.

    Attributes:
      question: the question's number.
      index: the choice's, among `count`.
      count: how many choices there are.
      is_right: whether it is.
      size: bytes of its text.
    """

    question: int
    index: int
    count: int
    is_right: bool
    size: int


def place(text: str, *, example: Mapping[str, Any], is_target: bool) -> Choice:
    """The choice that an example is; `text` is its continuation."""
    del is_target
    fields = (int(example[name]) for name in ("question", "choice", "choices", "is_right"))
    question, index, count, is_right = fields
    return Choice(question, index, count, bool(is_right), len(text.encode()))


def accuracy(targets: Sequence[Choice], scores: Sequence[float]) -> dict[str, float]:
    """The percentage of questions whose most likely choice is right: by its likelihood, and by that of a byte on average.

    Questions of which choices are missing, since the last examples were left out, do not count; `questions` do.
    """
    questions = _questions(targets, scores)
    by_length = [max(choices, key=lambda c: c[1] / max(c[0].size, 1))[0].is_right for choices in questions]
    plain = [_best(choices).is_right for choices in questions]
    count = len(questions)
    return {
        "accuracy": 100.0 * sum(plain) / max(count, 1),
        "accuracy_by_length": 100.0 * sum(by_length) / max(count, 1),
        "questions": count,
    }


def macro_f1(targets: Sequence[Choice], scores: Sequence[float]) -> dict[str, float]:
    """The mean over classes of F1, where the choices are the same in all questions; CB's second figure."""
    chosen, right = [], []
    for choices in _questions(targets, scores):
        chosen.append(_best(choices).index)
        right.append(next(choice.index for choice, _ in choices if choice.is_right))
    classes = sorted({*chosen, *right})
    both = collections.Counter(c for c, r in zip(chosen, right, strict=True) if c == r)
    values = [2 * both[k] / (chosen.count(k) + right.count(k)) for k in classes]
    return {"macro_f1": 100.0 * sum(values) / max(len(values), 1)}


def answer_f1(targets: Sequence[Choice], scores: Sequence[float]) -> dict[str, float]:
    """F1 of the first choice, over all questions; with the choices yes and no that is MultiRC's F1a."""
    both = found = wanted = 0
    for choices in _questions(targets, scores):
        is_found, is_wanted = _best(choices).index == 0, any(c.is_right and c.index == 0 for c, _ in choices)
        both, found, wanted = both + (is_found and is_wanted), found + is_found, wanted + is_wanted
    return {"f1": 100.0 * 2 * both / max(found + wanted, 1)}


def _questions(targets: Sequence[Choice], scores: Sequence[float]) -> list[list[tuple[Choice, float]]]:
    """(choice, score) of every whole question."""
    questions: dict[int, list[tuple[Choice, float]]] = {}
    for choice, score in zip(targets, scores, strict=True):
        questions.setdefault(choice.question, []).append((choice, score))
    return [choices for choices in questions.values() if len(choices) == choices[0][0].count]


def _best(choices: Sequence[tuple[Choice, float]]) -> Choice:
    """The most likely; the first of equals."""
    return max(choices, key=lambda choice: choice[1])[0]
