"""H3's shift system: a causal filter of N taps, one a channel, that lets a layer look a few tokens back.

A state space whose A shifts its state by one place keeps the last inputs, so its kernel is finite:

    y_h[l] = Σ_{j < N} K_h[j] u_h[l-j] + D_h u_h[l]        K[j] = Σ_n B[n] C[n+j]

(H3, 2212.14052, where B starts as the first unit vector and is trained.) The state here is the last N inputs.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from t5x_ssm.ssm import scan as scans
from t5x_ssm.ssm.convolution import causal_convolution

# Tokens in a chunk of `chunked` unless the caller says otherwise.
CHUNK_SIZE = 16384


class Shift(NamedTuple):
    """A bank of H finite filters.

    Attributes:
      taps: K at lags 0 … N-1, [H, N].
      d: the skip D, [H].
    """

    taps: jax.Array
    d: jax.Array


def shift(b, c, d) -> Shift:
    """The filter of a shift system.

    Args:
      b: [H, N].
      c: [H, N].
      d: [H].
    """
    # The correlation of b and c is the convolution of b with c reversed, itself reversed.
    reversed_taps = causal_convolution(b.T[None], c[:, ::-1])[0]  # [N, H]
    return Shift(reversed_taps[::-1].T, d)


def zero_state(system: Shift, batch_size: int):
    """The state before any input: the last N inputs, oldest first, [B, H, N] zeros."""
    return jnp.zeros((batch_size, *system.taps.shape), system.taps.dtype)


def kernel(system: Shift, length: int):
    """The impulse response without the skip: [H, length]."""
    taps = system.taps[:, :length]
    return jnp.pad(taps, [(0, 0), (0, length - taps.shape[1])])


def _cast(system: Shift, u):
    return u.astype(jnp.promote_types(u.dtype, system.d.dtype))


def _filter(system: Shift, x, resets=None):
    return causal_convolution(x, system.taps.at[:, 0].add(system.d), resets=resets)


def convolve(system: Shift, u):
    """All outputs at once from zero state. u and the result are [B, L, H], in u's type."""
    return _filter(system, _cast(system, u)).astype(u.dtype)


def step(system: Shift, u, state):
    """One token: u [B, H] and a state to y [B, H] and the next state."""
    x = _cast(system, u)
    state = jnp.concatenate([state[..., 1:], x[..., None].astype(state.dtype)], axis=-1)
    y = jnp.sum(system.taps[:, ::-1] * state, axis=-1) + system.d * x
    return y.astype(u.dtype), state


def scan(system: Shift, u, *, state=None, resets=None):
    """The recurrence, token after token. Arguments and results as `diagonal.scan`."""
    state = zero_state(system, u.shape[0]) if state is None else state
    return scans.recurrence(lambda u, state: step(system, u, state), u, state, resets)


def chunked(system: Shift, u, *, state=None, resets=None, chunk_size: int | None = None):
    """Any length in bounded memory: chunks that remember the last N inputs. Arguments and results as `diagonal.chunked`."""
    state = zero_state(system, u.shape[0]) if state is None else state

    def run(u, resets, state):
        return _with_past(system, u, resets, state)

    return scans.in_chunks(run, u, resets, state, CHUNK_SIZE if chunk_size is None else chunk_size)


def _with_past(system: Shift, u, resets, state):
    past = state.shape[-1]
    x = jnp.concatenate([jnp.swapaxes(state, 1, 2), _cast(system, u)], axis=1)
    if resets is not None:
        resets = jnp.pad(resets, [(0, 0), (past, 0)])
    newest = scans.last_document(x, resets)[:, -past:]
    y = _filter(system, x, resets)[:, past:]
    return y.astype(u.dtype), jnp.swapaxes(newest, 1, 2)


def handover(system: Shift, u, resets, doublings: int):
    """What a piece of a sequence tells the pieces after it; see `diagonal.handover`. A long piece lets nothing through."""
    length, past = u.shape[1], system.taps.shape[1]
    newest = jnp.swapaxes(scans.last_document(_cast(system, u), resets)[:, -past:], 1, 2)
    end = jnp.pad(newest, [(0, 0), (0, 0), (past - newest.shape[2], 0)])

    def over(steps):
        steps = min(steps, past)
        return lambda state: jnp.pad(state[..., steps:], [(0, 0), (0, 0), (0, steps)])

    return end, [over(length << i) for i in range(doublings)]


def prefill(system: Shift, u, lengths, *, state=None):
    """Outputs at all positions, and the state after exactly lengths[b] tokens of row b; see `diagonal.prefill`."""
    state = zero_state(system, u.shape[0]) if state is None else state
    past = state.shape[-1]
    y, _ = _with_past(system, u, None, state)
    x = jnp.concatenate([jnp.swapaxes(state, 1, 2), _cast(system, u)], axis=1)
    places = lengths[:, None] + jnp.arange(past)  # the N inputs before token lengths[b]
    newest = jnp.take_along_axis(x, places[..., None], axis=1)
    return y.astype(u.dtype), jnp.swapaxes(newest, 1, 2)
