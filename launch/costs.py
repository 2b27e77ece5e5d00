"""What a compiled program computes, moves and sends, from its HLO text, each loop counted as often as it runs.

Here a product in float32 is not one in bfloat16, as it is for the compiler's own cost analysis:

  FLOPs        two for each multiplication of dots and convolutions (of convolutions those on real elements: the TPU's
               compiler writes batched products as convolutions over padding), and those of kernels (`launch.kernels`);
  passes       of the matrix unit for each: 1 for bfloat16 operands and default precision, 3 for "high", 6 for "highest";
  HBM bytes    what operations outside fusions read and write; slices count as what they take of their operand, and what
               lies in on-chip memory (`S(1)` in a layout) not at all;
  collectives  by kind and mesh axes: how often, and the larger of input and output. Between slices, where the program hands
               arrays to the host and its network, the axes are "slices".
"""

import collections
import dataclasses
import functools
import itertools
import math
import re
from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from launch import kernels
from launch.hlo import Array, Instruction, Program

COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute", "collective-broadcast")
# Instead of mesh axes, for what goes through the network.
BETWEEN_SLICES = "slices"
PASSES = {"high": 3, "highest": 6}
# They move nothing themselves: names for parts of others, or wrappers whose contents are counted.
FREE = frozenset(
    [
        "parameter",
        "constant",
        "tuple",
        "get-tuple-element",
        "bitcast",
        "while",
        "conditional",
        "call",
        "after-all",
        "partition-id",
        "replica-id",
        "iota",
        "opt-barrier",
        "copy-done",
        "async-update",
        "async-done",
        "async-start",
    ]
)


@dataclasses.dataclass(frozen=True)
class Collective:
    """All collectives of one kind over the same mesh axes; bytes are those of one device in one run of the program."""

    kind: str
    axes: str
    count: int
    bytes: int
    largest: int
    group_size: int


@dataclasses.dataclass(frozen=True)
class Costs:
    """Of one device in one run of the program.

    Attributes:
      flops: see the module's docstring.
      passes_flops: the same times passes of the matrix unit.
      hbm_bytes: read and written.
      collectives: see `Collective`.
      unknown_loops: loops whose number of runs could not be read; they are counted once.
    """

    flops: float
    passes_flops: float
    hbm_bytes: float
    collectives: tuple[Collective, ...]
    unknown_loops: tuple[str, ...]


def of_program(text: str, mesh_shape: Mapping[str, int]) -> Costs:
    """Reads a compiled program.

    Args:
      text: of `jax.stages.Compiled.as_text()`.
      mesh_shape: the axes of the mesh that it was compiled for, in order, and their sizes.
    """
    program = Program(text)
    flops = passes_flops = hbm = 0.0
    found: dict[tuple[str, str], list[tuple[int, int, int]]] = collections.defaultdict(list)
    channels: set[str] = set()
    for instruction, times, in_fusion in program.run():
        if instruction.opcode in ("dot", "convolution"):
            one = (
                _dot_flops(program, instruction)
                if instruction.opcode == "dot"
                else _convolution_flops(program, instruction)
            )
            flops += times * one
            passes_flops += times * one * _passes(program, instruction)
        elif instruction.opcode == "custom-call":
            one = kernels.flops(instruction.attributes, program.arrays_of(instruction))
            flops, passes_flops = flops + times * one, passes_flops + times * one
        kind = instruction.opcode.removesuffix("-start")
        if kind in COLLECTIVES and in_fusion:
            # One collective goes on behind several fusions, each of which names it and does a part.
            channel = re.search(r"channel_id=(\d+)", instruction.attributes)
            if channel and channel[1] in channels:
                continue
            channels.add(channel[1] if channel else instruction.name)
            hbm += times * _in_hbm(instruction.arrays)
        if kind in COLLECTIVES:
            axes, size = replica_axes(instruction.attributes, mesh_shape)
            if size > 1:
                found[kind, axes].append((times, _collective_bytes(program, instruction), size))
        if between := between_slices(instruction):
            kind, size = between
            found[kind, BETWEEN_SLICES].append((times, program.arrays_of(instruction)[0].bytes, size))
        if not in_fusion:
            hbm += times * _hbm_bytes(program, instruction)
    collectives = tuple(
        Collective(
            kind,
            axes,
            count=sum(times for times, _, _ in entries),
            bytes=sum(times * size for times, size, _ in entries),
            largest=max(size for _, size, _ in entries),
            group_size=max(group for _, _, group in entries),
        )
        for (kind, axes), entries in sorted(found.items())
    )
    return Costs(flops, passes_flops, hbm, collectives, tuple(sorted(program.unknown_loops)))


def _dot_flops(program: Program, dot: Instruction) -> float:
    """2 x elements of the result x size of what is summed over."""
    lhs = program.arrays_of(dot)[0]
    contracted = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", dot.attributes)[1]
    size = math.prod(lhs.dims[int(d)] for d in contracted.split(",") if d)
    return 2.0 * math.prod(dot.arrays[0].dims) * size


def _convolution_flops(program: Program, convolution: Instruction) -> float:
    """2 x (batch, output and input features) x pairs of output and window positions that meet a real element."""
    lhs, rhs = program.arrays_of(convolution)[:2]
    out = convolution.arrays[0]
    labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", convolution.attributes)
    features = out.dims[labels[3].index("b")] * out.dims[labels[3].index("f")] * rhs.dims[labels[2].index("i")]
    pairs = 1
    for axis in range(len(labels[1]) - 2):
        digit = str(axis)
        pairs *= _real_pairs(
            lhs.dims[labels[1].index(digit)],
            rhs.dims[labels[2].index(digit)],
            out.dims[labels[3].index(digit)],
            stride=_window(convolution.attributes, "stride", axis, "1"),
            pad=_window(convolution.attributes, "pad", axis, "0_0"),
            lhs_dilate=_window(convolution.attributes, "lhs_dilate", axis, "1"),
            rhs_dilate=_window(convolution.attributes, "rhs_dilate", axis, "1"),
        )
    return 2.0 * features * pairs


def _window(attributes: str, field: str, axis: int, default: str) -> str:
    window = re.search(r"window=\{([^}]*)\}", attributes)
    match = re.search(rf"\b{field}=([\d_x\-]+)", window[1]) if window else None
    return match[1].split("x")[axis] if match else default


@functools.cache
def _real_pairs(size: int, window: int, out: int, *, stride: str, pad: str, lhs_dilate: str, rhs_dilate: str) -> int:
    """Pairs of output and window positions of one axis that fall on an element of the input, not on padding."""
    low = int(pad.split("_")[0])
    position = np.arange(out)[:, None] * int(stride) + np.arange(window)[None] * int(rhs_dilate) - low
    dilate = int(lhs_dilate)
    return int(np.sum((position >= 0) & (position <= (size - 1) * dilate) & (position % dilate == 0)))


def _passes(program: Program, product: Instruction) -> int:
    """Passes of the matrix unit that one multiplication takes."""
    if all(array.type not in ("f32", "f64") for array in program.arrays_of(product)[:2]):
        return 1
    precision = re.search(r"operand_precision=\{([\w,]*)\}", product.attributes)
    return max(PASSES.get(word, 1) for word in precision[1].split(",")) if precision else 1


def _collective_bytes(program: Program, collective: Instruction) -> int:
    """The larger of what goes in and what comes out."""
    before, after = (
        sum(array.bytes for array in arrays) for arrays in (program.arrays_of(collective), collective.arrays)
    )
    # What an asynchronous start gives out holds its operands too.
    after -= before if collective.opcode in ("all-gather-start", "collective-permute-start") else 0
    return max(before, after)


def _hbm_bytes(program: Program, instruction: Instruction) -> int:
    """What an operation reads from and writes to the chip's main memory."""
    if instruction.opcode in FREE or instruction.opcode.endswith("-done"):
        return 0
    operands = [program.named[name] for name in instruction.operands if name in program.named]
    written = _in_hbm(instruction.arrays)
    if instruction.opcode == "copy-start":
        return _in_hbm(instruction.arrays[:2])
    if instruction.opcode in ("dynamic-slice", "slice", "gather"):
        return 2 * written
    if instruction.opcode == "dynamic-update-slice":
        return 2 * _in_hbm(operands[1].arrays)
    if instruction.opcode != "fusion":
        return written + sum(_in_hbm(operand.arrays) for operand in operands)
    taken, replaced, passed = _parts(program, instruction.called("calls"))
    written -= _in_hbm([array for index, array in enumerate(instruction.arrays) if index in passed])
    read = 0
    for index, operand in enumerate(operands):
        whole = _in_hbm(operand.arrays)
        read += min(whole, taken.get(index, whole))
    for index, size in replaced.items():
        # Updated in place: only the new part is written, though the result is the whole array.
        if index < len(operands):
            written -= max(0, _in_hbm(operands[index].arrays) - size)
    return read + max(0, written)


def _parts(program: Program, computation: str) -> tuple[dict[int, int], dict[int, int], set[int]]:
    """Of a fusion's parameters that are not read whole: bytes read, and bytes replaced; and which results are not its work.

    Parameters are sliced, updated in place, or handed on, to the result or a collective that goes on behind the fusion.
    """
    body = program.computations[computation]
    users = collections.defaultdict(list)
    for instruction in body:
        for name in instruction.operands:
            users[name].append(instruction)
    taken, replaced = {}, {}
    root = next(instruction for instruction in body if instruction.is_root)
    of_others = lambda source: source.opcode == "parameter" or source.opcode.removesuffix("-start") in COLLECTIVES
    results = [program.named[name] for name in root.operands] if root.opcode == "tuple" else []
    passed = {index for index, source in enumerate(results) if of_others(source)}
    for parameter in body:
        if parameter.opcode != "parameter" or not parameter.attributes.isdigit():
            continue
        reads = list(itertools.chain.from_iterable(_through_bitcasts(parameter.name, users)))
        index = int(parameter.attributes)
        if reads and all(user is root or user.opcode in COLLECTIVES for _, user in reads) and passed:
            taken[index] = 0
        elif reads and all(user.opcode in ("dynamic-slice", "slice", "gather") for _, user in reads):
            taken[index] = sum(user.arrays[0].bytes for _, user in reads)
        elif reads and all(user.opcode == "dynamic-update-slice" and user.operands[0] == name for name, user in reads):
            replaced[index] = sum(program.named[user.operands[1]].arrays[0].bytes for _, user in reads)
            taken[index] = 0
    return taken, replaced, passed


def _through_bitcasts(name: str, users: Mapping[str, list[Instruction]]) -> Iterator[list[tuple[str, Instruction]]]:
    for user in users[name]:
        if user.opcode == "bitcast":
            yield from _through_bitcasts(user.name, users)
        else:
            yield [(name, user)]


def _in_hbm(arrays: Sequence[Array]) -> int:
    return sum(array.bytes for array in arrays if not array.on_chip)


def replica_axes(attributes: str, mesh_shape: Mapping[str, int]) -> tuple[str, int]:
    """The mesh axes along which a collective's devices differ, as 'data+fsdp', and how many devices take part in one."""
    members = _first_group(attributes, math.prod(mesh_shape.values()))
    if len(members) < 2:
        return "none", len(members)
    places = np.stack(np.unravel_index(members, tuple(mesh_shape.values())), axis=1)
    axes = [axis for axis, column in zip(mesh_shape, places.T, strict=True) if len(set(column)) > 1]
    # Permutations are pairs; the ring that they make up is the axis.
    is_pair = "source_target_pairs" in attributes
    return "+".join(axes), math.prod(mesh_shape[axis] for axis in axes) if is_pair else len(members)


def between_slices(instruction: Instruction) -> tuple[str, int] | None:
    """(kind, number of slices) of what is sent to the host for other slices; None for any other instruction."""
    kind = re.search(r'_xla_megascale_transfer_type="(\w+)"', instruction.attributes)
    if instruction.opcode != "send" or not kind:
        return None
    target = re.search(r'_xla_megascale_target="\{([\d,:]+)\}', instruction.attributes)
    ends = [[int(n) for n in part.split(":")] for part in target[1].split(",")]  # "1,2", or "1:4" for a range
    return kind[1].lower().replace("_", "-"), sum(end[-1] - end[0] + 1 for end in ends)


def _first_group(attributes: str, devices: int) -> np.ndarray:
    """Devices of one group, in any of the three ways in which HLO writes groups."""
    if match := re.search(r"source_target_pairs=\{\{(\d+),(\d+)\}", attributes):
        return np.array([int(match[1]), int(match[2])])
    if match := re.search(r"replica_groups=mesh\[([^\]]*)\][^{]*\{([^}]*)\}", attributes):
        sizes = {name: int(size) for name, size in re.findall(r"'(\w+)'=(\d+)", match[1])}
        ids = np.arange(devices).reshape(tuple(sizes.values()))
        taken = []
        for axis, (name, size) in enumerate(sizes.items()):
            part = re.search(rf"'{name}'(?::\((\d+)\)(\d+))?", match[2])
            if part is None:
                taken.append((axis, np.array([0])))
            elif part[1]:
                inner = size // (int(part[1]) * int(part[2]))
                taken.append((axis, np.arange(int(part[2])) * inner))
            else:
                taken.append((axis, np.arange(size)))
        return ids[np.ix_(*(index for _, index in taken))].ravel()
    if match := re.search(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", attributes):
        shape, dims = ([int(n) for n in match[i].split(",")] for i in (1, 2))
        ids = np.arange(math.prod(dims)).reshape(dims)
        ids = ids.transpose([int(n) for n in match[3].split(",")]) if match[3] else ids
        return ids.reshape(shape)[0]
    if match := re.search(r"replica_groups=\{\{([\d,]+)\}", attributes):
        return np.array([int(n) for n in match[1].split(",")])
    return np.arange(devices)
