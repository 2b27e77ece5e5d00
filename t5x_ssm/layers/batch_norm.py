"""Batch normalization over the real tokens of a batch, for classifiers: S5's Long Range Arena recipes train with it.

A language model must not have it. Its statistics run over all positions, later ones too, so a decoder would see what it is to
predict; networks that generate refuse it.
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax.linen import partitioning

Array = jax.Array


class BatchNorm(nn.Module):
    """Normalizes every channel by its mean and variance over the batch and its positions (Ioffe & Szegedy 2015).

    The statistics are those of the whole batch on every mesh, since they are computed on global arrays. Running averages are
    in the collection `batch_stats`, and are what is used outside training.

    Attributes:
      momentum: weight of the past in the running averages (S5: 0.95, 0.9 for the Pathfinder tasks).
      epsilon: added to the variance.
      axis: logical axis of the parameters.
      dtype: type of the result.
    """

    momentum: float = 0.95
    epsilon: float = 1e-5
    axis: str = "embed"
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Array, *, mask: Array | None = None, training: bool = False) -> Array:
        """Normalizes x [B, L, D].

        Args:
          x: activations.
          mask: [B, L], zero at positions that do not count; all count when None.
          training: normalize by this batch, and let it enter the running averages where `batch_stats` is mutable.
        """
        x = x.astype(jnp.promote_types(x.dtype, jnp.float32))
        shape = (x.shape[-1],)
        scale, bias = (
            partitioning.param_with_axes(name, init, shape, jnp.float32, axes=(self.axis,))
            for name, init in (("scale", nn.initializers.ones), ("bias", nn.initializers.zeros))
        )
        mean, variance = (
            self.variable("batch_stats", name, make, shape, jnp.float32)
            for name, make in (("mean", jnp.zeros), ("var", jnp.ones))
        )
        center, spread = mean.value, variance.value
        if training:
            weights = jnp.ones(x.shape[:2], x.dtype) if mask is None else (mask > 0).astype(x.dtype)
            weights = weights[..., None] / jnp.maximum(jnp.sum(weights), 1.0)
            center = jnp.sum(weights * x, axis=(0, 1))
            spread = jnp.sum(weights * jnp.square(x - center), axis=(0, 1))
            if self.is_mutable_collection("batch_stats") and not self.is_initializing():
                mean.value = self.momentum * mean.value + (1 - self.momentum) * center
                variance.value = self.momentum * variance.value + (1 - self.momentum) * spread
        y = (x - center) * jax.lax.rsqrt(spread + self.epsilon)
        return (y * scale + bias).astype(self.dtype)
