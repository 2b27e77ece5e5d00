"""Numbers as the unevaluated sum of two floats, for the few scalars whose rounding a long sequence would magnify.

A phase of 30 radians a step is 2 million radians after 65,536 steps: to know that angle to 10⁻⁴ the phase must have 11
correct digits, and a float32 has 7. Accelerators have no float64, so phases and time steps are kept as pairs with about
45 correct bits. Only the parameters of a system go through here, never the sequence, so the cost does not matter.

Every function takes and gives derivatives as its first-order expression on the high parts does: a low part is a constant.
In float64 (under x64) the low parts are harmless and tiny.

The error-free transformations are Knuth's sum and Dekker's split.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax


class Double(NamedTuple):
    """high + low, with |low| at most about half a unit in the last place of high."""

    high: jax.Array
    low: jax.Array


def double(x) -> Double:
    """A float array as a pair; a pair as itself."""
    if isinstance(x, Double):
        return x
    x = jnp.asarray(x)
    return Double(x, jnp.zeros_like(x))


def constant(value, dtype) -> Double:
    """A float64 number or numpy array rounded to a pair of `dtype`, which the compiler does not see through.

    Compilers turn (x + 1) - 1 into x; every constant that meets an error-free sum comes from here.
    """
    value = np.asarray(value, np.float64)
    high = value.astype(dtype)
    return Double(*lax.optimization_barrier((jnp.asarray(high), jnp.asarray((value - high).astype(dtype)))))


@jax.custom_jvp
def value_with_derivative_of(value, simple):
    """`value`, differentiated as if it were `simple`, which it equals but for rounding."""
    del simple
    return value


@value_with_derivative_of.defjvp
def _(primals, tangents):
    return primals[0], tangents[1]


def _with_derivative_of(simple, pair: Double) -> Double:
    return Double(value_with_derivative_of(pair.high, simple), lax.stop_gradient(pair.low))


def _sum_of_floats(a, b) -> Double:
    total = a + b
    b_part = total - a
    return Double(total, (a - (total - b_part)) + (b - b_part))


def _split(a):
    """The upper half of the significand and the rest; exact, by masking bits where no compiler reorders anything."""
    if a.dtype == jnp.float32:
        bits, mask = jnp.uint32, 0xFFFFF000
    else:
        bits, mask = jnp.uint64, 0xFFFFFFFFF8000000
    high = lax.bitcast_convert_type(lax.bitcast_convert_type(a, bits) & bits(mask), a.dtype)
    return high, a - high


def _product_of_floats(a, b) -> Double:
    # The four partial products of half-length factors are exact. A compiler that contracts them into fused
    # multiply-adds, here and there as it likes, therefore changes nothing; Dekker's form with a rounded a·b would break.
    a_high, a_low = _split(a)
    b_high, b_low = _split(b)
    middle = _sum_of_floats(a_high * b_low, a_low * b_high)
    total = _sum_of_floats(a_high * b_high, middle.high)
    return _sum_of_floats(total.high, total.low + (middle.low + a_low * b_low))


def add(a, b) -> Double:
    """a + b, where each is a float array or a pair."""
    a, b = double(a), double(b)
    total = _sum_of_floats(a.high, b.high)
    exact = _sum_of_floats(total.high, total.low + (a.low + b.low))
    return _with_derivative_of(a.high + b.high, exact)


def multiply(a, b) -> Double:
    """a · b, where each is a float array or a pair."""
    a, b = double(a), double(b)
    product = _product_of_floats(a.high, b.high)
    exact = _sum_of_floats(product.high, product.low + (a.high * b.low + a.low * b.high))
    return _with_derivative_of(a.high * b.high, exact)


def negate(a: Double) -> Double:
    """-a."""
    return Double(-a.high, -a.low)


_SLICES_OF_OCTAVE = 64


def exp(x) -> Double:
    """e^x of a float array in [-60, 80], relative error below 10⁻¹¹ in float32 (the low part is lost below that range)."""
    simple = jnp.exp(x)
    if x.dtype == jnp.float64:
        return double(simple)
    x = lax.stop_gradient(x)
    # e^x = 2^octave · 2^(slice/64) · e^r. With |r| < 0.006 the float square in e^r - 1 is off by 10⁻¹² at most.
    slices = jnp.round(x * np.float32(_SLICES_OF_OCTAVE / np.log(2)))
    rest = add(x, multiply(-slices, constant(np.log(2) / _SLICES_OF_OCTAVE, x.dtype)))
    r = rest.high
    growth = _sum_of_floats(r, rest.low + r * r * (1 / 2 + r * (1 / 6 + r * (1 / 24))))
    slices = slices.astype(jnp.int32)
    index, octave = jnp.mod(slices, _SLICES_OF_OCTAVE), jnp.floor_divide(slices, _SLICES_OF_OCTAVE)
    root = Double(*(part[index] for part in constant(2 ** (np.arange(_SLICES_OF_OCTAVE) / _SLICES_OF_OCTAVE), x.dtype)))
    value = add(root, multiply(root, growth))
    # The high part is the plain exponential, so that only what needs the low part pays for it once compiled.
    low = (jnp.ldexp(value.high, octave) - lax.stop_gradient(simple)) + jnp.ldexp(value.low, octave)
    return Double(simple, low)


def reduce_turns(turns: Double) -> Double:
    """An angle in turns less its nearest whole number of turns."""
    # Remainders are exact; and a compiler keeps them rather than repeat them with all that leads to them.
    one = jnp.ones_like(turns.high)
    rest = _sum_of_floats(lax.rem(turns.high, one), lax.rem(turns.low, one))
    exact = _sum_of_floats(rest.high - jnp.round(rest.high), rest.low)
    return _with_derivative_of(turns.high, exact)


_SECTORS = 256


def cosine_and_sine(turns: Double) -> tuple[Double, Double]:
    """cos 2πt and sin 2πt of an angle in [-1, 1] turns, absolute error below 2·10⁻¹¹ in float32."""
    dtype = turns.high.dtype
    simple = 2 * np.pi * turns.high
    if dtype == jnp.float64:
        return double(jnp.cos(simple)), double(jnp.sin(simple))
    # e^{ix} of the rest x < 0.013 turns a tabulated point by a little: all but one product is small enough for floats.
    sector = jnp.round(turns.high * _SECTORS)
    x = multiply(add(turns, -sector / _SECTORS), constant(2 * np.pi, dtype))
    square = x.high * x.high
    sine = Double(x.high, x.low + x.high * square * (-1 / 6 + square * (1 / 120)))
    cosine_less_one = square * (-1 / 2 + square * (1 / 24))
    angles = 2 * np.pi * np.arange(_SECTORS) / _SECTORS
    index = jnp.mod(sector, _SECTORS).astype(jnp.int32)
    c, s = (Double(*(part[index] for part in constant(f(angles), dtype))) for f in (np.cos, np.sin))
    cosine = add(c, add(negate(multiply(s, sine)), c.high * cosine_less_one))
    total_sine = add(s, add(multiply(c, sine), s.high * cosine_less_one))
    return _with_derivative_of(jnp.cos(simple), cosine), _with_derivative_of(jnp.sin(simple), total_sine)


def turns_of(x: Double, y: Double) -> Double:
    """The angle of the vector (x, y) in turns, in [-1/2, 1/2], zero for the zero vector.

    A float arctangent and one Newton correction.
    """
    x = Double(jnp.where((x.high == 0) & (y.high == 0), 1, x.high), x.low)
    simple = jnp.arctan2(y.high, x.high) / (2 * np.pi)
    start = lax.stop_gradient(simple)
    c, s = cosine_and_sine(double(start))
    across = add(multiply(y, c), negate(multiply(x, s)))
    along = x.high * c.high + y.high * s.high
    return _with_derivative_of(simple, _sum_of_floats(start, across.high / along / (2 * np.pi)))
