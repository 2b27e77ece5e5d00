"""Drawing the next token from logits: temperature, top-k and nucleus, in this order, in float32.

Temperature flattens or sharpens the distribution; top-k keeps the k most likely ids of it; nucleus (top-p, Holtzman et al.
2020) keeps the fewest most likely ids whose probability, among those still there, reaches p. Equal logits rank by id, so
that top_k = 1 is greedy.
"""

import dataclasses

import jax
import jax.numpy as jnp

from t5x_ssm.errors import UserError

Array = jax.Array

# Below this, float32 logits that differ at all differ by more than a draw can overcome.
_GREEDY_BELOW = 1e-6


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How the next token is chosen. Static: each setting compiles to the operations it needs and no others.

    Attributes:
      temperature: divides the logits; 0 takes the most likely id.
      top_k: how many of the most likely ids may be drawn; 0 for all.
      top_p: probability that the ids which may be drawn must reach together; 1 for all.
      forbidden: ids that are never drawn. Padding (0) is not a token of any text.
      vocab_size: ids from this on are never drawn either: networks pad their tables. None if all are tokens.

    Raises:
      UserError: a value is out of range.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    forbidden: tuple[int, ...] = (0,)
    vocab_size: int | None = None

    def __post_init__(self):
        if not 0 <= self.temperature < float("inf"):
            raise UserError(f"temperature = {self.temperature}; it is 0 (greedy) or a positive number.")
        if self.top_k < 0 or self.top_k != int(self.top_k):
            raise UserError(f"top_k = {self.top_k}; it is a number of ids, or 0 for all of them.")
        if not 0 < self.top_p <= 1:
            raise UserError(f"top_p = {self.top_p}; it is a probability above 0, and 1 keeps every id.")

    @property
    def greedy(self) -> bool:
        """Whether the draw needs no randomness."""
        return self.temperature < _GREEDY_BELOW or self.top_k == 1


GREEDY = Sampling(temperature=0.0)


def allowed(logits: Array, sampling: Sampling) -> Array:
    """Gives the ids that must not be drawn probability zero: [..., V] to float32 [..., V].

    Raises:
      UserError: no id is left.
    """
    logits = logits.astype(jnp.float32)
    size = min(logits.shape[-1], sampling.vocab_size or logits.shape[-1])
    ids = sorted({i for i in sampling.forbidden if 0 <= i < size})
    if len(ids) == size:
        raise UserError(f"All {size} ids of the vocabulary are forbidden; nothing can be drawn.")
    if size < logits.shape[-1]:
        logits = jnp.where(jnp.arange(logits.shape[-1]) < size, logits, -jnp.inf)
    return logits.at[..., jnp.array(ids, jnp.int32)].set(-jnp.inf) if ids else logits


def candidates(logits: Array, sampling: Sampling) -> tuple[Array, Array]:
    """The ids that may be drawn, most likely first.

    Args:
      logits: [B, V] of any float type.
      sampling: the settings; its temperature is not zero.

    Returns:
      (scaled float32 [B, K], ids int32 [B, K]): the distribution is softmax(scaled); ids outside the nucleus have
      -infinity. K is top_k, or V.
    """
    logits = allowed(logits, sampling)
    vocab = logits.shape[-1]
    # Dividing what is left below the maximum cannot overflow to +infinity, however small the temperature.
    scaled = (logits - jnp.max(logits, axis=-1, keepdims=True)) / sampling.temperature
    if sampling.top_p == 1 and not 0 < sampling.top_k < vocab:
        return scaled, jnp.broadcast_to(jnp.arange(vocab, dtype=jnp.int32), scaled.shape)
    scaled, ids = jax.lax.top_k(scaled, min(sampling.top_k or vocab, vocab))
    if sampling.top_p < 1:
        probabilities = jax.nn.softmax(scaled, axis=-1)
        before = jnp.cumsum(probabilities, axis=-1) - probabilities
        # The best id is in every nucleus; written out, for rounding could put `before` a hair off zero.
        inside = (before < sampling.top_p).at[..., 0].set(True)
        scaled = jnp.where(inside, scaled, -jnp.inf)
    return scaled, ids


def draw(logits: Array, keys: Array | None, sampling: Sampling) -> Array:
    """Draws one id a row.

    Args:
      logits: [B, V] of any float type.
      keys: [B] random keys, one a row, so that a row's draw does not depend on the rows beside it; None when greedy.
      sampling: the settings.

    Returns:
      int32 [B].
    """
    if sampling.greedy:
        return jnp.argmax(allowed(logits, sampling), axis=-1).astype(jnp.int32)
    scaled, ids = candidates(logits, sampling)
    choice = jax.vmap(jax.random.categorical)(keys, scaled)
    return jnp.take_along_axis(ids, choice[:, None], axis=-1)[:, 0]
