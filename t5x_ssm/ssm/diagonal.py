"""Banks of diagonal single-input systems: GSS.

Channel h filters its own input u_h through N complex modes:
  x_h[l] = Ā x_h[l-1] + B̄ u_h[l]        y_h[l] = Re(C_h · x_h[l]) + D_h u_h[l]
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from t5x_ssm.ssm.convolution import causal_convolution
from t5x_ssm.ssm.powers import Pole, modal_sum, moments, multiply, power

CHUNK_SIZE = 128


class Diagonal(NamedTuple):
    """A discretised bank of H channels with N modes each.

    Attributes:
      pole: the logarithm of Ā, fields [N] (shared by the channels) or [H, N].
      b_re, b_im: B̄, [N] or [H, N].
      c_re, c_im: C, [H, N]; it includes the factor 2 where a mode stands for a conjugate pair.
      d: the skip D, [H].
    """

    pole: Pole
    b_re: jax.Array
    b_im: jax.Array
    c_re: jax.Array
    c_im: jax.Array
    d: jax.Array


def gss(lambda_log_re, lambda_log_im, c_re, c_im, d, exp_imaginary: bool = True) -> Diagonal:
    """The simplified DSS of Gated State Spaces: Λ shared by the channels, Δ = 1, B = 1, zero-order hold.

    Args:
      lambda_log_re: [N], log(-Re Λ).
      lambda_log_im: [N], log Im Λ; Im Λ itself when `exp_imaginary` is False.
      c_re, c_im: [H, N].
      d: [H].
      exp_imaginary: whether the imaginary part is exponentiated too, as in the paper's listing.
    """
    re = -jnp.exp(lambda_log_re)
    im = jnp.exp(lambda_log_im) if exp_imaginary else lambda_log_im
    turns = im / (2 * jnp.pi)
    turns = turns - lax.stop_gradient(jnp.round(turns))
    pole = Pole(re, turns, jnp.zeros_like(turns))
    _, a_im = power(pole, jnp.ones((), jnp.int32))
    # B̄ = (Ā - 1)/Λ. Ā - 1 by expm1 and a half-angle sine, so that slow modes lose no digits.
    half_sine = jnp.sin(im / 2)
    top_re = jnp.expm1(re) - 2 * jnp.exp(re) * half_sine**2
    norm = re**2 + im**2
    b_re, b_im = multiply(top_re, a_im, re / norm, -im / norm)
    return Diagonal(pole, b_re, b_im, c_re, c_im, d)


def _compute_type(system, u):
    return jnp.promote_types(system.d.dtype, jnp.float32) if u.dtype != jnp.float64 else jnp.float64


def zero_state(system: Diagonal, batch_size: int):
    """The state before any input: real and imaginary parts, each [B, H, N] zeros."""
    zero = jnp.zeros((batch_size, *system.c_re.shape), system.c_re.dtype)
    return zero, zero


def kernel(system: Diagonal, length: int):
    """The impulse response without the skip, Re Σ_n C B̄ Ā^l for l = 0 … length-1: [H, length]."""
    return modal_sum(*multiply(system.c_re, system.c_im, system.b_re, system.b_im), system.pole, length)


def convolve(system: Diagonal, u):
    """The whole sequence at once from zero state, by FFT. u and the result are [B, L, H], in u's type."""
    x = u.astype(_compute_type(system, u))
    return (causal_convolution(x, kernel(system, u.shape[1])) + system.d * x).astype(u.dtype)


def _recur(system, a, state, u):
    x_re, x_im = multiply(*state, *a)
    x_re, x_im = x_re + system.b_re * u[..., None], x_im + system.b_im * u[..., None]
    y = jnp.sum(system.c_re * x_re - system.c_im * x_im, axis=-1) + system.d * u
    return y, (x_re, x_im)


def step(system: Diagonal, u, state):
    """One token: u [B, H] and a state to y [B, H] and the next state."""
    x = u.astype(_compute_type(system, u))
    y, state = _recur(system, power(system.pole, jnp.ones((), jnp.int32)), state, x)
    return y.astype(u.dtype), state


def scan(system: Diagonal, u, *, state=None, resets=None):
    """The recurrence, token after token; the reference for the other ways.

    Args:
      u: [B, L, H].
      state: what `zero_state` gives, or None for zero.
      resets: bool [B, L], True where the state before that token is zero.

    Returns:
      y [B, L, H] in u's type, and the state after the last token.
    """
    x = u.astype(_compute_type(system, u))
    state = zero_state(system, u.shape[0]) if state is None else state
    resets = jnp.zeros(u.shape[:2], bool) if resets is None else resets
    a = power(system.pole, jnp.ones((), jnp.int32))

    def body(carry, inputs):
        u_BH, reset_B = inputs
        carry = tuple(jnp.where(reset_B[:, None, None], 0, part) for part in carry)
        y, carry = _recur(system, a, carry, u_BH)
        return carry, y

    state, y = lax.scan(body, state, (jnp.swapaxes(x, 0, 1), resets.T))
    return jnp.swapaxes(y, 0, 1).astype(u.dtype), state


def chunked(system: Diagonal, u, *, state=None, resets=None, chunk_size=None):
    """Any length in bounded memory: a masked Toeplitz product inside a chunk, the state across chunks.

    Arguments and results as `scan`; chunk_size is a number of tokens.
    """
    batch, length, channels = u.shape
    chunk = min(length, chunk_size or CHUNK_SIZE)
    chunks = -(-length // chunk)
    tail = chunks * chunk - length
    x = jnp.pad(u.astype(_compute_type(system, u)), [(0, 0), (0, tail), (0, 0)])
    x = jnp.moveaxis(x.reshape(batch, chunks, chunk, channels), 1, 0)
    state = zero_state(system, batch) if state is None else state
    resets = jnp.zeros((batch, length), bool) if resets is None else resets
    resets = jnp.moveaxis(jnp.pad(resets, [(0, 0), (0, tail)]).reshape(batch, chunks, chunk), 1, 0)
    # The last chunk's padding must not age the state: its tokens sit at negative exponents, so they are cut off below.
    lag = jnp.arange(chunk)[:, None] - jnp.arange(chunk)[None, :]
    toeplitz = jnp.where(lag >= 0, kernel(system, chunk)[:, jnp.maximum(lag, 0)], 0)  # [H, T, T]

    @jax.checkpoint
    def body(carry, inputs):
        u_BTH, reset_BT, count = inputs
        y, carry = _one_chunk(system, toeplitz, u_BTH, reset_BT, count, carry)
        return carry, y

    counts = jnp.minimum(chunk, length - chunk * jnp.arange(chunks))
    state, y = lax.scan(body, state, (x, resets, counts))
    y = jnp.moveaxis(y, 0, 1).reshape(batch, chunks * chunk, channels)[:, :length]
    return y.astype(u.dtype), state


def _one_chunk(system, toeplitz, u_BTH, reset_BT, count, state):
    chunk = u_BTH.shape[1]
    segment = jnp.cumsum(reset_BT, axis=1)
    same = (segment[:, :, None] == segment[:, None, :]).astype(u_BTH.dtype)
    y = jnp.einsum("hij,bij,bjh->bih", toeplitz, same, u_BTH, precision=lax.Precision.HIGHEST)
    first_part = (segment == 0).astype(u_BTH.dtype)
    a = power(system.pole, jnp.ones((), jnp.int32))
    ring = modal_sum(*multiply(*multiply(*state, *a), system.c_re, system.c_im), system.pole, chunk)
    y = y + first_part[..., None] * jnp.swapaxes(ring, 1, 2) + system.d * u_BTH
    counts = jnp.full((u_BTH.shape[0],), count)
    last_part = segment == jnp.take_along_axis(segment, counts[:, None] - 1, axis=1)
    kept = tuple(jnp.where((segment == 0).take(count - 1, axis=1)[:, None, None], part, 0) for part in state)
    return y, _advance(system, jnp.where(last_part[..., None], u_BTH, 0), counts, kept)


def _advance(system, u, lengths, state):
    """The state after lengths[b] tokens of row b, from `state`; tokens beyond do not enter."""
    length = u.shape[1]
    back = lengths[:, None] - 1 - jnp.arange(length)
    u = jnp.take_along_axis(u, jnp.maximum(back, 0)[..., None], axis=1)
    u = jnp.where(back[..., None] >= 0, u, 0)
    new = multiply(*moments(jnp.swapaxes(u, 1, 2), system.pole), system.b_re, system.b_im)
    powers = [jnp.moveaxis(p, -1, 0) for p in power(system.pole, lengths)]  # [B, N] or [B, H, N]
    powers = [p if p.ndim == 3 else p[:, None] for p in powers]
    old = multiply(*state, *powers)
    return new[0] + old[0], new[1] + old[1]


def prefill(system: Diagonal, u, lengths, *, state=None):
    """Outputs at all positions, and the state after exactly lengths[b] tokens of row b.

    Args:
      u: [B, L, H].
      lengths: int [B], 0 … L.
      state: state before the first token; None for zero.

    Returns:
      y [B, L, H] in u's type, and the state. Tokens at and after lengths[b] do not enter the state.
    """
    x = u.astype(_compute_type(system, u))
    y = causal_convolution(x, kernel(system, u.shape[1])) + system.d * x
    if state is None:
        state = zero_state(system, u.shape[0])
    else:
        a = power(system.pole, jnp.ones((), jnp.int32))
        ring = modal_sum(*multiply(*multiply(*state, *a), system.c_re, system.c_im), system.pole, u.shape[1])
        y = y + jnp.swapaxes(ring, 1, 2)
    return y.astype(u.dtype), _advance(system, x, lengths, state)
