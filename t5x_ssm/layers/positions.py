"""Position information for attention: T5's relative bias, rotary embedding, learned positions. State spaces need none."""

import math

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax.linen import partitioning

from t5x_ssm.errors import UserError

Array = jax.Array


def relative_buckets(relative: Array, num_buckets: int, max_distance: int, bidirectional: bool) -> Array:
    """T5's bucket of each relative position (Raffel et al. 2020, section 2.1): exact when near, logarithmic when far.

    Args:
      relative: key position minus query position, int, any shape.
      num_buckets: buckets in all; half of them are for each direction when bidirectional.
      max_distance: distances from here on share the last bucket.
      bidirectional: whether later keys have buckets of their own; otherwise they share bucket 0.

    Returns:
      int32 buckets of the same shape.
    """
    offset = 0
    if bidirectional:
        num_buckets //= 2
        offset = jnp.where(relative > 0, num_buckets, 0)
        distance = jnp.abs(relative)
    else:
        distance = jnp.maximum(-relative, 0)
    exact = num_buckets // 2
    scale = (num_buckets - exact) / math.log(max_distance / exact)
    far = exact + (jnp.log(distance / exact + np.finfo(np.float32).eps) * scale).astype(jnp.int32)
    far = jnp.minimum(far, num_buckets - 1)
    return (offset + jnp.where(distance < exact, distance, far)).astype(jnp.int32)


def relative_bias(table: Array, q_pos: Array, k_pos: Array, max_distance: int, bidirectional: bool) -> Array:
    """The bias that a table [heads, buckets] gives: [.., heads, Q, K], for query positions [.., Q] and key positions [.., K]."""
    relative = k_pos[..., None, :] - q_pos[..., :, None]
    buckets = relative_buckets(relative, table.shape[1], max_distance, bidirectional)
    return jnp.moveaxis(jnp.take(table, buckets, axis=1), 0, -3)


class RelativeBias(nn.Module):
    """A learned bias for every head and bucket, added to attention logits; one attention's own, or a whole stack's.

    Attributes:
      num_heads, num_buckets: see `relative_buckets`.
    """

    num_heads: int
    num_buckets: int = 32

    @nn.compact
    def __call__(self) -> Array:
        """The table, float32 [heads, buckets]."""
        return partitioning.param_with_axes(
            "embedding",
            nn.initializers.variance_scaling(1.0, "fan_avg", "uniform"),
            (self.num_heads, self.num_buckets),
            jnp.float32,
            axes=("heads", "relpos_buckets"),
        )


class LearnedPositions(nn.Module):
    """A learned vector for every absolute position, added to embedded tokens. It ends at `max_length`.

    Attributes:
      max_length: how many positions there are.
      init_scale: standard deviation of the initial table.
      layers_first: give the cache leaf a leading axis of 1, as every leaf of a scanned network has.
    """

    max_length: int
    init_scale: float = 0.02
    layers_first: bool = False

    @nn.compact
    def __call__(
        self,
        x: Array,
        positions: Array | None = None,
        *,
        decode: bool = False,
        prefill: bool = False,
        prefill_lengths: Array | None = None,
    ) -> Array:
        """x [B, L, D] plus the vectors of positions [B, L] (0, 1, … when None); see `layers.mixer` for the other modes.

        Raises:
          UserError: L is beyond `max_length`. In decoding the outputs beyond it are NaN.
        """
        batch, length, width = x.shape
        if length > self.max_length:
            raise UserError(
                f"A text of {length} tokens has no learned positions beyond max_length = {self.max_length}."
            )
        table = partitioning.param_with_axes(
            "embedding",
            nn.initializers.normal(self.init_scale),
            (self.max_length, width),
            jnp.float32,
            axes=("abspos_buckets", "embed"),
        )
        if positions is None:
            positions = jnp.arange(length, dtype=jnp.int32)[None]
        if decode or prefill:
            created = self.has_variable("cache", "tokens_seen")
            shape, axes = ((1, batch), ("layers", "batch")) if self.layers_first else ((batch,), ("batch",))
            seen = partitioning.variable_with_axes(
                "cache", "tokens_seen", lambda: jnp.zeros(shape, jnp.int32), axes=axes
            )
            if created or prefill:
                count = seen.value.reshape(batch)
                positions = count[:, None] + positions
                consumed = length if prefill_lengths is None else prefill_lengths.astype(jnp.int32)
                seen.value = (count + consumed).reshape(shape)
        return x + jnp.take(table, positions, axis=0, mode="fill").astype(x.dtype)


def rotate(x: Array, positions: Array, base: float = 10_000.0) -> Array:
    """Rotary embedding (Su et al. 2021) of x [B, L, heads, D] at positions [B, L]: halves of D form the pairs."""
    half, dtype = x.shape[-1] // 2, jnp.promote_types(x.dtype, jnp.float32)
    frequency = (base ** (-np.arange(half) / half)).astype(dtype)
    angle = positions[..., None, None].astype(dtype) * frequency
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    a, b = x[..., :half].astype(dtype), x[..., half : 2 * half].astype(dtype)
    rotated = jnp.concatenate([a * cos - b * sin, b * cos + a * sin, x[..., 2 * half :].astype(dtype)], axis=-1)
    return rotated.astype(x.dtype)
