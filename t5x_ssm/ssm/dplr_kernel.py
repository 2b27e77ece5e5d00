"""The impulse response of diagonal-plus-low-rank systems, by tables of powers or by S4's Cauchy sums.

Shape suffixes as in `dplr_powers`.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from t5x_ssm.ssm.double_float import value_with_derivative_of
from t5x_ssm.ssm.dplr_powers import DPLR, columns, input_column, output_row, powers_minus_one, product, rows, tile_bits
from t5x_ssm.ssm.powers import Pole, multiply

KERNEL_METHODS = ("krylov", "cauchy")

# Elements of one power of the channels whose kernels are made at once, and made again in the backward pass: 2^20 float32
# are 4 MiB, and there are log₂ L powers.
GROUP_ELEMENTS = 1 << 20

# Complex elements of the largest array of a group of frequencies of the Cauchy kernel: 2^20 complex64 are 8 MiB.
CAUCHY_GROUP_ELEMENTS = 1 << 20


def kernel(system: DPLR, length: int, *, method: str = "krylov"):
    """The impulse response without the skip, Re(C Ā^l B̄) for l = 0 … length-1.

    Args:
      system: the bank.
      length: L, at least 1.
      method: "krylov", products of tables of Ā^r B̄ and C Ā^{qT}; or "cauchy", S4's: the response at the L-th roots of
        unity by Cauchy sums and Woodbury's identity, and an inverse FFT.

    Returns:
      [H, length].

    Raises:
      ValueError: for an unknown method.
    """
    if method not in KERNEL_METHODS:
        raise ValueError(f"unknown kernel method {method!r}; choose method from {', '.join(KERNEL_METHODS)}")

    def run(system):
        if method == "krylov":
            return krylov(system, powers_minus_one(system, (length - 1).bit_length()), length)
        return _cauchy_kernel(system, powers_minus_one(system, length.bit_length()), length)

    channels, modes = system.c_re.shape
    wanted = max(1, GROUP_ELEMENTS // (2 * modes) ** 2)
    group = max(g for g in range(1, channels + 1) if channels % g == 0 and g <= wanted)
    if group == channels:
        return run(system)
    grouped = jax.tree.map(lambda x: x.reshape(channels // group, group, *x.shape[1:]), system)
    return lax.map(jax.checkpoint(run), grouped).reshape(channels, length)


def krylov(system: DPLR, powers, length: int):
    """`kernel` from tables of the `powers_minus_one` for all bits of length - 1."""
    bits = tile_bits(length)
    inputs = columns(powers, input_column(system), 1 << bits)
    outputs = rows(powers[bits:], output_row(system), -(-length >> bits))
    return product("hqm,hmt->hqt", outputs, inputs).reshape(-1, outputs.shape[1] << bits)[:, :length]


def _cauchy_kernel(system: DPLR, powers, length: int):
    """Σ_l C Ā^l B̄ z^l = C̃ (I - zĀ)^-1 B̄ with C̃ = C (I - Ā^L) wherever z^L = 1, and the inverse transform of that.

    With R = 1/(1 - zā) on the modes and on their conjugates, (I - zĀ)^-1 = R - zRβ γᵀR / (1 + z γᵀRβ). S4 writes the same
    numbers as 2/(1 + z) times a Cauchy matrix 1/(g(z) - w), which is singular at z = -1; this is not.
    """
    row = end = output_row(system)
    for k, power in enumerate(powers):
        if length >> k & 1:
            end = end + product("hri,hij->hrj", end, power)
    c_tilde_re, minus_c_tilde_im = jnp.split((row - end)[:, 0] / 2, 2, axis=-1)
    left = (c_tilde_re, -minus_c_tilde_im), (system.gamma_re, system.gamma_im)
    right = (system.b_re, system.b_im), (system.beta_re, system.beta_im)
    weights = jnp.stack([lax.complex(*multiply(*x, *y)) for x in left for y in right], axis=1)[
        ..., None
    ]  # [H, 4, N, 1]
    conjugate = Pole(system.pole.log_decay, -system.pole.turns, -system.pole.turns_low)

    @jax.checkpoint
    def response(points):
        resolvent, other = (1 / _one_minus(pole, points)[:, None] for pole in (system.pole, conjugate))
        sums = jnp.sum(weights * resolvent + weights.conj() * other, axis=2)
        c_b, c_beta, gamma_b, gamma_beta = (sums[:, i] for i in range(4))
        z = lax.complex(points.cosine, points.sine)
        return c_b - z * c_beta * gamma_b / (1 + z * gamma_beta)

    points = _points(length, system.c_re.dtype)
    count = length // 2 + 1
    group = max(1, min(count, CAUCHY_GROUP_ELEMENTS // weights.size))
    groups = -(-count // group)
    points = jax.tree.map(lambda x: np.pad(x, (0, groups * group - count)).reshape(groups, group), points)
    spectrum = jnp.moveaxis(lax.map(response, points), 0, 1).reshape(-1, groups * group)[:, :count]
    return jnp.fft.irfft(spectrum, length)


class _Points(NamedTuple):
    """Points z = e^{-2πi t} of the unit circle.

    Attributes:
      whole, rest: t·2³² rounded down, as a wrapping int32, and what that leaves over.
      turns: t.
      cosine, sine: z.
    """

    whole: jax.Array
    rest: jax.Array
    turns: jax.Array
    cosine: jax.Array
    sine: jax.Array


def _points(length: int, dtype) -> _Points:
    """The L-th roots of unity with t = 0 … 1/2, numpy fields [L // 2 + 1]."""
    k = np.arange(length // 2 + 1, dtype=np.int64)
    z = np.exp(-2j * np.pi * k / length)
    whole, rest = np.divmod(k << 32, length)
    floats = (x.astype(dtype) for x in (rest / length, k / length, z.real, z.imag))
    return _Points(whole.astype(np.uint32).view(np.int32), *floats)


def _one_minus(pole: Pole, points: _Points):
    """1 - āz, with all digits also where z is close to 1/ā: complex [H, N, points]."""
    # Both angles in integer fractions of a turn, so that their difference is exact.
    turns, low = lax.stop_gradient((pole.turns[..., None], pole.turns_low[..., None]))
    scaled = turns * 2.0**32
    whole = jnp.round(scaled)
    rest = (scaled - whole) + low * 2.0**32
    whole = jnp.where(whole >= 2.0**31, whole - 2.0**32, whole).astype(jnp.int32)
    fraction = ((whole - points.whole).astype(turns.dtype) + (rest - points.rest)) * 2.0**-32
    angle = 2 * jnp.pi * value_with_derivative_of(fraction, pole.turns[..., None] - points.turns)
    log_size = pole.log_decay[..., None]
    size = jnp.exp(log_size)
    return lax.complex(2 * size * jnp.square(jnp.sin(angle / 2)) - jnp.expm1(log_size), -size * jnp.sin(angle))
