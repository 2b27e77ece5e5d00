"""From continuous to discrete time: dx/dt = Λx + Bu becomes x[l] = Ā x[l-1] + B̄ u[l].

Each rule returns log Ā as a `Pole`, whose powers are exact at any length, and the gain B̄/B. The products Δ·Im Λ are
taken in pairs of floats (`double_float`); everything else is well conditioned in one float.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np

from t5x_ssm.ssm import double_float
from t5x_ssm.ssm.double_float import Double, computed_once, double, planes_of
from t5x_ssm.ssm.powers import Pole, multiply, power_minus_one

# |Ā|² where the bilinear rule maps a pole to zero itself, so that its logarithm exists.
_SMALLEST_SQUARE = 1e-30

# Of ((e^z - 1)/z)' = Σ z^k / (k! (k + 2)). Where |z| < 0.1 the first five terms do for float32, off by 2·10⁻⁸ of the whole, and
# these eight for float64, off by 10⁻¹³.
_DERIVATIVE = tuple(1 / (math.factorial(k) * (k + 2)) for k in range(8))

# Of |z|². Where |z| is less than 10⁻¹⁶, (e^z - 1)/z is 1 to all digits; and the square of that does not underflow.
_AT_REST = 1e-32


def divide(a_re, a_im, b_re, b_im):
    """The complex quotient of two pairs of real arrays, as a pair."""
    norm = b_re * b_re + b_im * b_im
    return multiply(a_re / norm, a_im / norm, b_re, -b_im)


def _pole(log_decay, radians: Double) -> Pole:
    cycles = double_float.multiply(radians, double_float.constant(1 / (2 * np.pi), log_decay.dtype))
    turns = double_float.reduce_turns(cycles)
    log_decay, high, low = jnp.broadcast_arrays(log_decay, *turns)
    return Pole(log_decay, high, low)


def zoh(lambda_re, lambda_im, step, step_im=None) -> tuple[Pole, tuple]:
    """Zero-order hold: Ā = e^{ΔΛ}, B̄ = (Ā - 1)/Λ · B.

    Args:
      lambda_re: Re Λ, any sign.
      lambda_im: Im Λ, radians per unit of time; an array or a `Double`.
      step: Δ, an array or a `Double` (of `double_float.exp(log_step)`); shapes broadcast.
      step_im: another Δ for the imaginary part, as DSS may have; None for the same one.

    Returns:
      log Ā and the real and imaginary part of B̄/B, all in the broadcast shape.
    """
    step, lambda_im = double(step), double(lambda_im)
    step_im = step if step_im is None else double(step_im)
    angle = double_float.multiply(step_im, lambda_im)
    pole = _pole(step.high * lambda_re, angle)
    z = step.high * lambda_re, step_im.high * lambda_im.high
    # As a split, whose transpose is a concatenation, which the compiler takes apart again.
    gain = [x[0] for x in jnp.split(_exponential_quotient(pole, *z), 2)]
    if step_im is step:
        return pole, (step.high * gain[0], step.high * gain[1])
    return pole, multiply(*gain, *divide(*z, lambda_re, lambda_im.high))


@jax.custom_jvp
def _exponential_quotient(pole: Pole, z_re, z_im):
    """(e^z - 1)/z for z = log Ā, which `pole` holds to all digits, as planes [2, ...]; its derivative is with respect to z."""
    at_rest = jnp.square(z_re) + jnp.square(z_im) < _AT_REST
    quotient = _divide_planes(computed_once(power_minus_one(pole, 1)), z_re, z_im)
    return computed_once(jnp.where(at_rest, planes_of(1, 0, z_re.ndim), quotient))


@_exponential_quotient.defjvp
def _(primals, tangents):
    # With q the quotient the derivative is (e^z - q)/z = q + (1 - q)/z, which cancels where z is small.
    pole, z_re, z_im = primals
    quotient = _exponential_quotient(pole, z_re, z_im)
    small = jnp.square(z_re) + jnp.square(z_im) < 0.01
    # There a series. Its remainder by (x - z)(x - z̄) = x² - 2 Re(z) x + |z|² is real, constant + factor · x, and equal at x = z.
    near_re, near_im = jnp.where(small, z_re, 0), jnp.where(small, z_im, 0)
    square = jnp.square(near_re) + jnp.square(near_im)
    terms = _DERIVATIVE[:5] if z_re.dtype == jnp.float32 else _DERIVATIVE
    factor, constant = 0.0, terms[-1]
    for coefficient in terms[-2::-1]:
        factor, constant = constant + 2 * near_re * factor, coefficient - square * factor
    one, i = planes_of(1, 0, z_re.ndim), planes_of(0, 1, z_re.ndim)
    near = one * (constant + factor * near_re) + i * (factor * near_im)
    far = quotient + _divide_planes(one - quotient, z_re, z_im)
    slope = computed_once(jnp.where(small, near, far))
    return quotient, jnp.stack(multiply(*slope, *tangents[1:]))


def _divide_planes(planes, z_re, z_im):
    """A complex array in planes [2, ...] over another that is not at rest, as planes."""
    turned = planes_of(1, -1, z_re.ndim) * z_im * planes[::-1]
    square = jnp.square(z_re) + jnp.square(z_im)
    return (z_re * planes + turned) * (1 / jnp.where(square < _AT_REST, 1, square))


def bilinear(lambda_re, lambda_im, step) -> tuple[Pole, tuple]:
    """Tustin's rule: Ā = (1 + ΔΛ/2)/(1 - ΔΛ/2), B̄ = Δ/(1 - ΔΛ/2) · B. Arguments and results as `zoh`."""
    step, lambda_im = double(step), double(lambda_im)
    half = double_float.constant(0.5, lambda_re.dtype)
    x = double_float.multiply(double_float.multiply(step, lambda_re), half)
    y = double_float.multiply(double_float.multiply(step, lambda_im), half)
    # With w = ΔΛ/2 = x + iy, (1 + w) / (1 - w) has the angle of (1 + w)(1 - w̄) = 1 - |w|² + 2iy …
    square = double_float.add(double_float.multiply(x, x), double_float.multiply(y, y))
    across = double_float.add(y, y)
    along = double_float.add(double_float.constant(1, lambda_re.dtype), double_float.negate(square))
    turns = double_float.turns_of(along, across)
    # … and |Ā|² is 1 + 4x/|1 - w|², which keeps the digits of slow modes; fast ones are better off with the quotient.
    denominator = jnp.square(1 - x.high) + jnp.square(y.high)
    change = 4 * x.high / denominator
    quotient = (jnp.square(1 + x.high) + jnp.square(y.high)) / denominator
    slow = jnp.log1p(jnp.maximum(change, -0.5))
    log_decay = 0.5 * jnp.where(change > -0.5, slow, jnp.log(jnp.clip(quotient, _SMALLEST_SQUARE, 0.5)))
    pole = Pole(*jnp.broadcast_arrays(log_decay, *turns))
    return pole, (step.high * (1 - x.high) / denominator, step.high * y.high / denominator)
