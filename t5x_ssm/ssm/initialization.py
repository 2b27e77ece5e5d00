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
