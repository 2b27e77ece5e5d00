"""The plain pieces every layer is made of: dense projection, norms, token embedding, feed-forward block.

Parameters are float32 and carry logical axes; computation follows `dtype`. Norm statistics and logits are float32.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax.linen import partitioning
from jax.ad_checkpoint import checkpoint_name

from t5x_ssm.errors import UserError
from t5x_ssm.layers.activations import ACTIVATIONS
from t5x_ssm.layers.settings import require_positive
from t5x_ssm.parallel.shard import constrain, current_mesh

Array = jax.Array
Initializer = Callable[..., Array]

# Variance 1/fan_in, truncated normal.
default_kernel_init = nn.initializers.variance_scaling(1.0, "fan_in", "truncated_normal")


class Dense(nn.Module):
    """y = x W (+ b) over the last axis of x.

    Attributes:
      features: size of the output.
      axes: logical axes of the kernel, (input, output).
      use_bias: adds a bias, zero at initialization.
      dtype: type of the computation.
    """

    features: int
    axes: tuple[str, str]
    use_bias: bool = False
    dtype: Any = jnp.float32
    kernel_init: Initializer = default_kernel_init

    @nn.compact
    def __call__(self, x: Array) -> Array:
        kernel = partitioning.param_with_axes(
            "kernel", self.kernel_init, (x.shape[-1], self.features), jnp.float32, axes=self.axes
        )
        y = _product(x.astype(self.dtype), kernel.astype(self.dtype))
        if self.use_bias:
            bias = partitioning.param_with_axes(
                "bias", nn.initializers.zeros, (self.features,), jnp.float32, axes=(self.axes[1],)
            )
            y = y + bias.astype(self.dtype)
        return y


def _product(x: Array, kernel: Array) -> Array:
    """x [..., D] times kernel [D, F]."""
    mesh = current_mesh()
    if mesh is not None and mesh.size > 1:  # Rows would merge dimensions that are sharded apart.
        return jnp.dot(x, kernel)
    # As rows of one matrix: on CPU the gradient of the kernel begins by transposing a batch of sequences, but not rows.
    return jnp.dot(x.reshape(-1, x.shape[-1]), kernel).reshape(*x.shape[:-1], -1)


class LayerNorm(nn.Module):
    """Layer normalization over the last axis, statistics in float32.

    Attributes:
      epsilon: added to the variance (1e-6 in T5 and Flax, 1e-5 in the PyTorch references).
      use_scale: whether there is a learned scale.
      use_bias: whether there is a learned shift.
      center: subtract the mean; without it this is the RMS norm of T5.
      axis: logical axis of the parameters.
      dtype: type of the result.
    """

    epsilon: float = 1e-6
    use_scale: bool = True
    use_bias: bool = True
    center: bool = True
    axis: str = "embed"
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Array) -> Array:
        def param(name, init):
            return partitioning.param_with_axes(name, init, (x.shape[-1],), jnp.float32, axes=(self.axis,))

        scale = param("scale", nn.initializers.ones) if self.use_scale else None
        bias = param("bias", nn.initializers.zeros) if self.use_bias else None

        # Differentiated as it is written this keeps three float32 arrays of x's size. Kept here are x in its own type and
        # the statistics of each token, so that no sum over a sharded axis is made twice.
        @functools.partial(
            jax.checkpoint,
            prevent_cse=False,
            policy=jax.checkpoint_policies.save_only_these_names("norm_statistics"),
        )
        def normalize(x, scale, bias):
            y = x.astype(jnp.promote_types(x.dtype, jnp.float32))
            if self.center:
                y = y - checkpoint_name(jnp.mean(y, axis=-1, keepdims=True), "norm_statistics")
            variance = checkpoint_name(jnp.mean(jnp.square(y), axis=-1, keepdims=True), "norm_statistics")
            y = y * jax.lax.rsqrt(variance + self.epsilon)
            y = y if scale is None else y * scale
            y = y if bias is None else y + bias
            return y.astype(self.dtype)

        return normalize(x, scale, bias)


class RMSNorm(LayerNorm):
    """Root-mean-square norm with a scale and no shift, as in T5."""

    use_bias: bool = False
    center: bool = False


class Embed(nn.Module):
    """Token embedding, which also gives tied logits.

    Attributes:
      num_embeddings: vocabulary size.
      features: width.
      init_scale: standard deviation of the initial table.
      dtype: type of the embedded tokens.
    """

    num_embeddings: int
    features: int
    init_scale: float = 0.02
    dtype: Any = jnp.float32

    def setup(self):
        # Every network begins with a table, so its settings are checked here.
        require_positive("network", vocab_size=self.num_embeddings, embed_dim=self.features)
        if not _is_floating(self.dtype):
            raise UserError(f"network.dtype = {self.dtype!r}; it must be a floating-point type, such as 'bfloat16'.")
        self.embedding = partitioning.param_with_axes(
            "embedding",
            nn.initializers.normal(self.init_scale),
            (self.num_embeddings, self.features),
            jnp.float32,
            axes=("vocab", "embed"),
        )

    def __call__(self, tokens_BL: Array) -> Array:
        """Embeds int tokens [B, L] into [B, L, features]."""
        # Whole rows, gathered to where the tokens are. Looked up in a table whose width is split, the tokens of the whole batch
        # would visit every device, and the gradient would sort and scatter all of them there.
        table = constrain(self.embedding.astype(self.dtype), ("vocab", None))
        # T5X's eval initializes networks with tokens of its batches' default type, float32.
        return jnp.take(table, tokens_BL.astype(jnp.int32), axis=0)

    def attend(self, x: Array) -> Array:
        """Logits of x [..., features] against the table: float32 [..., vocabulary]."""
        table = self.embedding.astype(self.dtype)
        return jnp.einsum("...d,vd->...v", x.astype(self.dtype), table, preferred_element_type=jnp.float32)


def _is_floating(dtype: Any) -> bool:
    try:
        return jnp.issubdtype(jnp.dtype(dtype), jnp.floating)
    except TypeError:
        return False


class MLP(nn.Module):
    """Feed-forward block; several activations make it gated (their branches are multiplied), as in T5 v1.1.

    Attributes:
      hidden: width of the hidden layer.
      activations: names from `ACTIVATIONS`; ("gelu", "linear") is GEGLU.
      use_bias: biases on both projections.
      dropout_rate: of the hidden layer.
      kernel_init: of the projections.
      out_kernel_init: of the one back to the residual stream, if another.
    """

    hidden: int
    activations: Sequence[str] = ("gelu_tanh",)
    use_bias: bool = False
    dropout_rate: float = 0.0
    kernel_init: Initializer = default_kernel_init
    out_kernel_init: Initializer | None = None
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Array, *, enable_dropout: bool = True) -> Array:
        require_positive("MLP", hidden=self.hidden)
        branches = []
        for i, name in enumerate(self.activations):
            projection = "wi" if len(self.activations) == 1 else f"wi_{i}"
            h = Dense(self.hidden, ("embed", "mlp"), self.use_bias, self.dtype, self.kernel_init, name=projection)(x)
            branches.append(ACTIVATIONS[name](h))
        h = branches[0]
        for branch in branches[1:]:
            h = h * branch
        h = constrain(h, ("batch", "length", "mlp"))
        h = nn.Dropout(self.dropout_rate, broadcast_dims=(-2,))(h, deterministic=not enable_dropout)
        out_init = self.out_kernel_init or self.kernel_init
        return Dense(x.shape[-1], ("mlp", "embed"), self.use_bias, self.dtype, out_init, name="wo")(h)
