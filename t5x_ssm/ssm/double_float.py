"""Numbers as the unevaluated sum of two floats, for the few scalars whose rounding a long sequence would magnify.

A phase of 30 radians a step is 2 million radians after 65,536 steps: to know that angle to 10⁻⁴ the phase must have 11
correct digits, and a float32 has 7. Accelerators have no float64, so phases and time steps are kept as pairs with about
45 correct bits. Only the parameters of a system go through here, and the sizes of irregular steps, never the sequence itself: what
counts is how long the compiler takes over them.

Every function takes and gives derivatives as its first-order expression on the high parts does: a low part is a constant.
In float64 (under x64) the low parts are harmless and tiny.

The error-free transformations are Knuth's sum, Dekker's sum of ordered terms, and products of halves split off by a mask.
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


def computed_once(x):
    """x as a remainder of the largest number: a finite x; infinities become NaN.

    XLA on CPU fuses chains of small operations into each of the operations that need them, and so compiles and computes
    them several times. A remainder it does not repeat.
    """
    return lax.rem(x, jnp.full_like(x, jnp.finfo(x.dtype).max))


def planes_of(first, second, dimensions: int) -> np.ndarray:
    """Two constants as planes [2, 1, ...] that broadcast against arrays of so many dimensions.

    Two arrays that share a long chain are one program as planes of one array, and two as a pair.
    """
    return np.reshape([first, second], (2,) + (1,) * dimensions)


def constant(value, dtype) -> Double:
    """A float64 number or numpy array rounded to a pair of `dtype`, which the compiler does not see through.

    Compilers turn (x + 1) - 1 into x; every number that meets an error-free sum comes from here (tables that are indexed need
    not: their entries are not known).
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


def _sum_of_ordered(a, b) -> Double:
    """The sum where |a| >= |b|."""
    total = a + b
    return Double(total, b - (total - a))


def _leading(a, bits: int):
    """The first bits of a float32's or float64's significand, by a mask, where no compiler reorders anything."""
    integer, width = (jnp.uint32, 24) if a.dtype == jnp.float32 else (jnp.uint64, 53)
    mask = ~integer((1 << (width - bits)) - 1)
    return lax.bitcast_convert_type(lax.bitcast_convert_type(a, integer) & mask, a.dtype)


def add(a, b) -> Double:
    """a + b, where each is a float array or a pair."""
    a, b = double(a), double(b)
    total = _sum_of_floats(a.high, b.high)
    exact = _sum_of_ordered(total.high, total.low + (a.low + b.low))
    return _with_derivative_of(a.high + b.high, exact)


def multiply(a, b) -> Double:
    """a · b, where each is a float array or a pair."""
    pairs = [(x, y.high) for x, y in ((a, double(b)), (b, double(a))) if isinstance(x, Double)]
    a, b = double(a).high, double(b).high
    # The four partial products of half-length factors are exact. A compiler that contracts them into fused
    # multiply-adds, here and there as it likes, therefore changes nothing; Dekker's form with a rounded a·b would break.
    half = 12 if a.dtype == jnp.float32 else 26
    a_upper, b_upper = _leading(a, half), _leading(b, half)
    a_rest, b_rest = a - a_upper, b - b_upper
    first = _sum_of_ordered(a_upper * b_upper, a_upper * b_rest)
    second = _sum_of_ordered(first.high, a_rest * b_upper)
    low = first.low + second.low + a_rest * b_rest
    for pair, other in pairs:
        low = low + pair.low * other
    return _with_derivative_of(a * b, _sum_of_ordered(second.high, low))


def negate(a: Double) -> Double:
    """-a."""
    return Double(-a.high, -a.low)


_SLICES_OF_OCTAVE = 128
_LARGEST_EXPONENT = 44

# The logarithm of a slice: two parts of 11 bits, whose products with a count of slices (13 bits) are exact, and the rest.
_SLICE = np.log(2) / _SLICES_OF_OCTAVE
_SLICE_UPPER = np.floor(_SLICE * 2.0**18) / 2.0**18
_SLICE_MIDDLE = np.round((_SLICE - _SLICE_UPPER) * 2.0**29) / 2.0**29


def _roots():
    """The powers of slices, [_SLICES_OF_OCTAVE, 3]: 14 bits, the next 24, and the rest."""
    exact = 2 ** (np.arange(_SLICES_OF_OCTAVE) / _SLICES_OF_OCTAVE)
    upper = np.round(exact * 2.0**13) / 2.0**13
    middle = (exact - upper).astype(np.float32)
    return np.stack([upper, middle, exact - upper - middle], axis=1).astype(np.float32)


def exp(x) -> Double:
    """e^x of a float array; in float32 its relative error is below 2·10⁻¹² for |x| < 44, and that of a float elsewhere."""
    simple = jnp.exp(x)
    if x.dtype == jnp.float64:
        return double(simple)
    x, value = lax.stop_gradient(x), lax.stop_gradient(simple)
    # e^x = 2^octave · 2^(slice/128) · e^r with |r| < 0.0028. What is taken from x is exact, and so are the differences.
    slices = jnp.round(x * np.float32(1 / _SLICE))
    r = (x - slices * np.float32(_SLICE_UPPER)) - slices * np.float32(_SLICE_MIDDLE)
    drift = slices * np.float32(_SLICE_UPPER + _SLICE_MIDDLE - _SLICE)
    # e^(r + drift) - 1 - r; the float square is off by 3·10⁻¹³ at most.
    growth = r * r * (1 / 2 + r * (1 / 6 + r * (1 / 24))) + drift * (1 + r)
    slices = slices.astype(jnp.int32)
    octave = slices >> (_SLICES_OF_OCTAVE.bit_length() - 1)
    parts = jnp.asarray(_roots()).at[slices & (_SLICES_OF_OCTAVE - 1)].get(mode="promise_in_bounds")
    root, middle, rest = parts[..., 0], parts[..., 1], parts[..., 2]
    # The high part is the plain exponential, so that only what needs the low part pays for it once compiled. What the two
    # differ by comes after all that cancels: the leading bits of r make an exact product.
    leading = _leading(r, 10)
    difference = _sum_of_floats(root - value * _power_of_two(-octave), root * leading)
    small = rest + (root * (r - leading) + (middle * (r + growth) + root * growth))
    low = (difference.high + middle) + (difference.low + small)
    return Double(simple, computed_once(jnp.where(jnp.abs(x) < _LARGEST_EXPONENT, low * _power_of_two(octave), 0)))


def _power_of_two(exponents):
    """2^n in float32 for integers of less than 127 in size."""
    return lax.bitcast_convert_type((exponents + 127) << 23, jnp.float32)


def reduce_turns(turns: Double) -> Double:
    """An angle in turns less its nearest whole number of turns."""
    # Remainders are exact; and a compiler keeps them rather than repeat them with all that leads to them.
    both = jnp.where(planes_of(True, False, turns.high.ndim), turns.high, turns.low)
    rest, low = lax.rem(both, jnp.ones_like(both))
    # The whole turns are those of the sum: more than half a turn would be too much for `fraction_of_turns`.
    return _with_derivative_of(turns.high, _sum_of_floats(rest - jnp.round(rest + low), low))


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
