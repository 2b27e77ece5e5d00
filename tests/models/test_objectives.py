"""Losses against closed forms."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from tiny import jit, key

from t5x_ssm.models.objectives import LanguageModel, cross_entropy


def test_cross_entropy_by_definition():
    random = np.random.default_rng(0)
    logits, targets = 3 * random.normal(size=(2, 5, 7)), random.integers(0, 7, (2, 5))
    z, s = 0.01, 0.1
    loss, nats, z_term = cross_entropy(
        jnp.asarray(logits, jnp.float32), jnp.asarray(targets), z_loss=z, label_smoothing=s
    )
    log_z = np.log(np.exp(logits).sum(-1))
    log_p = logits - log_z[..., None]
    smooth = np.where(np.eye(7)[targets] > 0, 1 - s, s / 6)
    np.testing.assert_allclose(nats, -np.take_along_axis(log_p, targets[..., None], -1)[..., 0], rtol=1e-5)
    np.testing.assert_allclose(z_term, z * log_z**2, rtol=1e-5)
    kl = (smooth * (np.log(smooth) - log_p)).sum(-1)
    np.testing.assert_allclose(loss, kl + z * log_z**2, rtol=1e-4, atol=1e-5)


def test_logits_in_bfloat16_are_summed_in_float32():
    logits = jnp.zeros((1, 40_000), jnp.bfloat16)
    _, nats, _ = cross_entropy(logits, jnp.zeros((1,), jnp.int32))
    assert nats.dtype == jnp.float32
    np.testing.assert_allclose(nats, np.log(40_000), rtol=1e-5)


class Table(nn.Module):
    """Logits looked up by input token, plus what the packing arguments add."""

    @nn.compact
    def __call__(self, inputs, targets, decoder_segment_ids=None, decoder_positions=None, *, enable_dropout=True):
        table = self.param("table", nn.initializers.constant(jnp.arange(25.0).reshape(5, 5) % 7), (5, 5))
        logits = table[inputs]
        for extra in (decoder_segment_ids, decoder_positions):
            if extra is not None:
                logits = logits * (1 + extra[..., None])
        return nn.Dropout(0.5)(logits, deterministic=not enable_dropout)


def batch(packed=False):
    random = np.random.default_rng(0)
    out = {
        name: jnp.asarray(random.integers(0, 5, (4, 6)), jnp.int32)
        for name in ("decoder_input_tokens", "decoder_target_tokens")
    }
    out["decoder_loss_weights"] = jnp.asarray(random.integers(0, 3, (4, 6)), jnp.int32)
    if packed:
        out["decoder_segment_ids"] = out["decoder_positions"] = jnp.ones((4, 6), jnp.int32)
    return out


@pytest.mark.parametrize("packed", [False, True])
def test_language_model_sums_over_weighted_tokens(packed):
    objective = LanguageModel(Table(), z_loss=0.1)
    examples = batch(packed)
    params = objective.init(key(), jax.eval_shape(lambda: examples))["params"]
    loss_sums = jit(objective.loss_sums)
    loss, sums = loss_sums(params, examples)
    logits = np.asarray(params["table"], np.float64)[np.asarray(examples["decoder_input_tokens"])] * (
        4 if packed else 1
    )
    weights = np.asarray(examples["decoder_loss_weights"], np.float64)
    targets = np.asarray(examples["decoder_target_tokens"])
    log_z = np.log(np.exp(logits).sum(-1))
    nats = log_z - np.take_along_axis(logits, targets[..., None], -1)[..., 0]
    expected = {
        "nats": (nats * weights).sum(),
        "z_loss": (0.1 * log_z**2 * weights).sum(),
        "correct": ((logits.argmax(-1) == targets) * weights).sum(),
        "weights": weights.sum(),
    }
    expected["loss"] = expected["nats"] + expected["z_loss"]
    assert {k: v.dtype for k, v in sums.items()} == dict.fromkeys(expected, jnp.float32)
    for name, value in expected.items():
        np.testing.assert_allclose(sums[name], value, rtol=1e-5, err_msg=name)
    assert loss == sums["loss"]
    # Any two parts of a batch add up to the whole.
    parts = [
        loss_sums(params, {k: jnp.where(mine, v, 0) for k, v in examples.items()})[1]
        for mine in (jnp.arange(4)[:, None] < 1, jnp.arange(4)[:, None] >= 1)
    ]
    for name in sums:
        np.testing.assert_allclose(sums[name], parts[0][name] + parts[1][name], rtol=1e-5)


def test_dropout_acts_when_a_key_is_given():
    objective = LanguageModel(Table())
    params = {"table": jnp.ones((5, 5)).at[:, 0].set(3.0)}
    loss = jit(lambda dropout_key: objective.loss_sums(params, batch(), dropout_key)[0])
    still, drawn = [loss(None) for _ in range(2)], [loss(key(i)) for i in range(2)]
    assert still[0] == still[1] != drawn[0] != drawn[1]
