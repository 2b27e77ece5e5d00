"""Encoder-decoder over any patterns of mixers, under the call signature that T5X's EncoderDecoderModel expects.

SPADE's own is `encoder_pattern="spade swa*11"` with a bidirectional state space, and `decoder_pattern="attn"`.
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax.core import FrozenDict

from t5x_ssm.layers.attention import Attention
from t5x_ssm.layers.basic import Dense, Embed, LayerNorm
from t5x_ssm.layers.positions import LearnedPositions
from t5x_ssm.models.mixers import DEFAULT_MIXERS
from t5x_ssm.models.stack import Context, Factory, Mode, Stack, refuse_batch_norm, shared_settings
from t5x_ssm.parallel.shard import constrain

Array = jax.Array


def cross_attention(**fields: Any) -> nn.Module:
    """Attention of a decoder's layer to the encoder's output, with the settings of `layers.attention.Attention`."""
    return Attention(**{"cross": True, "causal": False} | fields)


class EncoderDecoder(nn.Module):
    """Shared embedding, encoder stack, decoder stack with cross-attention in every layer, logits.

    The vocabulary's id 0 is padding in the encoder's input, as in T5X.

    Attributes:
      vocab_size: size of the vocabulary, special ids included.
      embed_dim: width of both residual streams.
      encoder_pattern, encoder_layers, decoder_pattern, decoder_layers: see `models.pattern`.
      encoder_mixers, decoder_mixers: from the patterns' names to mixer factories; the defaults are for decoders, so an
        encoder's have to be given with `causal=False` or `bidirectional=True`.
      cross: factory of the cross-attention.
      mlp, norm, pre_norm, dropout_rate, remat_policy, scan_layers: see `models.stack.Stack`; of both stacks.
      embed_norm: factory of a norm after each embedding, or None.
      embed_dropout_rate: on the embedded tokens.
      encoder_positions, decoder_positions: how many learned absolute positions there are, or None for none.
      encoder_shared_bias, decoder_shared_bias: factories (of `layers.positions.RelativeBias`) of a relative bias that all
        layers of a stack with `Attention.shared_bias` share, or None.
      logits_via_embedding: tie the output projection to the embedding.
      logits_scale: factor on the decoder's output before tied logits; T5 has embed_dim ** -0.5.
      dtype: of activations and projections; logits, norm statistics and state spaces are float32.
    """

    vocab_size: int
    embed_dim: int
    encoder_pattern: str
    decoder_pattern: str = "attn"
    encoder_layers: int | None = None
    decoder_layers: int | None = None
    encoder_mixers: Mapping[str, Factory] = FrozenDict()
    decoder_mixers: Mapping[str, Factory] = FrozenDict()
    cross: Factory = cross_attention
    mlp: Factory | None = None
    norm: Factory = LayerNorm
    pre_norm: bool = True
    embed_norm: Factory | None = None
    dropout_rate: float = 0.0
    embed_dropout_rate: float = 0.0
    embed_init_scale: float = 0.02
    encoder_positions: int | None = None
    decoder_positions: int | None = None
    encoder_shared_bias: Factory | None = None
    decoder_shared_bias: Factory | None = None
    logits_via_embedding: bool = True
    logits_scale: float = 1.0
    remat_policy: str = "none"
    scan_layers: bool = True
    dtype: Any = jnp.float32

    def setup(self):
        refuse_batch_norm(self.norm)
        self.token_embedder = Embed(self.vocab_size, self.embed_dim, self.embed_init_scale, self.dtype)
        self.embed_dropout = nn.Dropout(self.embed_dropout_rate, broadcast_dims=(-2,))
        self.encoder = self._stack(self.encoder_pattern, self.encoder_layers, self.encoder_mixers)
        self.decoder = self._stack(self.decoder_pattern, self.decoder_layers, self.decoder_mixers, self.cross)
        for side in ("encoder", "decoder"):
            count, bias = getattr(self, f"{side}_positions"), getattr(self, f"{side}_shared_bias")
            if count is not None:
                positions = LearnedPositions(count, self.embed_init_scale, layers_first=self.scan_layers)
                setattr(self, f"{side}_position_embedder", positions)
            if bias is not None:
                setattr(self, f"{side}_bias", bias())
            if self.embed_norm is not None:
                setattr(self, f"{side}_embed_norm", self.embed_norm(dtype=self.dtype))
            if self.pre_norm:
                setattr(self, f"{side}_norm", self.norm(dtype=self.dtype))
        if not self.logits_via_embedding:
            self.logits = Dense(self.vocab_size, ("embed", "vocab"), dtype=self.dtype)

    def _stack(self, pattern, layers, mixers, cross=None):
        return Stack(
            pattern=pattern,
            mixers={**DEFAULT_MIXERS, **mixers},
            num_layers=layers,
            cross=cross,
            **shared_settings(self),
        )

    def _embed(self, side: str, tokens: Array, positions: Array | None, enable_dropout: bool, **cached) -> Array:
        x = self.token_embedder(tokens)
        if getattr(self, f"{side}_positions") is not None:
            x = getattr(self, f"{side}_position_embedder")(x, positions, **cached)
        if self.embed_norm is not None:
            x = getattr(self, f"{side}_embed_norm")(x)
        x = self.embed_dropout(x, deterministic=not enable_dropout)
        return constrain(x, ("batch", "length", "embed"))

    def _run(self, side: str, x: Array, context: Context, mode: Mode) -> Array:
        if getattr(self, f"{side}_shared_bias") is not None:
            context = context.replace(bias_table=getattr(self, f"{side}_bias")())
        x = getattr(self, side)(x, context, mode)
        return getattr(self, f"{side}_norm")(x) if self.pre_norm else x

    def encode(
        self,
        encoder_input_tokens: Array,
        encoder_segment_ids: Array | None = None,
        encoder_positions: Array | None = None,
        enable_dropout: bool = True,
    ) -> Array:
        """The encoder's output [B, S, D] for int tokens [B, S]; ids of 0 are padding, seen by nobody."""
        x = self._embed("encoder", encoder_input_tokens, encoder_positions, enable_dropout)
        context = Context(
            segment_ids=encoder_segment_ids,
            positions=encoder_positions,
            padding_mask=(encoder_input_tokens > 0).astype(jnp.int32),
        )
        return self._run("encoder", x, context, Mode(enable_dropout))

    def decode(
        self,
        encoded: Array | None,
        encoder_input_tokens: Array,
        decoder_input_tokens: Array,
        decoder_target_tokens: Array,
        encoder_segment_ids: Array | None = None,
        decoder_segment_ids: Array | None = None,
        decoder_positions: Array | None = None,
        *,
        enable_dropout: bool = True,
        decode: bool = False,
        max_decode_length: int | None = None,
        prefill: bool = False,
        prefill_lengths: Array | None = None,
    ) -> Array:
        """Logits float32 [B, L, vocab_size] of the next token; arguments as in `models.decoder.Decoder`.

        Args:
          encoded: [B, S, D], what `encode` gave; None with the collection `layers.attention.ENCODED`, which a call that may write
            it makes of `encoded`.
          encoder_input_tokens: int [B, S], for its padding.
        """
        del decoder_target_tokens, max_decode_length
        cached = {"decode": decode, "prefill": prefill, "prefill_lengths": prefill_lengths}
        x = self._embed("decoder", decoder_input_tokens, decoder_positions, enable_dropout, **cached)
        context = Context(
            segment_ids=decoder_segment_ids,
            positions=decoder_positions,
            encoded=encoded,
            encoded_mask=(encoder_input_tokens > 0).astype(jnp.int32),
            encoded_segment_ids=encoder_segment_ids,
            prefill_lengths=prefill_lengths,
        )
        x = self._run("decoder", x, context, Mode(enable_dropout, decode, prefill))
        if self.logits_via_embedding:
            logits = self.token_embedder.attend(x * self.logits_scale)
        else:
            logits = self.logits(x).astype(jnp.float32)
        return constrain(logits, ("batch", "length", "vocab"))

    def __call__(
        self,
        encoder_input_tokens: Array,
        decoder_input_tokens: Array,
        decoder_target_tokens: Array,
        encoder_segment_ids: Array | None = None,
        decoder_segment_ids: Array | None = None,
        encoder_positions: Array | None = None,
        decoder_positions: Array | None = None,
        *,
        enable_dropout: bool = True,
        decode: bool = False,
        max_decode_length: int | None = None,
    ) -> Array:
        """Logits float32 [B, L, vocab_size] of the next target token at every position."""
        encoded = self.encode(encoder_input_tokens, encoder_segment_ids, encoder_positions, enable_dropout)
        return self.decode(
            encoded,
            encoder_input_tokens,
            decoder_input_tokens,
            decoder_target_tokens,
            encoder_segment_ids,
            decoder_segment_ids,
            decoder_positions,
            enable_dropout=enable_dropout,
            decode=decode,
            max_decode_length=max_decode_length,
        )
