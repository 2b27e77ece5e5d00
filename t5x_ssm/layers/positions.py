"""Position information for attention: T5's relative bias and rotary embedding. State-space mixers need neither."""

import math

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax.linen import partitioning

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


class RelativeBias(nn.Module):
    """A learned bias for every head and bucket, added to attention logits.

    Attributes:
      num_heads, num_buckets, max_distance, bidirectional: see `relative_buckets`.
    """

    num_heads: int
    num_buckets: int = 32
    max_distance: int = 128
    bidirectional: bool = False

    @nn.compact
    def __call__(self, q_pos: Array, k_pos: Array) -> Array:
        """Bias [.., heads, Q, K] float32 for query positions [.., Q] and key positions [.., K]."""
        table = partitioning.param_with_axes(
            "embedding",
            nn.initializers.variance_scaling(1.0, "fan_avg", "uniform"),
            (self.num_heads, self.num_buckets),
            jnp.float32,
            axes=("heads", "relpos_buckets"),
        )
        relative = k_pos[..., None, :] - q_pos[..., :, None]
        buckets = relative_buckets(relative, self.num_buckets, self.max_distance, self.bidirectional)
        return jnp.moveaxis(jnp.take(table, buckets, axis=1), 0, -3)


def rotate(x: Array, positions: Array, base: float = 10_000.0) -> Array:
    """Rotary embedding (Su et al. 2021) of x [B, L, heads, D] at positions [B, L]: halves of D form the pairs."""
    half = x.shape[-1] // 2
    frequency = base ** (-np.arange(half, dtype=np.float32) / half)
    angle = positions[..., None, None].astype(jnp.float32) * frequency
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    a, b = x[..., :half].astype(jnp.float32), x[..., half : 2 * half].astype(jnp.float32)
    rotated = jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)
    rotated = jnp.concatenate([rotated, x[..., 2 * half :].astype(jnp.float32)], axis=-1)
    return rotated.astype(x.dtype)
