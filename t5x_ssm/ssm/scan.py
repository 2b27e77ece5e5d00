"""Recurrences over the length of a sequence, one token after another."""

import jax
import jax.numpy as jnp
from jax import lax


def clear_state(state, resets):
    """The state with the rows where `resets` (bool [B]) is True set to zero. Leaves are [B, ...]."""
    return jax.tree.map(lambda x: jnp.where(resets.reshape(-1, *(1,) * (x.ndim - 1)), jnp.zeros_like(x), x), state)


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
