"""What a network is trained for: sums of losses over tokens or examples.

Batches of texts have the names of seqio's feature converters, those of classified sequences the ones of `Classification`.
"""

import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import linen as nn

from t5x_ssm.errors import UserError

Array = jax.Array
Batch = dict[str, Array]


def cross_entropy(logits: Array, targets: Array, *, z_loss: float = 0.0, label_smoothing: float = 0.0):
    """Per-token losses in nats.

    Args:
      logits: float32 [..., V].
      targets: int [...].
      z_loss: coefficient of log(Z)^2, which keeps the softmax normalizer near 1 (Chowdhery et al. 2022).
      label_smoothing: probability mass moved from the target to all other ids alike. The constant entropy of the smoothed
        target is subtracted, so that a perfect prediction costs 0.

    Returns:
      (loss, nats, z): loss is what is differentiated, nats the plain cross-entropy, z the z-loss term; each [...].
    """
    logits = logits.astype(jnp.float32)
    log_z = jax.nn.logsumexp(logits, axis=-1)
    target_logits = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
    nats = log_z - target_logits
    loss = nats
    if label_smoothing:
        vocab = logits.shape[-1]
        confidence, low = 1.0 - label_smoothing, label_smoothing / (vocab - 1)
        entropy = -(confidence * jnp.log(confidence) + (vocab - 1) * low * jnp.log(low))
        everything = vocab * log_z - jnp.sum(logits, axis=-1)
        loss = (confidence - low) * nats + low * everything - entropy
    z = z_loss * jnp.square(log_z)
    return loss + z, nats, z


@dataclasses.dataclass(frozen=True)
class _TokenObjective:
    """Prediction of target tokens; what the objectives below share.

    Attributes:
      network: the module.
      z_loss, label_smoothing: see `cross_entropy`.
    """

    network: nn.Module
    z_loss: float = 0.0
    label_smoothing: float = 0.0
    loss_weights: ClassVar[str] = "decoder_loss_weights"

    def logits(self, params: Any, batch: Batch, dropout_rng: Array | None = None) -> Array:
        """float32 logits [B, L, V]; dropout acts when a dropout rng is given."""
        raise NotImplementedError

    def loss_sums(self, params: Any, batch: Batch, dropout_rng: Array | None = None) -> tuple[Array, dict[str, Array]]:
        """Loss of a batch as sums over its real tokens.

        Returns:
          (loss, sums), all float32 scalars; sums has `loss`, `nats`, `z_loss`, `correct` and `weights` (the number of
          real target tokens), so that any two parts of a batch add up to the whole.
        """
        targets = batch["decoder_target_tokens"]
        weights = batch["decoder_loss_weights"].astype(jnp.float32)
        logits = self.logits(params, batch, dropout_rng)
        loss, nats, z = cross_entropy(logits, targets, z_loss=self.z_loss, label_smoothing=self.label_smoothing)
        correct = (jnp.argmax(logits, axis=-1) == targets).astype(jnp.float32)
        sums = {
            "loss": jnp.sum(loss * weights),
            "nats": jnp.sum(nats * weights),
            "z_loss": jnp.sum(z * weights),
            "correct": jnp.sum(correct * weights),
            "weights": jnp.sum(weights),
        }
        return sums["loss"], sums

    def _apply(
        self, params: Any, inputs: tuple[Array, ...], batch: Batch, names: tuple[str, ...], dropout_rng
    ) -> Array:
        return self.network.apply(
            {"params": params},
            *inputs,
            **{name: batch.get(name) for name in names},
            enable_dropout=dropout_rng is not None,
            rngs=None if dropout_rng is None else {"dropout": dropout_rng},
        )


class LanguageModel(_TokenObjective):
    """Next-token prediction with a decoder-only network, under T5X's decoder-only signature."""

    def init(self, rng: Array, batch_shapes: dict[str, jax.ShapeDtypeStruct]) -> Any:
        """Variables of the network (collections `params` and `params_axes`) for a batch of these shapes."""
        shape = batch_shapes["decoder_input_tokens"].shape
        tokens = jnp.ones(shape, jnp.int32)
        return self.network.init(rng, tokens, tokens, enable_dropout=False)

    def logits(self, params: Any, batch: Batch, dropout_rng: Array | None = None) -> Array:
        tokens = batch["decoder_input_tokens"], batch["decoder_target_tokens"]
        return self._apply(params, tokens, batch, ("decoder_segment_ids", "decoder_positions"), dropout_rng)


class SequenceToSequence(_TokenObjective):
    """Prediction of a target text from an input text with an encoder-decoder, under T5X's signature of one."""

    def init(self, rng: Array, batch_shapes: dict[str, jax.ShapeDtypeStruct]) -> Any:
        """Variables of the network (collections `params` and `params_axes`) for a batch of these shapes."""
        source, target = (
            jnp.ones(batch_shapes[name].shape, jnp.int32) for name in ("encoder_input_tokens", "decoder_input_tokens")
        )
        return self.network.init(rng, source, target, target, enable_dropout=False)

    def logits(self, params: Any, batch: Batch, dropout_rng: Array | None = None) -> Array:
        tokens = batch["encoder_input_tokens"], batch["decoder_input_tokens"], batch["decoder_target_tokens"]
        names = ("encoder_segment_ids", "decoder_segment_ids", "encoder_positions", "decoder_positions")
        return self._apply(params, tokens, batch, names, dropout_rng)


@dataclasses.dataclass(frozen=True)
class Classification:
    """Prediction of one class for a sequence, or for a pair of sequences.

    A batch has `inputs`, int [B, L] (of pairs [B, 2, L]); `input_lengths` [B] ([B, 2]), how many of them are real;
    `targets` [B], class ids; and `weights` [B], 0 for rows that only fill a batch.

    Attributes:
      network: a `models.classifier` network.
      label_smoothing: see `cross_entropy`.
      feature_scale, feature_offset: for a network of features (its `vocab_size` is None): position l has the single
        feature scale * inputs[l] + offset. Pixels of 0…255 at 2 / 255 and -1 lie in [-1, 1]. None for one of tokens.
    """

    network: nn.Module
    label_smoothing: float = 0.0
    feature_scale: float | None = None
    feature_offset: float = 0.0
    loss_weights: ClassVar[str] = "weights"

    def init(self, rng: Array, batch_shapes: dict[str, jax.ShapeDtypeStruct]) -> Any:
        """Variables of the network (`params`, `params_axes`, and `batch_stats` if it has batch norms)."""
        inputs = self._inputs(jnp.zeros(batch_shapes["inputs"].shape, jnp.int32))
        return self.network.init(rng, inputs, enable_dropout=False)

    def loss_sums(self, params: Any, batch: Batch, dropout_rng: Array | None = None) -> tuple[Array, dict[str, Array]]:
        """Loss of a batch as sums over its examples, for networks without batch norms.

        Returns:
          (loss, sums), all float32 scalars; sums has `loss` (nats, with smoothing), `correct`, `weights` (the number of real
          examples) and `tokens` (the number of real positions).
        """
        loss, sums, _ = self.mutable_loss_sums(params, {}, batch, dropout_rng)
        return loss, sums

    def mutable_loss_sums(
        self, params: Any, flax_mutables: dict[str, Any], batch: Batch, dropout_rng: Array | None = None
    ) -> tuple[Array, dict[str, Array], dict[str, Any]]:
        """As `loss_sums`, and the mutables after the batch.

        A dropout rng makes it training: batch norms use the batch and update their running averages. Without one they use
        those averages and leave them.
        """
        training = dropout_rng is not None
        inputs, targets = batch["inputs"], batch["targets"]
        mask = jnp.arange(inputs.shape[-1]) < batch["input_lengths"][..., None]
        logits, updated = self.network.apply(
            {"params": params, **flax_mutables},
            self._inputs(inputs),
            mask,
            enable_dropout=training,
            rngs={"dropout": dropout_rng} if training else None,
            mutable=list(flax_mutables) if training else [],
        )
        weights = batch["weights"].astype(jnp.float32)
        loss, _, _ = cross_entropy(logits, targets, label_smoothing=self.label_smoothing)
        correct = (jnp.argmax(logits, axis=-1) == targets).astype(jnp.float32)
        sums = {
            "loss": jnp.sum(loss * weights),
            "correct": jnp.sum(correct * weights),
            "weights": jnp.sum(weights),
            "tokens": jnp.sum(batch["input_lengths"]).astype(jnp.float32),
        }
        return sums["loss"], sums, updated if training else flax_mutables

    def _inputs(self, inputs: Array) -> Array:
        """Tokens as they are, or features [..., L, 1]."""
        if (self.feature_scale is None) != (self.network.vocab_size is not None):
            raise UserError(
                f"Classification.feature_scale = {self.feature_scale}, but the network's vocab_size = "
                f"{self.network.vocab_size}: a network of tokens has a vocabulary, one of features a scale."
            )
        if self.feature_scale is None:
            return inputs
        return (self.feature_scale * inputs.astype(jnp.float32) + self.feature_offset)[..., None]
