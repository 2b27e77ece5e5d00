"""All states of a diagonal recurrence, x[l] = Ā x[l-1] + v[l] per mode: S5's scan.

The public form composes the pairs (Ā, v) by an associative scan: log L passes over complex arrays of the sequence's size.
Here the length is cut into Q blocks of T tokens that advance side by side, so that one step is one long vector operation:

  1. every block runs from zero, and only its last state is kept;
  2. the blocks' last states pass through Ā^T, one block after another;
  3. every block runs again, from the state that truly enters it, over its own input in place.

The sequence is read twice and written once, whatever L is; on TPUs a kernel of `pallas_scan` reads it once. The gradient is the
same recurrence in reversed time with the conjugate Ā, so it is written once and costs the same; nothing but the states is
kept for it.

Shape suffixes: B batch, L length, Q blocks, T steps in a block, P modes. A complex array has an axis of two planes, real
and imaginary, before the modes.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from t5x_ssm.ssm import pallas_scan
from t5x_ssm.ssm.double_float import computed_once
from t5x_ssm.ssm.powers import Pole, log_power, multiply

# Floats of the states that advance in one step: enough that a step outlasts its start, few enough to stay in cache.
STEP_ELEMENTS = 1 << 15

# Ā^T is exact to one rounding and Ā itself is off by half a unit, so that only the steps inside a block can add up: to at
# most 256 times 2⁻²⁵, whatever the length.
LONGEST_BLOCK = 256


class _Multiplier(NamedTuple):
    """Ā and Ā^T, and the pole that they are powers of.

    Attributes:
      factors: their real parts, and minus and plus their imaginary parts for the two planes of what they multiply, [2, 3, P].
      pole: log Ā.
    """

    factors: jax.Array
    pole: Pole

    def times(self, x, *, steps_of_block: bool = False, conjugate: bool = False):
        """Ā x, or Ā^T x, or their conjugates times x; x in planes [..., 2, P]."""
        factors = self.factors[int(steps_of_block)]
        turned = factors[1:] * _swap(x)
        return factors[0] * x + (-turned if conjugate else turned)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def states(pole: Pole, v, state=None, resets=None, reverse: bool = False):
    """The states after every token.

    Args:
      pole: log Ā, fields [P].
      v: what enters, B̄u, as planes [B, L, 2, P].
      state: the state before the first token (after the last one when `reverse`), [B, 2, P]; None for
        zero.
      resets: bool [B, L], True where nothing passes between that token and the one before it, in either direction; the
        given state of a forward run does not pass a reset at token 0. None for nowhere.
      reverse: x[l] = Ā x[l+1] + v[l] instead.

    Returns:
      [B, L, 2, P].
    """
    return _forward(pole, v, state, resets, reverse)[0]


def _forward(pole, v, state, resets, reverse):
    block = _block_length(*v.shape)
    # One program for the three rows, whose sines and cosines all loops, of the backward pass too, share.
    row = np.arange(3)[:, None]
    log_size, angle = log_power(pole, jnp.array([[1] * 3, [block] * 3])[..., None])
    turned = jnp.where(row == 0, jnp.cos(angle), jnp.where(row == 1, -1, 1) * jnp.sin(angle))
    factors = computed_once(jnp.exp(log_size) * turned)
    multiplier = _Multiplier(factors, pole)
    x, _ = _run(multiplier, v, state, resets, block, reverse)
    return x, (multiplier, x, state, resets)


def _backward(reverse, residuals, x_bar):
    multiplier, x, state, resets = residuals
    block = _block_length(*x.shape)
    v_bar, (re, im) = _run(multiplier, x_bar, None, resets, block, not reverse, partner=x)
    state_bar = None
    if state is not None:
        # The last step of the adjoint, into the given state.
        entered = v_bar[:, -1 if reverse else 0]
        if resets is not None and not reverse:
            entered = jnp.where(resets[:, 0, None, None], 0, entered)
        state_bar = multiplier.times(entered, conjugate=True)
        re, im = re + jnp.sum(entered * state, (0, 1)), im + _cross(entered, state)
    # From dL/dĀ to dL/d log Ā; the phase is in turns.
    log_decay, angle = multiply(re, im, multiplier.factors[0, 0], multiplier.factors[0, 1])
    pole_bar = Pole(log_decay, 2 * np.pi * angle, jnp.zeros_like(angle))
    return pole_bar, v_bar, state_bar, None


states.defvjp(_forward, _backward)


def _block_length(batch, length, _, modes):
    """T: a power of two, so that there are Q of them to fill a step and no more than T."""
    blocks = max(1, STEP_ELEMENTS // (2 * batch * modes))
    needed = max(-(-length // blocks), length**0.5)
    return min(length, LONGEST_BLOCK, 1 << (int(np.ceil(needed)) - 1).bit_length())


def _swap(x):
    """Planes (im, re)."""
    return x[..., ::-1, :]


def _cross(x, y):
    """The imaginary part of conj(y) x, summed over all but the modes."""
    product = x * _swap(y)
    return jnp.sum(product[..., 1, :] - product[..., 0, :], tuple(range(product.ndim - 2)))


def _run(multiplier, v, state, resets, block, reverse, partner=None):
    """The recurrence, by the implementation of the platform.

    Args:
      multiplier: see `_Multiplier`.
      v, state, resets, reverse: as in `states`.
      block: T.
      partner: the states [B, L, 2, P] of the run whose adjoint this is: the multiplier is conj(Ā), and the gradient of Ā is
        added up on the way.

    Returns:
      The states [B, L, 2, P]; with a partner y also the real and imaginary part of Σ conj(y[l]) x[l-1] (l+1 when
      `reverse`) where no reset is between, each [P].
    """
    barriers = None
    if resets is not None:
        # In reverse it is the reset of the token after that cuts.
        barriers = jnp.pad(resets[:, 1:], [(0, 0), (0, 1)]) if reverse else resets

    def in_blocks(multiplier, *arrays):
        return _run_in_blocks(multiplier, *arrays, block=block, reverse=reverse)

    arrays = (multiplier, v, state, barriers, partner)
    if v.dtype != jnp.float32:
        return in_blocks(*arrays)
    return lax.platform_dependent(*arrays, tpu=functools.partial(_run_in_kernel, reverse=reverse), default=in_blocks)


def _run_in_kernel(multiplier, v, state, barriers, partner, *, reverse, interpret=False):
    """The recurrence as `pallas_scan`'s kernel; arguments and results as `_run_in_blocks`."""
    pole = multiplier.pole
    if state is None:
        state = jnp.zeros((v.shape[0], *v.shape[2:]), v.dtype)
    if partner is not None:
        pole = Pole(pole.log_decay, -pole.turns, -pole.turns_low)
    return pallas_scan.scan(pallas_scan.powers(pole), v, state, barriers, reverse, partner, interpret=interpret)


def _run_in_blocks(multiplier, v, state, barriers, partner, *, block, reverse):
    """The recurrence in blocks; `barriers`, bool [B, L] or None, are where the state that would enter a token is zero."""
    batch, length = v.shape[:2]
    blocks = -(-length // block)
    adjoint = partner is not None
    # Zeros go where the run ends, so that the given state meets the first token.
    room = blocks * block - length
    side = (room, 0) if reverse else (0, room)

    def in_blocks(x):
        if room:
            x = jnp.pad(x, [(0, 0), side] + [(0, 0)] * (x.ndim - 2))
        return x.reshape(batch, blocks, block, *x.shape[2:])

    v = in_blocks(v)
    partner = None if partner is None else in_blocks(partner)
    barriers = None if barriers is None else in_blocks(barriers)

    def at(x, t):
        return lax.dynamic_index_in_dim(x, t, axis=2, keepdims=False, allow_negative_indices=False)

    def entering(x, t):
        return x if barriers is None else jnp.where(at(barriers, t)[..., None, None], 0, x)

    def advance(x, v):
        return multiplier.times(x, conjugate=adjoint) + v

    def place(i):
        return block - 1 - i if reverse else i

    first = zero = jnp.zeros((batch, blocks, *v.shape[3:]), v.dtype)
    if state is not None:
        parts = [state[:, None].astype(v.dtype), zero[:, 1:]]
        first = jnp.concatenate(parts[::-1] if reverse else parts, axis=1)
    if blocks > 1:
        last = lax.fori_loop(0, block, lambda i, x: advance(entering(x, place(i)), at(v, place(i))), first)
        passes = None if barriers is None else ~jnp.any(barriers, axis=2)
        over_block = functools.partial(multiplier.times, steps_of_block=True, conjugate=adjoint)
        first = _enter_blocks(over_block, first, last, passes, reverse)

    def step(i, carry):
        x, out, products = carry
        t = place(i)
        x = entering(x, t)
        if partner is not None:
            y = at(partner, t)
            products = products[0] + x * y, products[1] + x * _swap(y)
        x = advance(x, at(out, t))
        return x, lax.dynamic_update_index_in_dim(out, x, t, axis=2, allow_negative_indices=False), products

    products = None if partner is None else (zero, zero)
    _, out, products = lax.fori_loop(0, block, step, (first, v, products))
    out = out.reshape(batch, blocks * block, *out.shape[3:])
    out = out[:, room:] if reverse else out[:, :length]
    if partner is not None:
        along, across = (jnp.sum(p, (0, 1)) for p in products)
        products = along[0] + along[1], across[1] - across[0]
    return out, products


def _enter_blocks(over_block, first, last, passes, reverse):
    """The states that enter the blocks.

    Args:
      over_block: what a block does to the state that enters it, [B, 2, P] to [B, 2, P].
      first: [B, Q, 2, P], the given state in the block where the run begins and zero in the others.
      last: [B, Q, 2, P], the states with which the blocks end when they begin with `first`.
      passes: bool [B, Q], False where a reset is in the block; None where there are none.
      reverse: blocks follow one another backwards.
    """

    blocks = first.shape[1]

    def at(x, q):
        return lax.dynamic_index_in_dim(x, q, axis=1, keepdims=False, allow_negative_indices=False)

    def body(i, carry):
        x, entered = carry
        q = blocks - 1 - i if reverse else i
        entered = lax.dynamic_update_index_in_dim(entered, at(first, q) + x, q, axis=1, allow_negative_indices=False)
        moved = over_block(x)
        return at(last, q) + (moved if passes is None else jnp.where(at(passes, q)[:, None, None], moved, 0)), entered

    return lax.fori_loop(0, blocks, body, (jnp.zeros_like(first[:, 0]), first))[1]
