"""The pattern language: which mixer each layer of a stack is.

    pattern := item (' ' item)*        item := name ['*' count]

A pattern is repeated to the depth of the stack: `gss*3 chunk` at 32 layers is 24 GSS layers with chunked attention at
every fourth; `spade swa*15` at 16 is one SPADE layer at the bottom and sliding windows above. The depth must be a multiple of
the pattern's length, so that the pattern says exactly what the stack is.
"""

import re
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from t5x_ssm.errors import UserError

_ITEM = re.compile(r"([A-Za-z_][A-Za-z0-9_]*)(?:\*([0-9]+))?")


class Segment(NamedTuple):
    """Consecutive layers that are compiled once and scanned over.

    Attributes:
      period: the mixers of one repetition.
      repeats: how often the period occurs in a row.
    """

    period: tuple[str, ...]
    repeats: int


def parse(pattern: str, depth: int | None = None, known: Iterable[str] | None = None) -> tuple[str, ...]:
    """The mixer of every layer, bottom first.

    Args:
      pattern: see the module docstring.
      depth: number of layers; the pattern's own length when None.
      known: mixers that exist; any name when None.

    Raises:
      UserError: the pattern cannot be read, names an unknown mixer, or does not repeat to `depth`.
    """
    layers: list[str] = []
    for item in pattern.split():
        match = _ITEM.fullmatch(item)
        if match is None:
            raise UserError(f"Pattern {pattern!r}: cannot read {item!r}; write a mixer's name, or name*count.")
        name, count = match[1], int(match[2] or 1)
        if count < 1:
            raise UserError(f"Pattern {pattern!r}: {item!r} repeats a layer {count} times.")
        if known is not None and name not in known:
            raise UserError(f"Pattern {pattern!r}: no mixer is named {name!r}; there are {', '.join(sorted(known))}.")
        layers.extend([name] * count)
    if not layers:
        raise UserError("The layer pattern is empty; write for example 'gss*3 chunk'.")
    if depth is None:
        return tuple(layers)
    if depth < 1 or depth % len(layers):
        raise UserError(f"Pattern {pattern!r} has {len(layers)} layers, which do not repeat to a depth of {depth}.")
    return tuple(layers) * (depth // len(layers))


def segments(layers: Sequence[str]) -> tuple[Segment, ...]:
    """Cuts a stack into scans so that as few layer bodies as possible are compiled.

    Args:
      layers: the mixer of every layer, as `parse` gives it.

    Returns:
      Segments whose expansion is `layers`, with the least total length of periods; of equal ones the fewest segments.
    """
    layers = tuple(layers)
    # best[i]: (bodies, segments, cut) for the first i layers.
    best: list[tuple[int, int, tuple[Segment, ...]]] = [(0, 0, ())]
    for end in range(1, len(layers) + 1):
        options = []
        for period in range(1, end + 1):
            body = layers[end - period : end]
            start, repeats = end - period, 1
            while True:
                bodies, count, cut = best[start]
                options.append((bodies + period, count + 1, (*cut, Segment(body, repeats))))
                if start < period or layers[start - period : start] != body:
                    break
                start, repeats = start - period, repeats + 1
        best.append(min(options, key=lambda option: option[:2]))
    return best[-1][2]
