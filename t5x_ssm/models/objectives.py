"""What a network is trained for: sums of losses over tokens, from a batch with the names of seqio's feature converters."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

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
