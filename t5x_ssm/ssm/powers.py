"""Powers of the poles of a diagonal system, and the two matrix products that every long computation reduces to.

A diagonal system multiplies mode n by Ā_n at each step, so all it ever needs is Ā_n^l for l up to the sequence length.
Two things make that delicate in float32. The phase l·θ grows to thousands of turns while only its fraction matters:
here θ is kept in turns and multiplied by l in wrapping 32-bit integers, where dropping whole turns is exact. And a
table of N·L powers is too big to make at L = 65,536: here l = q·T + r, so that two short tables give all powers and the
sum over modes becomes a real matrix product.

Shape suffixes: B batch, H channels, N modes, L length, Q tiles, T steps in a tile, M = 2N real components of the modes.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from t5x_ssm.ssm import double_float
from t5x_ssm.ssm.double_float import Double, value_with_derivative_of

# Elements of the largest array that a tile group of `modal_sum` or `moments` makes: 2^22 float32 values are 16 MiB.
GROUP_ELEMENTS = 1 << 22


class Pole(NamedTuple):
    """The logarithm of the one-step multipliers Ā, each field of shape [N] (shared by all channels) or [H, N].

    Attributes:
      log_decay: Re log Ā, nats per step; negative where the mode decays.
      turns: Im log Ā / 2π per step, rounded, in [-1/2, 1/2].
      turns_low: what the rounding of `turns` left over, so that turns + turns_low has about 48 correct bits.
    """

    log_decay: jax.Array
    turns: jax.Array
    turns_low: jax.Array


def fraction_of_turns(turns, turns_low, exponents):
    """The fraction in [-1/2, 1/2) of exponents·(turns + turns_low), shapes broadcast; exact to one rounding.

    θ = m·2⁻³² + rest with integer m, and l·m wraps at 2³², a whole number of turns. The derivative is that of the
    product before the wrap: l with respect to `turns`.
    """
    exponents = exponents.astype(jnp.int32)
    fixed = lax.stop_gradient(turns) * 2.0**32
    low = lax.stop_gradient(turns_low) * 2.0**32
    whole, whole_low = jnp.round(fixed), jnp.round(low)
    rest = (fixed - whole) + (low - whole_low)
    # A phase of exactly half a turn is 2³¹, which an int32 writes as -2³¹: the same angle.
    whole = jnp.where(whole >= 2.0**31, whole - 2.0**32, whole)
    wrapped = exponents * (whole.astype(jnp.int32) + whole_low.astype(jnp.int32))
    length = exponents.astype(turns.dtype)
    value = wrapped.astype(turns.dtype) * 2.0**-32 + length * rest * 2.0**-32
    return value_with_derivative_of(value, length * turns)


def log_power(pole: Pole, exponents):
    """The logarithm of Ā^l, less whole turns: real and imaginary part, in the shape to which pole and exponents broadcast."""
    if isinstance(exponents, int) and exponents == 1:  # nothing wraps, so there is less to compile
        return pole.log_decay, 2 * jnp.pi * (pole.turns + lax.stop_gradient(pole.turns_low))
    exponents = jnp.asarray(exponents)
    angle = 2 * jnp.pi * fraction_of_turns(pole.turns, pole.turns_low, exponents)
    return pole.log_decay * exponents.astype(pole.log_decay.dtype), angle


def _each(pole: Pole, exponents) -> Pole:
    """The pole with an axis for each of the exponents'."""
    return Pole(*(x.reshape(x.shape + (1,) * np.ndim(exponents)) for x in pole))


def power(pole: Pole, exponents):
    """Ā to integer powers.

    Args:
      pole: fields of shape S.
      exponents: integers below 2³¹ in size, shape E, or 1.

    Returns:
      Real and imaginary parts, each of shape S + E.
    """
    return _exponential(*log_power(_each(pole, exponents), exponents))


@jax.custom_jvp
def _exponential(exponent, angle):
    """e^(exponent + i angle) as a pair, which is also all that its gradient keeps (five arrays of this size otherwise)."""
    size = jnp.exp(exponent)
    return size * jnp.cos(angle), size * jnp.sin(angle)


@_exponential.defjvp
def _(primals, tangents):
    value = _exponential(*primals)
    return value, multiply(*value, *tangents)


def power_minus_one(pole: Pole, exponents):
    """Ā^l - 1 without cancellation where Ā^l is close to 1; arguments as `power`, results as planes [2, S + E]."""
    exponent, angle = log_power(_each(pole, exponents), exponents)
    # Both planes are one program: each asks for the functions of its own arguments, and gets what it does not need of zero.
    real = double_float.planes_of(True, False, exponent.ndim)
    growth, size = jnp.expm1(jnp.where(real, exponent, 0)), jnp.exp(jnp.where(real, 0, exponent))
    sine = jnp.sin(jnp.where(real, angle / 2, angle))
    return jnp.where(real, growth - 2 * (1 + growth) * jnp.square(sine), size * sine)


def one_step(pole: Pole) -> tuple[Double, Double]:
    """Real and imaginary part of Ā as pairs of floats.

    A recurrence multiplies by Ā once a token, so the rounding of a single float would grow with the number of tokens.
    """
    size = double_float.add(double_float.constant(1, pole.log_decay.dtype), jnp.expm1(pole.log_decay))
    cosine, sine = double_float.cosine_and_sine(Double(pole.turns, pole.turns_low))
    return double_float.multiply(size, cosine), double_float.multiply(size, sine)


def advance(one: tuple[Double, Double], state, entering):
    """Ā x + v for the Ā that `one_step` gives, a state x and what enters, v, each as a pair."""
    # The low part of Ā joins the input: what it adds is far below the rounding of the large product.
    high = multiply(*state, one[0].high, one[1].high)
    low = multiply(*state, one[0].low, one[1].low)
    return tuple(x + (y + v) for x, y, v in zip(high, low, entering, strict=True))


def repeated(pole: Pole, length: int, count: int):
    """Maps from a state (a pair [..., *pole's shape]) to Ā^T x, Ā^{2T} x, Ā^{4T} x, …: `count` of them, with T = length."""

    def over(steps):
        factor = power(pole, jnp.asarray(steps))
        return lambda state: multiply(*state, *factor)

    return [over(length << i) for i in range(count)]


def multiply(a_re, a_im, b_re, b_im):
    """The complex product of two pairs of real arrays, as a pair."""
    return a_re * b_re - a_im * b_im, a_re * b_im + a_im * b_re


def _tile_length(pole, length):
    """Steps in a tile: a table shared by all channels is cheap and long; one per channel is balanced against Q."""
    target = 512 if pole.log_decay.ndim == 1 else max(16, int(length**0.5))
    return min(length, 1 << (target - 1).bit_length())


def _matmul(equation, x, y):
    return jnp.einsum(equation, x, y, precision=lax.Precision.HIGHEST)


def modal_sum(weights_re, weights_im, pole: Pole, length: int):
    """Re Σ_n w[..., h, n] Ā_n^l for l = 0 … length-1: a kernel when w = C·B̄, a ringing state when w = C·Ā·x.

    With l = qT + r this is (w Ā^{qT}) (Ā^r), a real product of depth 2N per tile of T steps. Tiles are made a group at
    a time and made again in the backward pass, so memory beyond the result does not depend on the length.

    Args:
      weights_re, weights_im: [..., H, N].
      pole: fields [N] or [H, N].
      length: number of steps L, at least 1.

    Returns:
      [..., H, L].
    """
    tile = _tile_length(pole, length)
    tiles = -(-length // tile)
    table_re, table_im = power(pole, jnp.arange(tile))  # [(H), N, T]
    table = jnp.concatenate([table_re, -table_im], axis=-2)  # [(H), M, T]
    equation = "...hqm,mt->...hqt" if table.ndim == 2 else "...hqm,hmt->...hqt"

    def group_of_tiles(first, count):
        factor_re, factor_im = power(pole, tile * (first + jnp.arange(count)))  # [(H), N, G]
        factor_re, factor_im = jnp.swapaxes(factor_re, -1, -2), jnp.swapaxes(factor_im, -1, -2)
        moved = multiply(weights_re[..., None, :], weights_im[..., None, :], factor_re, factor_im)
        return _matmul(equation, jnp.concatenate(moved, axis=-1), table)  # [..., H, G, T]

    group = max(1, min(tiles, GROUP_ELEMENTS // (2 * weights_re.size)))
    if group >= tiles:
        out = group_of_tiles(0, tiles)
    else:
        groups = -(-tiles // group)
        body = jax.checkpoint(lambda first: group_of_tiles(first, group))
        out = jnp.moveaxis(lax.map(body, group * jnp.arange(groups)), 0, -3)  # [..., H, groups, G, T]
    return out.reshape(*weights_re.shape[:-1], -1)[..., :length]


def moments(u, pole: Pole):
    """Σ_l Ā_n^l u[..., h, l], the transpose of `modal_sum`: a final state when u runs backwards in time.

    Args:
      u: [..., H, L].
      pole: fields [N] or [H, N].

    Returns:
      Real and imaginary parts, each [..., H, N].
    """
    length = u.shape[-1]
    tile = _tile_length(pole, length)
    tiles = -(-length // tile)
    table = jnp.concatenate(power(pole, jnp.arange(tile)), axis=-2)  # [(H), M, T]
    equation = "...hqt,mt->...hqm" if table.ndim == 2 else "...hqt,hmt->...hqm"

    def group_of_tiles(u_QT, first):
        count = u_QT.shape[-2]
        factor_re, factor_im = power(pole, tile * (first + jnp.arange(count)))
        factor_re, factor_im = jnp.swapaxes(factor_re, -1, -2), jnp.swapaxes(factor_im, -1, -2)
        parts = jnp.split(_matmul(equation, u_QT, table), 2, axis=-1)  # each [..., H, G, N]
        return jnp.stack([x.sum(-2) for x in multiply(*parts, factor_re, factor_im)])

    modes = pole.log_decay.shape[-1]
    group = max(1, min(tiles, GROUP_ELEMENTS * length // (2 * modes * u.size)))
    groups = -(-tiles // group)
    u = jnp.pad(u, [(0, 0)] * (u.ndim - 1) + [(0, groups * group * tile - length)])
    if groups == 1:
        return tuple(group_of_tiles(u.reshape(*u.shape[:-1], tiles, tile), 0))
    u = jnp.moveaxis(u.reshape(*u.shape[:-1], groups, group, tile), -3, 0)

    @jax.checkpoint
    def accumulate(total, group_input):
        return total + group_of_tiles(*group_input), None

    zero = jnp.zeros((2, *u.shape[1:-2], modes), u.dtype)
    return tuple(lax.scan(accumulate, zero, (u, group * jnp.arange(groups)))[0])
