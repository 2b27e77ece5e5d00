"""Softmax regression on token embeddings, with the parameter names of a small state-space network.

Small enough that its gradient is a line of numpy, and shaped like the real thing: `init` and `loss_sums`.
"""

import jax
import jax.numpy as jnp
import numpy as np

VOCABULARY = 7


class ToyObjective:
    """logits = kernel of the input token's feature + bias; features are fixed one-hot codes times `gain`."""

    loss_weights = "decoder_loss_weights"

    def init(self, rng, batch_shapes=None):
        del batch_shapes
        kernel = jax.random.normal(rng, (VOCABULARY, VOCABULARY))
        return {"params": {"gain": jnp.float32(1.5), "out": {"kernel": kernel, "bias": jnp.zeros((VOCABULARY,))}}}

    def loss_sums(self, params, batch, dropout_rng=None):
        """Cross-entropy; `features` in the batch, if any, multiply the codes (so that a NaN can come in)."""
        codes = jax.nn.one_hot(batch["decoder_input_tokens"], VOCABULARY) * params["gain"]
        if "features" in batch:
            codes = codes * batch["features"][..., None]
        logits = codes @ params["out"]["kernel"] + params["out"]["bias"]
        targets = batch["decoder_target_tokens"]
        weights = batch["decoder_loss_weights"].astype(jnp.float32)
        picked = jnp.take_along_axis(jax.nn.log_softmax(logits), targets[..., None], axis=-1)[..., 0]
        nats = -jnp.sum(picked * weights)
        sums = {
            "loss": nats,
            "nats": nats,
            "correct": jnp.sum((jnp.argmax(logits, axis=-1) == targets) * weights),
            "weights": jnp.sum(weights),
        }
        if dropout_rng is not None:
            sums["draw"] = jax.random.uniform(dropout_rng)
        return nats, sums


def toy_batch(seed=0, rows=8, length=5):
    """Rows with very different numbers of weighted tokens; row 1 of every four has none."""
    random = np.random.default_rng(seed)
    weights = random.integers(0, 2, (rows, length)) * random.integers(1, 4, (rows, 1))
    weights[1::4] = 0
    return {
        "decoder_input_tokens": random.integers(0, VOCABULARY, (rows, length)).astype(np.int32),
        "decoder_target_tokens": random.integers(0, VOCABULARY, (rows, length)).astype(np.int32),
        "decoder_loss_weights": weights.astype(np.float32),
    }


def toy_gradient(params, batch):
    """(mean loss, gradient) in float64 numpy, by the closed form of softmax regression."""
    kernel = np.asarray(params["out"]["kernel"], np.float64)
    bias = np.asarray(params["out"]["bias"], np.float64)
    gain = float(params["gain"])
    codes = np.eye(VOCABULARY)[batch["decoder_input_tokens"]].reshape(-1, VOCABULARY)
    targets = batch["decoder_target_tokens"].reshape(-1)
    weights = batch["decoder_loss_weights"].reshape(-1).astype(np.float64)
    logits = gain * codes @ kernel + bias
    probabilities = np.exp(logits - logits.max(-1, keepdims=True))
    probabilities /= probabilities.sum(-1, keepdims=True)
    loss = -np.sum(np.log(probabilities[np.arange(len(targets)), targets]) * weights) / weights.sum()
    residual = (probabilities - np.eye(VOCABULARY)[targets]) * weights[:, None] / weights.sum()
    gradient = {
        "gain": np.sum(residual * (codes @ kernel)),
        "out": {"kernel": gain * codes.T @ residual, "bias": residual.sum(0)},
    }
    return loss, gradient
