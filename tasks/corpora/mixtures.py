"""Mixtures of the corpora, and their rates: how many training sequences of each there are, relative to the others.

corpora.rates.books = 2.0           in gin: rates of books_code_math
corpora.rates.temperature = 2.0     rate ** (1 / temperature), as in seqio
"""

import seqio

import tasks.corpora.books
import tasks.corpora.code
import tasks.corpora.mathematics  # noqa: F401  (they register the tasks)
from tasks.corpora import pile, settings


def books_code_math_rate(task: seqio.Task) -> float:
    """The rate of a task of `books_code_math` as gin sets it; ValueError for a rate or temperature that is not positive."""
    temperature = settings.bound("corpora.rates.temperature", 1.0)
    if not temperature > 0:
        raise ValueError(f"corpora.rates.temperature must be positive, but it is {temperature}.")
    rate = settings.bound(f"corpora.rates.{task.name}", 1.0)
    if not 0 < rate < float("inf"):
        raise ValueError(f"corpora.rates.{task.name} must be positive, but it is {rate}.")
    return rate ** (1 / temperature)


seqio.MixtureRegistry.add(
    "books_code_math", [(name, books_code_math_rate) for name in ("books", "code", "mathematics")]
)
seqio.MixtureRegistry.add("pile_sets", [(pile.task_name(name), weight) for name, weight in pile.WEIGHTS.items()])
