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

# Gauss and Legendre's quadrature on [0, 1], exact to 10⁻¹⁶ for e^{sz} with |z| < 0.1.
_NODES, _WEIGHTS = (a / 2 for a in np.polynomial.legendre.leggauss(4))
_NODES = _NODES + 0.5


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
    gain = _exponential_quotient(pole, *z)
    if step_im is step:
        return pole, (step.high * gain[0], step.high * gain[1])
    return pole, multiply(*gain, *divide(*z, lambda_re, lambda_im.high))


def _exponential_quotient(pole: Pole, z_re, z_im):
    """(e^z - 1)/z for z = log Ā. Where z is small the derivative of the quotient would cancel: there it is ∫₀¹ e^{sz} ds."""
    small = jnp.square(z_re) + jnp.square(z_im) < 0.01
    near_re, near_im = (jnp.where(small, z, 0)[..., None] * _NODES.astype(z.dtype) for z in (z_re, z_im))
    size = jnp.exp(near_re) * _WEIGHTS.astype(z_re.dtype)
    near = jnp.sum(size * jnp.cos(near_im), axis=-1), jnp.sum(size * jnp.sin(near_im), axis=-1)
    far = divide(*power_minus_one(pole, jnp.ones((), jnp.int32)), jnp.where(small, 1, z_re), jnp.where(small, 0, z_im))
    return jnp.where(small, near[0], far[0]), jnp.where(small, near[1], far[1])


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
