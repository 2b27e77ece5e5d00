"""A compiled program's HLO text as instructions, each with how often it runs.

The compiler's own cost analysis counts the body of a loop once, which makes a stack of scanned layers look like one layer; here
loops run as often as they say. `costs` reads from this what a program computes, moves and sends.
"""

import dataclasses
import math
import re
from collections.abc import Iterator

BYTES = {
    **{"pred": 1, "s8": 1, "u8": 1, "s16": 2, "u16": 2, "bf16": 2, "f16": 2, "s32": 4, "u32": 4, "f32": 4},
    **{"s64": 8, "u64": 8, "f64": 8, "c64": 8, "c128": 16, "f8e4m3fn": 1, "f8e5m2": 1},
}
_SHAPE = re.compile(r"\b([a-z]\w*)\[([\d,]*)\](?:\{([^}]*)\})?")
_INSTRUCTION = re.compile(r"^\s*(ROOT )?%?([\w.\-]+) = (.*)$")
# A kernel's metadata goes over several lines.
_CONTINUED = re.compile(r'\n(?="|\}\})')
_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{\s*$")


@dataclasses.dataclass(frozen=True)
class Array:
    """One array of a shape: its type, dimensions, and whether it lies in on-chip memory."""

    type: str
    dims: tuple[int, ...]
    on_chip: bool = False

    @property
    def bytes(self) -> int:
        return BYTES.get(self.type, 0) * math.prod(self.dims)


@dataclasses.dataclass(frozen=True)
class Instruction:
    """A line of HLO: `name = shape opcode(operands), attributes`."""

    name: str
    arrays: tuple[Array, ...]
    opcode: str
    operands: tuple[str, ...]
    attributes: str
    is_root: bool

    def called(self, key: str) -> str | None:
        """The computation that an attribute such as `body=%name` refers to."""
        match = re.search(rf"\b{key}=%?([\w.\-]+)", self.attributes)
        return match[1] if match else None


class Program:
    """The computations of an HLO module."""

    def __init__(self, text: str):
        self.computations: dict[str, list[Instruction]] = {}
        self.named: dict[str, Instruction] = {}
        self.entry = ""
        self.unknown_loops: set[str] = set()
        current: list[Instruction] = []
        for line in _CONTINUED.sub(" ", text).splitlines():
            header = _COMPUTATION.match(line)
            if header and " = " not in line.split("(", 1)[0]:
                current = self.computations.setdefault(header[2], [])
                self.entry = header[2] if header[1] else self.entry
            elif match := _INSTRUCTION.match(line):
                instruction = _instruction(bool(match[1]), match[2], match[3])
                if instruction:
                    current.append(instruction)
                    self.named[instruction.name] = instruction

    def run(self, computation: str | None = None, times: int = 1, in_fusion: bool = False) -> Iterator[tuple]:
        """Every instruction that runs, as (instruction, how often, whether inside a fusion)."""
        for instruction in self.computations[computation or self.entry]:
            yield instruction, times, in_fusion
            if instruction.opcode == "while":
                trips = self.trip_count(instruction)
                if trips is None:
                    self.unknown_loops.add(instruction.name)
                yield from self.run(instruction.called("body"), times * (1 if trips is None else trips), in_fusion)
            elif instruction.opcode == "conditional":
                for branch in self._branches(instruction)[:1]:
                    yield from self.run(branch, times, in_fusion)
            elif instruction.opcode in ("fusion", "async-start"):
                inside = in_fusion or instruction.opcode == "fusion"
                yield from self.run(instruction.called("calls"), times, inside)
            elif instruction.opcode == "call":
                yield from self.run(instruction.called("to_apply"), times, in_fusion)

    def _branches(self, conditional: Instruction) -> list[str]:
        """The branches of a conditional, the one with the most instructions first."""
        match = re.search(r"branch_computations=\{([^}]*)\}", conditional.attributes)
        keys = ("true_computation", "false_computation")
        names = re.findall(r"[\w.\-]+", match[1]) if match else [conditional.called(key) for key in keys]
        return sorted(names, key=lambda name: -len(self.computations[name]))

    def trip_count(self, loop: Instruction) -> int | None:
        """How often a loop runs: as its annotation says, or from a condition `counter < constant`; None if neither does."""
        known = re.search(r'known_trip_count[":{]+n"?:"?(\d+)', loop.attributes)
        if known:
            return int(known[1])
        condition = self.computations[loop.called("condition")]
        body = [*condition]
        for instruction in condition:
            if instruction.opcode == "fusion":
                body += self.computations[instruction.called("calls")]
        compares = [i for i in body if i.opcode == "compare"]
        bounds = [int(i.attributes) for i in body if i.opcode == "constant" and re.fullmatch(r"-?\d+", i.attributes)]
        if len(compares) != 1 or len(bounds) != 1 or "direction=LT" not in compares[0].attributes:
            return None
        return bounds[0]

    def arrays_of(self, instruction: Instruction) -> list[Array]:
        """The arrays of its operands, one after another."""
        return [array for name in instruction.operands if name in self.named for array in self.named[name].arrays]


def _instruction(is_root: bool, name: str, rest: str) -> Instruction | None:
    """Parses what follows `name =`; None for a line that is no instruction."""
    end = _closing(rest, 0) + 1 if rest.startswith("(") else rest.find(" ")
    shape, rest = rest[:end], rest[end:].strip()
    match = re.match(r"([\w\-]+)\(", rest)
    if not match:
        return None
    close = _closing(rest, match.end() - 1)
    inside, attributes = rest[match.end() : close], rest[close + 1 :]
    if match[1] in ("constant", "parameter"):
        attributes, inside = inside, ""
    operands = tuple(
        re.findall(r"%([\w.\-]+)", inside) or re.findall(r"(?<![\w\[{,.=\-])([a-zA-Z_][\w.\-]*)(?=,|$)", inside)
    )
    arrays = tuple(
        Array(type, tuple(int(d) for d in dims.split(",") if d), "S(1)" in (layout or ""))
        for type, dims, layout in _SHAPE.findall(re.sub(r"/\*.*?\*/", "", shape))
    )
    return Instruction(name, arrays, match[1], operands, attributes, is_root)


def _closing(text: str, start: int) -> int:
    """Index of the parenthesis that closes the one at `start`."""
    depth = 0
    for i in range(start, len(text)):
        depth += {"(": 1, ")": -1}.get(text[i], 0)
        if depth == 0:
            return i
    return len(text) - 1
