"""Sequence classifiers over any pattern of mixers, and the two-document retrieval head of the Long Range Arena."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax.core import FrozenDict

from t5x_ssm.errors import UserError
from t5x_ssm.layers.activations import ACTIVATIONS
from t5x_ssm.layers.basic import Dense, Embed, LayerNorm
from t5x_ssm.layers.settings import require_choice
from t5x_ssm.models.mixers import DEFAULT_MIXERS
from t5x_ssm.models.stack import Context, Factory, Mode, Stack, apply_norm, shared_settings
from t5x_ssm.parallel.shard import constrain

Array = jax.Array
POOLINGS = ("mean", "last", "first")


class SequenceEncoder(nn.Module):
    """Tokens or feature vectors to one vector a sequence: embedding or linear map, stack, pooling over real positions.

    Attributes:
      embed_dim: width of the residual stream, and of the result.
      pattern, num_layers, mixers, mlp, norm, pre_norm, dropout_rate, remat_policy, scan_layers: see `models.stack.Stack`.
        Bidirectional mixers have to be given as such.
      vocab_size: size of the vocabulary of token inputs; None for inputs that are feature vectors.
      pooling: "mean" over the real positions, or the "last" or "first" of them.
      final_norm: one more norm between a pre-norm stack and the pooling (S5's models have none).
    """

    embed_dim: int
    pattern: str
    num_layers: int | None = None
    mixers: Mapping[str, Factory] = FrozenDict()
    vocab_size: int | None = None
    pooling: str = "mean"
    mlp: Factory | None = None
    norm: Factory = LayerNorm
    pre_norm: bool = True
    final_norm: bool = False
    dropout_rate: float = 0.0
    embed_init_scale: float = 0.02
    remat_policy: str = "none"
    scan_layers: bool = True
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, inputs: Array, mask: Array | None = None, enable_dropout: bool = True) -> Array:
        """float32 [B, embed_dim].

        Args:
          inputs: int tokens [B, L], or features [B, L, F].
          mask: [B, L], zero at padding; every position is real when None.
          enable_dropout: whether this is training: dropout acts, and batch norms use the batch.
        """
        require_choice("SequenceEncoder.pooling", self.pooling, POOLINGS)
        if (inputs.ndim == 2) != (self.vocab_size is not None):
            kind = "tokens [B, L]" if inputs.ndim == 2 else f"features {inputs.shape}"
            raise UserError(f"The inputs are {kind} but vocab_size = {self.vocab_size}; it is set for tokens only.")
        if self.vocab_size is not None:
            embed = Embed(self.vocab_size, self.embed_dim, self.embed_init_scale, self.dtype, name="token_embedder")
            x = embed(inputs)
        else:
            x = Dense(self.embed_dim, (None, "embed"), use_bias=True, dtype=self.dtype, name="input")(inputs)
        x = constrain(x, ("batch", "length", "embed"))
        x = Stack(
            pattern=self.pattern,
            mixers={**DEFAULT_MIXERS, **self.mixers},
            num_layers=self.num_layers,
            **shared_settings(self),
            name="encoder",
        )(x, Context(padding_mask=mask), Mode(enable_dropout))
        if self.final_norm:
            x = apply_norm(self.norm(dtype=self.dtype, name="final_norm"), mask, enable_dropout)(x)
        return pool(x.astype(jnp.promote_types(x.dtype, jnp.float32)), mask, self.pooling)


def pool(x: Array, mask: Array | None, pooling: str) -> Array:
    """One vector [B, D] for each sequence of x [B, L, D] from its real positions."""
    mask = jnp.ones(x.shape[:2], bool) if mask is None else mask > 0
    if pooling == "mean":
        return jnp.sum(x * mask[..., None], axis=1) / jnp.maximum(mask.sum(1), 1)[:, None]
    index = jnp.argmax(mask, axis=1) if pooling == "first" else x.shape[1] - 1 - jnp.argmax(mask[:, ::-1], axis=1)
    return jnp.take_along_axis(x, index[:, None, None], axis=1)[:, 0]


class Classifier(nn.Module):
    """Logits over classes for a sequence.

    Attributes:
      num_classes: how many.
      encoder: builds the `SequenceEncoder`.
    """

    num_classes: int
    encoder: Factory

    @property
    def vocab_size(self) -> int | None:
        """The encoder's; None where inputs are features."""
        return self.encoder(parent=None).vocab_size

    @nn.compact
    def __call__(self, inputs: Array, mask: Array | None = None, enable_dropout: bool = True) -> Array:
        """float32 [B, num_classes]; arguments as `SequenceEncoder`."""
        x = self.encoder(name="sequence_encoder")(inputs, mask, enable_dropout)
        return Dense(self.num_classes, ("embed", None), use_bias=True, name="classes")(x)


class RetrievalClassifier(nn.Module):
    """Logits over classes for a pair of sequences a and b, from one encoder's vectors: an MLP of [a, b, a - b, a * b].

    Attributes:
      num_classes: how many; 2 in the Long Range Arena's retrieval task.
      encoder: builds the `SequenceEncoder` of both.
      hidden: width of the MLP's hidden layer; the encoder's when None.
    """

    num_classes: int
    encoder: Factory
    hidden: int | None = None

    @property
    def vocab_size(self) -> int | None:
        """The encoder's; None where inputs are features."""
        return self.encoder(parent=None).vocab_size

    @nn.compact
    def __call__(self, inputs: Array, mask: Array | None = None, enable_dropout: bool = True) -> Array:
        """float32 [B, num_classes] for inputs [B, 2, L] (or [B, 2, L, F]) and mask [B, 2, L]."""
        if inputs.ndim < 3 or inputs.shape[1] != 2:
            raise UserError(f"A retrieval example is a pair, [B, 2, L]; the inputs are {inputs.shape}.")
        both = lambda x: None if x is None else x.reshape(-1, *x.shape[2:])
        x = self.encoder(name="sequence_encoder")(both(inputs), both(mask), enable_dropout)
        a, b = jnp.moveaxis(x.reshape(-1, 2, x.shape[-1]), 1, 0)
        features = jnp.concatenate([a, b, a - b, a * b], axis=-1)
        hidden = Dense(self.hidden or x.shape[-1], (None, "mlp"), use_bias=True, name="hidden")(features)
        return Dense(self.num_classes, ("mlp", None), use_bias=True, name="classes")(ACTIVATIONS["gelu_tanh"](hidden))
