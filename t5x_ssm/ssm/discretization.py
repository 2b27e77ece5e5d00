"""From continuous to discrete time: dx/dt = Λx + Bu becomes x[l] = Ā x[l-1] + B̄ u[l].

Each rule returns log Ā as a `Pole`, whose powers are exact at any length, and the gain B̄/B. The products Δ·Im Λ are
taken in pairs of floats (`double_float`); everything else is well conditioned in one float.
"""

import jax.numpy as jnp
import numpy as np

from t5x_ssm.ssm import double_float
from t5x_ssm.ssm.double_float import Double, double
from t5x_ssm.ssm.powers import Pole, multiply, power_minus_one

# |Ā|² where the bilinear rule maps a pole to zero itself, so that its logarithm exists.
_SMALLEST_SQUARE = 1e-30


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
    minus_one = power_minus_one(pole, jnp.ones((), jnp.int32))
    # (Ā - 1)/Λ tends to Δ with Λ: two terms of its series stand in where Λ² would underflow.
    slow = jnp.square(lambda_re) + jnp.square(lambda_im.high) < 1e-24
    gain_re, gain_im = divide(*minus_one, jnp.where(slow, 1.0, lambda_re), lambda_im.high)
    return pole, (
        jnp.where(slow, step.high * (1 + pole.log_decay / 2), gain_re),
        jnp.where(slow, step.high * angle.high / 2, gain_im),
    )


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
