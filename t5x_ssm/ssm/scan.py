"""Running a system over the length of a sequence: token after token, or chunk after chunk."""

import jax
import jax.numpy as jnp
from jax import lax


def clear_state(state, resets):
    """The state with the rows where `resets` (bool [B]) is True set to zero. Leaves are [B, ...]."""
    return jax.tree.map(lambda x: jnp.where(resets.reshape(-1, *(1,) * (x.ndim - 1)), jnp.zeros_like(x), x), state)


def last_document(u, resets):
    """u [B, L, ...] with zeros before the last reset (bool [B, L]) of each row: all that the state after it knows."""
    if resets is None:
        return u
    document = jnp.cumsum(resets, axis=1)
    return jnp.where((document == document[:, -1:]).reshape(*resets.shape, *(1,) * (u.ndim - 2)), u, 0)


def backwards(u, lengths):
    """u [B, L, H] from each row's own last token (lengths[b] of them, int [B]) to its first, zeros behind.

    Then one table of powers, by the distance from the last token, fits rows of all lengths.
    """
    back = lengths[:, None] - 1 - jnp.arange(u.shape[1])
    turned = jnp.take_along_axis(u, jnp.maximum(back, 0)[..., None], axis=1)
    return jnp.where(back[..., None] >= 0, turned, 0)


def recurrence(step, u, state, resets=None, reverse: bool = False):
    """Runs a one-token step over a sequence.

    Args:
      step: (u [B, ...], state) -> (y [B, ...], state); `u` may be a pytree.
      u: pytree of [B, L, ...].
      state: pytree of [B, ...], the state before the first token (the last one when `reverse`).
      resets: bool [B, L], True where the state that enters that token's step is zero instead; None for nowhere.
      reverse: from the last token to the first.

    Returns:
      y [B, L, ...] and the state after the last step.
    """

    def body(carry, inputs):
        token, reset = inputs
        if reset is not None:
            carry = clear_state(carry, reset)
        y, carry = step(token, carry)
        return carry, y

    def time_first(x):
        return jnp.swapaxes(x, 0, 1)

    inputs = (jax.tree.map(time_first, u), None if resets is None else resets.T)
    state, y = lax.scan(body, state, inputs, reverse=reverse)
    return jax.tree.map(time_first, y), state


def in_chunks(run, u, resets, state, chunk_size: int):
    """Runs a system over a sequence in chunks, so that memory does not grow with the length beyond input and output.

    Args:
      run: (u [B, T, ...], resets [B, T] or None, state) -> (y [B, T, ...], state) for any T up to chunk_size.
      u: [B, L, ...].
      resets: bool [B, L] or None.
      state: pytree of [B, ...].
      chunk_size: tokens in a chunk, at least 1; the last chunk may be shorter.

    Returns:
      y [B, L, ...] and the state after the last token.

    Raises:
      ValueError: if chunk_size is below 1.
    """
    if chunk_size < 1:
        raise ValueError(f"chunk_size must be at least 1, got {chunk_size}")
    batch, length = u.shape[:2]
    chunks = length // chunk_size
    whole = chunks * chunk_size

    def body(state, inputs):
        y, state = run(*inputs, state)
        return state, y

    def split(x):
        return jnp.moveaxis(x[:, :whole].reshape(batch, chunks, chunk_size, *x.shape[2:]), 1, 0)

    parts = []
    if whole:
        state, y = lax.scan(jax.checkpoint(body), state, jax.tree.map(split, (u, resets)))
        parts.append(jnp.moveaxis(y, 0, 1).reshape(batch, whole, *y.shape[3:]))
    if whole < length:
        y, state = run(*jax.tree.map(lambda x: x[:, whole:], (u, resets)), state)
        parts.append(y)
    return jnp.concatenate(parts, axis=1) if len(parts) > 1 else parts[0], state
