"""Reads from compiled HLO what a program sends between devices."""

import collections
import math
import re

COLLECTIVES = ("all-gather", "all-reduce", "all-to-all", "collective-permute", "reduce-scatter")
BYTES = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "s32": 4, "u32": 4, "f32": 4, "s64": 8, "f64": 8}

_INSTRUCTION = re.compile(rf"= (.*?) ({'|'.join(COLLECTIVES)})(?:-start)?\((.*)")
# Groups of one device each, from which nothing is sent.
_ALONE = re.compile(r"replica_groups=\{\{\d+\}")
_ARRAY = re.compile(r"\b([a-z]+\d*)\[([\d,]*)\]")


def bytes_moved(hlo: str) -> collections.Counter:
    """Bytes of the results of all collectives, by kind. A collective in a loop counts once."""
    total = collections.Counter()
    for shape, kind, rest in _INSTRUCTION.findall(hlo):
        if _ALONE.search(rest):
            continue
        for dtype, dims in _ARRAY.findall(shape):
            total[kind] += BYTES[dtype] * math.prod(int(d) for d in dims.split(",") if d)
    return total
