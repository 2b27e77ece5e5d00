"""Where systems start: the HiPPO-LegS matrix and its eigenvalues, their approximations, and random draws.

The structured starts are computed once in float64 numpy, because the eigenvalues of a skew matrix of size 256 span five
decades; the caller casts them to its parameters' type. Poles are complex numpy arrays here and nowhere else.
Sources: HiPPO (2008.07669), S4 (2111.00396), DSS (2203.14343), S4D (2206.11893), S5 (2208.04933), GSS (2206.13947).
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np


class NormalPlusLowRank(NamedTuple):
    """A = V diag(poles) V^H - p p^T and its input vector, in the eigenbasis of the normal part.

    Attributes:
      poles: [N] complex128, ascending imaginary part: the first half is the negative one.
      p: V^H p, [N] complex128.
      b: V^H B, [N] complex128.
      vectors: V, [N, N] complex128, unitary; column n belongs to poles[n].
    """

    poles: np.ndarray
    p: np.ndarray
    b: np.ndarray
    vectors: np.ndarray


def hippo_legs(size: int) -> tuple[np.ndarray, np.ndarray]:
    """The HiPPO-LegS matrix A [N, N] and input B [N], float64: memory by Legendre polynomials, scaled to the past's length."""
    n = np.arange(size)
    b = np.sqrt(2 * n + 1.0)
    return -np.tril(np.outer(b, b), -1) - np.diag(n + 1.0), b


@functools.lru_cache(maxsize=16)
def legs_normal_plus_low_rank(size: int) -> NormalPlusLowRank:
    """HiPPO-LegS as a normal matrix less a rank-one term (S4, theorem 1).

    With p_n = √(n + 1/2), A + p p^T is -1/2 I plus a skew matrix, so its eigenvalues are -1/2 ± iω.

    Args:
      size: N, even.
    """
    if size < 2 or size % 2:
        raise ValueError(
            f"HiPPO-LegS eigenvalues come in conjugate pairs: state size must be even and positive, got {size}."
        )
    a, b = hippo_legs(size)
    p = np.sqrt(np.arange(size) + 0.5)
    skew = a + np.outer(p, p) + 0.5 * np.eye(size)
    frequencies, vectors = np.linalg.eigh(-1j * skew)
    adjoint = vectors.conj().T
    result = NormalPlusLowRank(-0.5 + 1j * frequencies, adjoint @ p, adjoint @ b, vectors)
    for array in result:
        array.setflags(write=False)  # it is shared by every caller
    return result


def legs_poles(modes: int) -> np.ndarray:
    """The eigenvalues of LegS of size 2·modes with positive imaginary part, ascending: S4D-LegS, and DSS's start. [modes]."""
    return legs_normal_plus_low_rank(2 * modes).poles[modes:]


def lin_poles(modes: int) -> np.ndarray:
    """S4D-Lin and H3's diagonal: -1/2 + iπn for n = 0 … modes-1."""
    return -0.5 + 1j * np.pi * np.arange(modes)


def inv_poles(modes: int) -> np.ndarray:
    """S4D-Inv: -1/2 + i (N/π)(N/(2n+1) - 1) for n = 0 … modes-1, with the real state size N = 2·modes."""
    size = 2 * modes
    return -0.5 + 1j * size / np.pi * (size / (2 * np.arange(modes) + 1) - 1)


def log_uniform(key, shape, low: float = 1e-3, high: float = 1e-1, dtype=jnp.float32):
    """log Δ with Δ log-uniform in [low, high]: the start of every learnt time step.

    Raises:
      ValueError: unless 0 < low ≤ high.
    """
    if not 0 < low <= high:
        raise ValueError(f"time steps need 0 < low <= high, got low={low} and high={high}")
    return jax.random.uniform(key, shape, dtype, np.log(low), np.log(high))


def complex_normal(key, shape, variance: float = 1.0, dtype=jnp.float32):
    """Real and imaginary parts of circular complex normal numbers with E|z|² = variance, as a pair of arrays."""
    parts = jax.random.normal(key, (2, *shape), dtype) * np.sqrt(variance / 2).astype(dtype)
    return parts[0], parts[1]


def gss_poles(key, modes: int, dtype=jnp.float32):
    """GSS: log(-Re Λ) and log Im Λ, independent standard normal, each [modes]."""
    parts = jax.random.normal(key, (2, modes), dtype)
    return parts[0], parts[1]


S5_OUTPUTS = ("lecun_normal", "trunc_standard_normal", "complex_normal")


class S5Start(NamedTuple):
    """Where an S5 system with K modes and H channels starts, real arrays (2208.04933, section 3.3 and appendix B.1).

    Attributes:
      lambda_re, lambda_im: [K].
      b_re, b_im: [K, H].
      c_re, c_im: [H, K].
    """

    lambda_re: jax.Array
    lambda_im: jax.Array
    b_re: jax.Array
    b_im: jax.Array
    c_re: jax.Array
    c_im: jax.Array


def s5_start(
    key,
    state_size: int,
    channels: int,
    blocks: int = 1,
    *,
    conj_sym: bool = True,
    c_init: str = "lecun_normal",
    dtype=jnp.float32,
) -> S5Start:
    """S5's block-diagonal HiPPO-LegS start: J copies of LegS's normal part of size P/J, in its eigenbasis V.

    B = V^H B0 for a real B0 and C = C0 V for a complex C0, both truncated normal, or C as it is. Variances over complex
    entries: E|B|² = 1/P; E|C|² = 2/(P H), 2/P and 1 for the three `c_init`s (the first as the public code draws it).

    Args:
      key: of random numbers.
      state_size: P, the number of real states.
      channels: H.
      blocks: J.
      conj_sym: keep one mode of each conjugate pair, the one with the negative frequency: K = P/2. Otherwise K = P.
      c_init: one of S5_OUTPUTS.

    Raises:
      ValueError: unless P is a multiple of 2 J; for an unknown c_init.
    """
    if blocks < 1 or state_size < 1 or state_size % (2 * blocks):
        raise ValueError(
            f"S5's state_size must be a positive multiple of 2·blocks (blocks of conjugate pairs), got state_size="
            f"{state_size} and blocks={blocks}"
        )
    size = state_size // blocks
    poles, _, _, vectors = legs_normal_plus_low_rank(size)
    kept = size // 2 if conj_sym else size
    poles, vectors = np.tile(poles[:kept], blocks), vectors[:, :kept]
    b_key, c_key = jax.random.split(key)

    b0 = jax.nn.initializers.lecun_normal()(b_key, (state_size, channels), dtype).reshape(blocks, size, channels)
    b = [
        jnp.einsum("sk,jsh->jkh", part.astype(dtype), b0, precision="highest").reshape(-1, channels)
        for part in (vectors.real, -vectors.imag)
    ]
    c = s5_output(c_key, state_size, channels, blocks, conj_sym=conj_sym, c_init=c_init, dtype=dtype)
    return S5Start(jnp.asarray(poles.real, dtype), jnp.asarray(poles.imag, dtype), *b, *c)


def s5_output(
    key,
    state_size: int,
    channels: int,
    blocks: int = 1,
    *,
    conj_sym: bool = True,
    c_init: str = "lecun_normal",
    dtype=jnp.float32,
):
    """The real and imaginary part of C, each [H, K]; see `s5_start`. A bidirectional layer draws a second one."""
    if c_init not in S5_OUTPUTS:
        raise ValueError(f"unknown c_init {c_init!r}; choose from {', '.join(S5_OUTPUTS)}")
    size = state_size // blocks
    kept = size // 2 if conj_sym else size
    if c_init == "complex_normal":
        return complex_normal(key, (channels, blocks * kept), dtype=dtype)
    # Of each component the variance 1/P, or 1/(P H) where the channels count as inputs too.
    draw = jax.nn.initializers.variance_scaling(
        1.0 if c_init == "trunc_standard_normal" else 1 / channels, "fan_in", "truncated_normal"
    )
    parts = (draw(k, (state_size, channels), dtype) for k in jax.random.split(key))
    c0_re, c0_im = (part.reshape(blocks, size, channels) for part in parts)
    vectors = legs_normal_plus_low_rank(size).vectors[:, :kept]
    v_re, v_im = vectors.real.astype(dtype), vectors.imag.astype(dtype)

    def into_eigenbasis(c0, v):
        return jnp.einsum("jsh,sk->hjk", c0, v, precision="highest").reshape(channels, -1)

    return (
        into_eigenbasis(c0_re, v_re) - into_eigenbasis(c0_im, v_im),
        into_eigenbasis(c0_re, v_im) + into_eigenbasis(c0_im, v_re),
    )
