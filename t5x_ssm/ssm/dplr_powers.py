"""Powers of the dense matrix of a diagonal-plus-low-rank system, and the matrix products that long computations reduce to.

Ā cannot be diagonalised in practice: the eigenvectors of HiPPO-LegS have a condition near 10¹⁵ at M = 64. But where Re w < 0
it is a contraction, and a power of two of it is well conditioned as a dense real matrix on [re; im],

    Ā^{2^k} = diag(ā^{2^k}) + S_k,   S_{k+1} = ā^{2^k} S_k + S_k ā^{2^k} + S_k²

where the diagonal is exact at any length and only what the low rank adds is squared. From these come short tables of Ā^r B̄
and C Ā^{qT}, and a kernel, a final state or the ringing of an initial one is a real matrix product of tables.

Shape suffixes: B batch, H channels, N kept modes, M = 2N real components, L length, T steps in a tile, Q tiles.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from t5x_ssm.ssm.powers import Pole, multiply, power_minus_one


class DPLR(NamedTuple):
    """A discretised bank of H channels with N kept modes each.

    Attributes:
      pole: log ā, fields [H, N].
      beta_re, beta_im, gamma_re, gamma_im: the rank-one part of Ā, [H, N].
      b_re, b_im: B̄, [H, N].
      c_re, c_im: 2C, [H, N]: a mode stands for a conjugate pair.
      d: the skip D, [H].
    """

    pole: Pole
    beta_re: jax.Array
    beta_im: jax.Array
    gamma_re: jax.Array
    gamma_im: jax.Array
    b_re: jax.Array
    b_im: jax.Array
    c_re: jax.Array
    c_im: jax.Array
    d: jax.Array


def product(equation, x, y):
    """The einsum of two arrays, in the precision of their type on every device."""
    return jnp.einsum(equation, x, y, precision=lax.Precision.HIGHEST)


def _coupling(system: DPLR):
    """S_0 = Ā - diag(ā) on [re; im]: [H, M, M]."""
    column = jnp.concatenate([system.beta_re, system.beta_im], axis=-1)
    row = jnp.concatenate([system.gamma_re, -system.gamma_im], axis=-1)
    return -2 * column[:, :, None] * row[:, None, :]


def _from_left(alpha, s):
    """diag(α) S for complex α, a pair of [..., N], and a real matrix S on [re; im], [..., M, M]."""
    top, bottom = jnp.split(s, 2, axis=-2)
    return jnp.concatenate(multiply(*(x[..., :, None] for x in alpha), top, bottom), axis=-2)


def _from_right(alpha, s):
    """S diag(α); arguments as `_from_left`."""
    left, right = jnp.split(s, 2, axis=-1)
    re, im = (x[..., None, :] for x in alpha)
    return jnp.concatenate(multiply(re, -im, left, right), axis=-1)


def powers_minus_one(system: DPLR, count: int):
    """Ā^{2^k} - I for k = 0 … count-1, [count, H, M, M]: less the identity, which keeps the digits of slow systems."""
    exponents = jnp.asarray(1 << np.arange(count), jnp.int32)
    alpha = tuple(jnp.moveaxis(x, -1, 0) for x in power_minus_one(system.pole, exponents))  # ā^{2^k} - 1, [count, H, N]
    first = _coupling(system)

    def square(s, alpha):
        s = 2 * s + _from_left(alpha, s) + _from_right(alpha, s) + product("hij,hjk->hik", s, s)
        return s, s

    couplings = first[None]
    if count > 1:
        _, later = lax.scan(square, first, jax.tree.map(lambda x: x[:-1], alpha))
        couplings = jnp.concatenate([couplings, later])
    return couplings[:count] + _from_left(alpha, jnp.eye(first.shape[-1], dtype=first.dtype))


def tile_bits(length: int) -> int:
    """log₂ of the steps in a tile, about half of log₂ length."""
    return ((length - 1).bit_length() + 1) // 2


def columns(powers, first, count: int):
    """first [H, M, 1] and what Ā^r makes of it: [H, M, count] for r = 0 … count-1, count a power of two."""
    table = first
    for power in powers[: count.bit_length() - 1]:
        table = jnp.concatenate([table, table + product("hij,hjr->hir", power, table)], axis=-1)
    return table


def rows(powers, first, count: int):
    """first [H, 1, M] times powers of the matrix that powers[0] stands for: [H, count, M]."""
    table = first
    for power in powers[: (count - 1).bit_length()]:
        table = jnp.concatenate([table, table + product("hri,hij->hrj", table, power)], axis=1)
    return table[:, :count]


def output_row(system: DPLR):
    """C as a row on [re; im]: [H, 1, M]."""
    return jnp.concatenate([system.c_re, -system.c_im], axis=-1)[:, None]


def input_column(system: DPLR):
    """B̄ as a column on [re; im]: [H, M, 1]."""
    return jnp.concatenate([system.b_re, system.b_im], axis=-1)[..., None]


def gather(powers, inputs, backwards):
    """Σ_l Ā^l B̄ u[l] for u = backwards [B, L, H], from `powers_minus_one` and the `columns` Ā^r B̄ of a tile: [B, H, M]."""
    batch, length, channels = backwards.shape
    tile = inputs.shape[-1]
    tiles = -(-length // tile)
    u = jnp.pad(backwards, [(0, 0), (0, tiles * tile - length), (0, 0)]).reshape(batch, tiles, tile, channels)
    states = product("hmt,bqth->bhqm", inputs, u)
    # Σ_q Ā^{qT} states[q], pairs at a time.
    for power in powers[tile.bit_length() - 1 :][: (tiles - 1).bit_length()]:
        states = jnp.pad(states, [(0, 0), (0, 0), (0, states.shape[2] % 2), (0, 0)])
        later = states[:, :, 1::2]
        states = states[:, :, ::2] + later + product("hij,bhqj->bhqi", power, later)
    return states[:, :, 0]
