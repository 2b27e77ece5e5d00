"""A sequence cut over the `sequence` axis: what each piece must hear from the others, and nothing more.

A state space over K pieces of T tokens is exact with one state from piece to piece. Piece j ends with the state s_j when it
begins with zero, which it knows alone, and T steps multiply what enters it by Ā^T, which all know. So what enters piece k is

    e_k = Σ_{j < k} Ā^{(k-1-j) T} s_j        and, packed, only j with no document's start in the pieces j+1 … k-1

and these sums are made by doubling: in round i every piece adds Ā^{2^i T} times what the piece 2^i before it has summed. Then
each piece runs as a chunk that is given its state. A layer sends 1 + ⌈log₂(K - 1)⌉ states (and a bit a row and piece
for the documents) whatever the length is; the backward pass sends their gradients the other way. Local attention and other
finite filters need the neighbour's last tokens, a halo.

The functions here see the local piece [B, T, …], under `parallel.shard`, unless they say otherwise.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from t5x_ssm.parallel import rules
from t5x_ssm.parallel.shard import cut, shard

Array = jax.Array

# The mesh axis that the length is cut over.
(AXIS,) = rules.mesh_axes(("length",))


def pieces(length: int) -> int:
    """Into how many pieces a length of the whole sequence is cut here: 1 without a mesh, or where it does not divide."""
    return cut("length", length)[1]


def chunked(
    core: Any,
    system: Any,
    u: Array,
    *,
    count: int,
    state: Any = None,
    resets: Array | None = None,
    from_the_end: bool = False,
):
    """A state-space core over a sequence of which each device holds a piece.

    Args:
      core: a module of `t5x_ssm.ssm` with `chunked` and `handover`, or `ssm.grouped.Grouped`.
      system: its discretised parameters.
      u: the local piece [B, T, H] of the input.
      count: K, the number of pieces.
      state: what enters the first piece, the same on every device; None for zero.
      resets: the local piece [B, T] bool; None for nowhere.
      from_the_end: read the last piece first and the first one last; u and resets are given, and y is returned, with the tokens
        of the piece in that order too.

    Returns:
      y as u, and a function that gives, on every device, the state after the piece that is read last.
    """
    way = -1 if from_the_end else 1
    entering = _entering(core, system, u, count, state, resets, way)
    y, end = core.chunked(system, u, state=entering, resets=resets)

    def last():
        here = _place(count, way) == count - 1
        return jax.tree.map(lambda x: lax.psum(jnp.where(here, x, 0), AXIS), end)

    return y, last


def _place(count, way):
    """Which piece, in the order of reading, is here."""
    index = lax.axis_index(AXIS)
    return index if way > 0 else count - 1 - index


def _entering(core, system, u, count, state, resets, way):
    """e_k on the k-th piece in the order of reading."""
    terms = count - 1 if state is None else count
    end, maps = core.handover(system, u, resets, (terms - 1).bit_length())
    entering = jax.tree.map(lambda x: _shift(x, way, count), end)
    index = _place(count, way)
    if state is not None:
        entering = jax.tree.map(lambda first, x: jnp.where(index == 0, first, x), state, entering)
    if resets is not None:
        # How many of the first k pieces begin a document: [K + 1, B].
        begun = jnp.cumsum(lax.all_gather(jnp.any(resets, axis=1), AXIS)[::way], axis=0, dtype=jnp.int32)
        begun = jnp.pad(begun, [(1, 0), (0, 0)])
    for i, run in enumerate(maps):
        added = run(jax.tree.map(lambda x, i=i: _shift(x, way << i, count), entering))
        if resets is not None:
            clear = begun[index] == begun[jnp.maximum(index - (1 << i), 0)]
            added = jax.tree.map(lambda x, clear=clear: _where_rows(clear, x), added)
        entering = jax.tree.map(jnp.add, entering, added)
    return entering


def _where_rows(keep, x):
    return jnp.where(keep.reshape(-1, *(1,) * (x.ndim - 1)), x, 0)


def _shift(x, by, count):
    """x of the piece `by` places before this one (after it, where negative); zero where there is none."""
    return lax.ppermute(x, AXIS, [(i, i + by) for i in range(count) if 0 <= i + by < count])


def with_neighbours(x: Array, count: int, before: int = 0, after: int = 0, fill: Any = 0) -> Array:
    """The local piece between the tokens around it.

    Args:
      x: [B, T, …].
      count: the number of pieces.
      before, after: how many tokens of the neighbouring pieces; at most T when there are pieces.
      fill: what stands beyond both ends of the sequence.

    Returns:
      [B, before + T + after, …].
    """

    def beyond(width, part, by):
        if count == 1:
            return jnp.full_like(x, fill, shape=(x.shape[0], width, *x.shape[2:]))
        end = 0 if by > 0 else count - 1
        return jnp.where(lax.axis_index(AXIS) == end, jnp.asarray(fill, x.dtype), _shift(part, by, count))

    parts = [x]
    if before:
        parts.insert(0, beyond(before, x[:, -before:], 1))
    if after:
        parts.append(beyond(after, x[:, :after], -1))
    return jnp.concatenate(parts, axis=1)


def document_starts(segment_ids: Array) -> Array:
    """True where a packed document begins: [B, L] bool from segment ids [B, L], whole arrays. Position 0 always begins one."""
    count = pieces(segment_ids.shape[1])
    return shard(lambda ids: _starts(ids, count), ("batch", "length"), ("batch", "length"))(segment_ids)


def document_positions(segment_ids: Array) -> Array:
    """Positions within the packed documents, counted from 0: int32 [B, L] from segment ids [B, L], whole arrays."""
    count = pieces(segment_ids.shape[1])

    def local(ids):
        index = _index(ids.shape[1], count)
        first = lax.cummax(jnp.where(_starts(ids, count), index, 0), axis=1)
        if count > 1:
            ends = lax.all_gather(first[:, -1], AXIS)
            earlier = jnp.arange(count)[:, None] < lax.axis_index(AXIS)
            first = jnp.maximum(first, jnp.max(jnp.where(earlier, ends, 0), axis=0)[:, None])
        return index - first

    return shard(local, ("batch", "length"), ("batch", "length"))(segment_ids)


def _starts(ids, count):
    previous = with_neighbours(ids, count, before=1)[:, :-1]
    return (ids != previous) | (_index(ids.shape[1], count) == 0)


def _index(length, count):
    """Positions in the whole sequence of a local piece's tokens."""
    index = jnp.arange(length, dtype=jnp.int32)
    return index if count == 1 else index + length * lax.axis_index(AXIS)


def cut_into_blocks(x: Array, axes, size: int, *, before: bool = False, after: bool = False, fill: Any = 0) -> Array:
    """Blocks of `size` tokens, and with each the tokens of the block before or after it.

    The last block of each piece is filled up behind its own tokens, so that no block lies across two pieces.

    Args:
      x: the whole array [B, L, …].
      axes: its logical axes, of which the second is "length".
      size: tokens in a block, at most those of a piece when there are pieces.
      before, after: whether a block comes with its neighbour.
      fill: what stands beyond the ends.

    Returns:
      [B, blocks, size·(1 + before + after), …], all blocks of a piece on the device of the piece.
    """
    count = pieces(x.shape[1])

    def local(x):
        blocks = -(-x.shape[1] // size)
        x = with_neighbours(x, count, size * before, size * after, fill)
        total = blocks + before + after
        width = [(0, 0), (0, total * size - x.shape[1])] + [(0, 0)] * (x.ndim - 2)
        x = jnp.pad(x, width, constant_values=fill).reshape(x.shape[0], total, size, *x.shape[2:])
        return jnp.concatenate([x[:, i : i + blocks] for i in range(1 + before + after)], axis=2)

    return shard(local, tuple(axes), (*axes[:2], None, *axes[2:]))(x)


def join_blocks(x: Array, axes, length: int) -> Array:
    """Undoes `cut_into_blocks` without neighbours: [B, blocks, size, …] to [B, L, …], with the logical axes of the result."""
    own = length // pieces(length)

    def local(x):
        return x.reshape(x.shape[0], -1, *x.shape[3:])[:, :own]

    return shard(local, (*axes[:2], None, *axes[2:]), tuple(axes))(x)
