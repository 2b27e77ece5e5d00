"""The arena's generated examples: each is a function of its task, split and number. Needs only numpy."""

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from tasks.long_range_arena import listops, pathfinder
from tasks.provenance import version

SEED = 0
SHARD_SIZE = 1000
SPLITS = ("train", "validation", "test")
Example = dict[str, Any]


def _listops(random: np.random.Generator) -> Example:
    ids = listops.expression(random)
    return {"inputs": [*ids, listops.EOS_ID], "targets": [listops.value(ids)]}


def _pathfinder(settings: pathfinder.Settings) -> Callable[[np.random.Generator], Example]:
    def make(random: np.random.Generator) -> Example:
        pixels, label = pathfinder.image(random, settings)
        return {"inputs": pixels.ravel(), "targets": [label]}

    return make


MAKERS = {
    "lra_listops": _listops,
    "lra_pathfinder": _pathfinder(pathfinder.PATHFINDER),
    "lra_pathx": _pathfinder(pathfinder.PATHX),
}
# Those of the published files, by split.
COUNTS = {
    "lra_listops": (96_000, 2_000, 2_000),
    "lra_pathfinder": (160_000, 20_000, 20_000),
    "lra_pathx": (160_000, 20_000, 20_000),
}


def example(name: str, split: str, index: int) -> Example:
    """An example of a task, `inputs` and `targets`, drawn from a random generator of its own."""
    stream = (SPLITS.index(split) << 48) + index
    return MAKERS[name](np.random.Generator(np.random.Philox(key=[SEED, stream])))


def shards(name: str, split: str) -> list[str]:
    """Names of the shards of a split: the numbers of their first examples."""
    return [str(first) for first in range(0, COUNTS[name][SPLITS.index(split)], SHARD_SIZE)]


def read(name: str, split: str, shard: str) -> Iterator[Example]:
    """The examples of a shard."""
    first, count = int(shard), COUNTS[name][SPLITS.index(split)]
    for index in range(first, min(first + SHARD_SIZE, count)):
        yield example(name, split, index)


def describe(name: str) -> dict[str, Any]:
    """What the token cache records: what decides the examples."""
    own = "listops" if name == "lra_listops" else "pathfinder"
    modules = [f"module tasks.long_range_arena.{module}" for module in (own, "generated")]
    return {"seed": SEED, "counts": COUNTS[name], "environment": {module: version(module) for module in modules}}
