"""`diagonal_scan`'s recurrence as one Pallas kernel for TPUs: the states stay in the chip's vector memory.

As a loop of XLA's, every step is a small program that reads and writes HBM. Here a block of tokens is brought in, advanced and
sent out while the next one is on its way, so that the sequence is read once and written once. Eight tokens, one a sublane,
advance together:

  1. what enters them is summed by doubling, over distances of 1, 2 and 4 tokens, multiplied by Ā, Ā², Ā⁴;
  2. the state before them joins, multiplied by Ā¹ … Ā⁸; the last token's state goes on to the next eight.

Only the second step waits for the eight before. The grid is (rows, blocks); the blocks of a row run in order. The two planes lie
side by side in the lanes, each padded to whole registers of 128. All powers are exact to one rounding, and Ā⁸, which meets
every state of the sequence, is a pair of floats, so that no rounding of Ā adds up over the length.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from t5x_ssm.ssm import double_float
from t5x_ssm.ssm.double_float import Double
from t5x_ssm.ssm.powers import Pole, multiply, one_step, power

LANES, SUBLANES = 128, 8

# Bytes of one block of tokens; up to three arrays of them, twice each, are in vector memory together.
BLOCK_BYTES = 1 << 20
LONGEST_BLOCK = 1024


class Powers(NamedTuple):
    """Ā¹ … Ā⁸, [2, 8, P], and what the rounding of Ā⁸ left over, [2, P]; real and imaginary parts."""

    rounded: jax.Array
    low: jax.Array


def powers(pole: Pole) -> Powers:
    """The multipliers that `scan` needs, of a pole with fields [P]."""
    rounded = jnp.moveaxis(jnp.stack(power(pole, jnp.arange(1, SUBLANES + 1))), -1, 1)
    turns = double_float.multiply(Double(pole.turns, pole.turns_low), jnp.full_like(pole.turns, SUBLANES))
    eight = one_step(Pole(SUBLANES * pole.log_decay, *double_float.reduce_turns(turns)))
    low = jnp.stack([(x.high - r) + x.low for x, r in zip(eight, rounded[:, -1], strict=True)])
    return Powers(rounded, low)


def scan(powers: Powers, v, state, barriers=None, reverse: bool = False, partner=None, *, interpret: bool = False):
    """The recurrence x[l] = Ā x[l-1] + v[l] over a sequence.

    Args:
      powers: of Ā.
      v: [B, L, 2, P] float32.
      state: before the first token, or after the last when `reverse`; [B, 2, P].
      barriers: bool [B, L], True where the state that would enter a token, from whichever side, is zero; None for nowhere.
      reverse: from the last token to the first.
      partner: y [B, L, 2, P]; see below.
      interpret: run the kernel as ordinary operations, on any machine.

    Returns:
      The states [B, L, 2, P]; with a partner also the real and imaginary part of Σ conj(y[l]) x' for the state x' that
      enters token l, each [P].
    """
    batch, length, _, modes = v.shape
    lanes = -(-modes // LANES) * LANES
    longest = max(SUBLANES, min(LONGEST_BLOCK, BLOCK_BYTES // (8 * lanes)) // SUBLANES * SUBLANES)
    block = min(longest, -(-length // SUBLANES) * SUBLANES)
    blocks = -(-length // block)
    # Zeros go where the run ends, so that the given state meets the first token.
    room = blocks * block - length
    tokens = (room, 0) if reverse else (0, room)

    def flat(x, *widths):
        x = jnp.pad(x, [*widths, (0, 0), (0, lanes - modes)])
        return x.reshape(*x.shape[:-2], 2 * lanes)

    def place(row, i):
        return row, blocks - 1 - i if reverse else i, 0

    def of_row(count):
        return pl.BlockSpec((None, count, 2 * lanes), lambda row, i: (row, 0, 0))

    def whole(count):
        return pl.BlockSpec((count, 2 * lanes), lambda row, i: (0, 0))

    sequence = pl.BlockSpec((None, block, 2 * lanes), place)
    table = jnp.swapaxes(powers.rounded, 0, 1)
    inputs = [flat(table, (0, 0)), flat(powers.low)[None], flat(state, (0, 0))[:, None], flat(v, (0, 0), tokens)]
    specs = [whole(SUBLANES), whole(1), of_row(1), sequence]
    if barriers is not None:
        inputs.append(jnp.pad(1 - barriers.astype(v.dtype), [(0, 0), tokens], constant_values=1)[..., None])
        specs.append(pl.BlockSpec((None, block, 1), place))
    outputs, out_specs = [jax.ShapeDtypeStruct((batch, blocks * block, 2 * lanes), v.dtype)], [sequence]
    if partner is not None:
        inputs.append(flat(partner, (0, 0), tokens))
        specs.append(sequence)
        outputs.append(jax.ShapeDtypeStruct((batch, SUBLANES, 2 * lanes), v.dtype))
        out_specs.append(of_row(SUBLANES))
    found = pl.pallas_call(
        functools.partial(_kernel, reverse=reverse, has_barriers=barriers is not None, has_partner=partner is not None),
        grid=(batch, blocks),
        in_specs=specs,
        out_specs=out_specs,
        out_shape=outputs,
        scratch_shapes=[pltpu.VMEM((1, 2 * lanes), v.dtype)],
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "arbitrary")),
        interpret=interpret,
        name="diagonal_scan",
    )(*inputs)
    states = found[0].reshape(batch, blocks * block, 2, lanes)[..., :modes]
    states = states[:, room:] if reverse else states[:, :length]
    if partner is None:
        return states, None
    along, across = jnp.sum(found[1], (0, 1)).reshape(2, lanes)[:, :modes]
    return states, (along, across)


def _kernel(table_ref, low_ref, state_ref, v_ref, *refs, reverse, has_barriers, has_partner):
    refs = list(refs)
    keep_ref = refs.pop(0) if has_barriers else None
    partner_ref = refs.pop(0) if has_partner else None
    out_ref = refs.pop(0)
    products_ref = refs.pop(0) if has_partner else None
    (carry_ref,) = refs
    lanes, groups = v_ref.shape[-1] // 2, v_ref.shape[0] // SUBLANES

    def planes(x):
        return x[:, :lanes], x[:, lanes:]

    def joined(x):
        return jnp.concatenate(x, axis=-1)

    def add(x, y):
        return x[0] + y[0], x[1] + y[1]

    def masked(x, mask):
        return x[0] * mask, x[1] * mask

    # How many of the eight a token has before it, in the order in which they are met.
    token = lax.broadcasted_iota(jnp.int32, (SUBLANES, lanes), 0)
    before = SUBLANES - 1 - token if reverse else token

    def later(x, distance):
        """Each token is given what is that many tokens before it."""
        return pltpu.roll(x, SUBLANES - distance if reverse else distance, 0)

    def ordered(x):
        return tuple(jnp.concatenate([part[k : k + 1] for k in reversed(range(SUBLANES))]) for part in x)

    @pl.when(pl.program_id(1) == 0)
    def _():
        carry_ref[...] = state_ref[...]
        if has_partner:
            products_ref[...] = jnp.zeros_like(products_ref)

    table, low = planes(table_ref[...]), planes(low_ref[...])
    power_of = {k: tuple(part[k - 1 : k] for part in table) for k in (1, 2, 4)}
    inside = {k: (before >= k).astype(v_ref.dtype) for k in (1, 2, 4)}
    from_carry = ordered(table) if reverse else table
    end = slice(0, 1) if reverse else slice(SUBLANES - 1, SUBLANES)

    def eight(i, loop):
        carry, along, across = loop
        first = (groups - 1 - i if reverse else i) * SUBLANES
        rows = pl.ds(pl.multiple_of(first, SUBLANES), SUBLANES)
        x = planes(v_ref[rows, :])
        keep = reach = jnp.broadcast_to(keep_ref[rows, :], (SUBLANES, lanes)) if has_barriers else None
        for k in (1, 2, 4):
            near = inside[k] if reach is None else inside[k] * reach
            x = add(x, masked(multiply(*power_of[k], *(later(part, k) for part in x)), near))
            if reach is not None:
                reach = reach * jnp.where(before >= k, later(reach, k), 1)
        entering = multiply(*from_carry, *carry)
        x = add(x, entering if reach is None else masked(entering, reach))
        out_ref[rows, :] = joined(x)
        if has_partner:
            previous = tuple(jnp.where(before == 0, c, later(part, 1)) for c, part in zip(carry, x, strict=True))
            y, previous = planes(partner_ref[rows, :]), previous if keep is None else masked(previous, keep)
            along = along + y[0] * previous[0] + y[1] * previous[1]
            across = across + y[0] * previous[1] - y[1] * previous[0]
        rest = multiply(*low, *carry)
        carry = add(tuple(part[end] for part in x), rest if reach is None else masked(rest, reach[end]))
        return carry, along, across

    zero = jnp.zeros((SUBLANES, lanes), v_ref.dtype)
    carry, along, across = lax.fori_loop(0, groups, eight, (planes(carry_ref[...]), zero, zero))
    carry_ref[...] = joined(carry)
    if has_partner:
        products_ref[...] += joined((along, across))
