"""Decoder-only language model over any pattern of mixers, under the call signature that T5X's DecoderOnlyModel expects."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax.core import FrozenDict

from t5x_ssm.layers.basic import Dense, Embed, LayerNorm
from t5x_ssm.layers.positions import LearnedPositions
from t5x_ssm.models.mixers import DEFAULT_MIXERS
from t5x_ssm.models.stack import Context, Factory, Mode, Stack, refuse_batch_norm, shared_settings
from t5x_ssm.parallel.shard import constrain

Array = jax.Array


class Decoder(nn.Module):
    """Embedding, stack, final norm, logits.

    Attributes:
      vocab_size: size of the vocabulary, special ids included.
      embed_dim: width of the residual stream.
      pattern, num_layers: the layers, see `models.pattern`.
      mixers: from the pattern's names to mixer factories; names that are missing here are looked up among the defaults.
      mlp: factory of the feed-forward block for mixers that have one.
      norm: factory of the norms.
      pre_norm, dropout_rate, remat_policy, scan_layers: see `models.stack.Stack`.
      embed_dropout_rate: on the embedded tokens.
      embed_dropout_per_token: each token has a mask of its own, as in GPT-2 and H3; otherwise a text has one, as in T5.
      learned_positions: how many learned absolute positions there are, or None for none.
      shared_bias: factory (of `layers.positions.RelativeBias`) of a relative bias that all layers with
        `Attention.shared_bias` share, or None.
      embed_init_scale: standard deviation of the initial embedding.
      logits_via_embedding: tie the output projection to the embedding.
      dtype: of activations and projections; logits, norm statistics and state spaces are float32.
    """

    vocab_size: int
    embed_dim: int
    pattern: str = "gss"
    num_layers: int | None = None
    mixers: Mapping[str, Factory] = FrozenDict()
    mlp: Factory | None = None
    norm: Factory = LayerNorm
    pre_norm: bool = True
    dropout_rate: float = 0.0
    embed_dropout_rate: float = 0.0
    embed_dropout_per_token: bool = False
    embed_init_scale: float = 0.02
    learned_positions: int | None = None
    shared_bias: Factory | None = None
    logits_via_embedding: bool = True
    remat_policy: str = "none"
    scan_layers: bool = True
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(
        self,
        decoder_input_tokens: Array,
        decoder_target_tokens: Array,
        decoder_segment_ids: Array | None = None,
        decoder_positions: Array | None = None,
        decoder_causal_attention: Array | None = None,
        *,
        enable_dropout: bool = True,
        decode: bool = False,
        max_decode_length: int | None = None,
        prefill: bool = False,
        prefill_lengths: Array | None = None,
    ) -> Array:
        """Logits of the next token at every position.

        Args:
          decoder_input_tokens: int [B, L], the targets shifted right.
          decoder_target_tokens: int [B, L]; only their shape matters here.
          decoder_segment_ids: int [B, L], documents packed into a row; 0 is padding.
          decoder_positions: int [B, L], positions within the documents.
          decoder_causal_attention: marks a prefix as T5X does; the prefix is causal here all the same.
          enable_dropout: whether dropout acts; needs the `dropout` rng.
          decode, prefill, prefill_lengths: the cache protocol, see `layers.mixer`.
          max_decode_length: T5X's argument; the cache's own length decides.

        Returns:
          float32 [B, L, vocab_size].
        """
        del decoder_causal_attention, max_decode_length
        refuse_batch_norm(self.norm)
        dropout = nn.Dropout(self.embed_dropout_rate, broadcast_dims=() if self.embed_dropout_per_token else (-2,))
        embed = Embed(self.vocab_size, self.embed_dim, self.embed_init_scale, self.dtype, name="token_embedder")
        x = embed(decoder_input_tokens)
        if self.learned_positions is not None:
            embed_positions = LearnedPositions(
                self.learned_positions, self.embed_init_scale, self.scan_layers, name="position_embedder"
            )
            cached = {"decode": decode, "prefill": prefill, "prefill_lengths": prefill_lengths}
            x = embed_positions(x, decoder_positions, **cached)
        x = dropout(x, deterministic=not enable_dropout)
        x = constrain(x, ("batch", "length", "embed"))

        context = Context(
            segment_ids=decoder_segment_ids,
            positions=decoder_positions,
            bias_table=None if self.shared_bias is None else self.shared_bias(name="relative_bias")(),
            prefill_lengths=prefill_lengths,
        )
        x = Stack(
            pattern=self.pattern,
            mixers={**DEFAULT_MIXERS, **self.mixers},
            num_layers=self.num_layers,
            **shared_settings(self),
            name="decoder",
        )(x, context, Mode(enable_dropout, decode, prefill))

        if self.pre_norm:
            x = self.norm(dtype=self.dtype, name="final_norm")(x)
        if self.logits_via_embedding:
            logits = embed.attend(x)
        else:
            logits = Dense(self.vocab_size, ("embed", "vocab"), dtype=self.dtype, name="logits")(x).astype(jnp.float32)
        return constrain(logits, ("batch", "length", "vocab"))
