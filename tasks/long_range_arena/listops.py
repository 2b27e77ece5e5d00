"""ListOps at the lengths of the Long Range Arena: what is the value of [MAX 4 3 [MIN 2 3 ] 1 0 [MED 1 5 8 9 2 ] ] ?

Nangia & Bowman 2018 (arXiv:1804.06028), with the settings of Tay et al. 2020: a node is an operator with probability 1/4,
with 2 to 10 arguments, down to a depth of 10; trees of 501 to 1,999 symbols are kept.
"""

from collections.abc import Sequence

import numpy as np

OPERATORS = ("[MAX", "[MIN", "[MED", "[SM")
PADDING_ID, EOS_ID, UNKNOWN_ID = 0, 1, 2
SYMBOLS = (*map(str, range(10)), *OPERATORS, "]")
FIRST_ID = 3
VOCABULARY_SIZE = FIRST_ID + len(SYMBOLS)
NUM_CLASSES = 10

MAX_DEPTH, MAX_ARGUMENTS, OPERATOR_PROBABILITY = 10, 10, 0.25
SHORTEST, LONGEST = 501, 1999

_DIGIT = FIRST_ID
_OPERATOR = FIRST_ID + 10
_END = VOCABULARY_SIZE - 1


def encode(text: str) -> list[int]:
    """Ids of an expression with spaces between its symbols, without the end of text."""
    return [FIRST_ID + SYMBOLS.index(symbol) for symbol in text.split()]


def decode(ids: Sequence[int]) -> str:
    """The expression that ids stand for; special ids stand for nothing."""
    return " ".join(SYMBOLS[i - FIRST_ID] for i in ids if i >= FIRST_ID)


def value(ids: Sequence[int]) -> int:
    """The value of an expression: maximum, minimum, median (rounded down) or the sum modulo 10 of the arguments."""
    open_lists: list[list[int]] = [[]]
    for i in ids:
        if i < _OPERATOR:
            open_lists[-1].append(i - _DIGIT)
        elif i < _END:
            open_lists.append([i - _OPERATOR])
        else:
            operator, *arguments = open_lists.pop()
            open_lists[-1].append(_apply(OPERATORS[operator], arguments))
    return open_lists[0][0]


def _apply(operator: str, arguments: list[int]) -> int:
    if operator == "[MAX":
        return max(arguments)
    if operator == "[MIN":
        return min(arguments)
    if operator == "[SM":
        return sum(arguments) % 10
    ordered, middle = sorted(arguments), len(arguments) // 2
    return ordered[middle] if len(ordered) % 2 else (ordered[middle - 1] + ordered[middle]) // 2


def expression(random: np.random.Generator) -> list[int]:
    """Ids of a random expression of a length that the task keeps."""
    while (levels := _shape(random)) is None:
        pass
    # From the leaves up: the symbols of every node of a level, each an argument of a node above.
    below: list[list[int]] = []
    for arguments in reversed(levels):
        digits = random.integers(0, 10, len(arguments)).tolist()
        operators = random.integers(0, len(OPERATORS), len(arguments)).tolist()
        nodes, first = [], 0
        for count, digit, operator in zip(arguments.tolist(), digits, operators, strict=True):
            if not count:
                nodes.append([_DIGIT + digit])
                continue
            inner = [i for node in below[first : first + count] for i in node]
            nodes.append([_OPERATOR + operator, *inner, _END])
            first += count
        below = nodes
    return below[0]


def _shape(random: np.random.Generator) -> list[np.ndarray] | None:
    """How many arguments the nodes of each depth have, 0 for digits; None for a tree that is too short or too long."""
    levels, width, length = [], 1, 0
    while width:
        arguments = random.integers(2, MAX_ARGUMENTS + 1, width)
        is_operator = random.random(width) < OPERATOR_PROBABILITY
        arguments *= is_operator & (len(levels) + 1 < MAX_DEPTH)
        levels.append(arguments)
        # An operator has a symbol at its beginning and one at its end.
        length += width + int(np.count_nonzero(arguments))
        if length > LONGEST:
            return None
        width = int(arguments.sum())
    return levels if length >= SHORTEST else None
