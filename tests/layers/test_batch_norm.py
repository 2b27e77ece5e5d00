"""Batch norm against float64 statistics of the real positions."""

import jax.numpy as jnp
import numpy as np
import pytest

from t5x_ssm.errors import UserError
from t5x_ssm.layers.batch_norm import BatchNorm
from t5x_ssm.models.decoder import Decoder


def test_statistics_of_real_positions_and_their_running_average():
    random = np.random.default_rng(0)
    x = random.normal(2, 3, size=(3, 5, 4)).astype(np.float32)
    mask = np.array([[1, 1, 1, 0, 0], [1] * 5, [1, 0, 0, 0, 0]])
    scale, bias = random.normal(size=(2, 4)).astype(np.float32)
    layer = BatchNorm(momentum=0.9, epsilon=1e-3)
    variables = {
        "params": {"scale": jnp.asarray(scale), "bias": jnp.asarray(bias)},
        "batch_stats": {"mean": jnp.full(4, 0.5), "var": jnp.full(4, 2.0)},
    }
    y, updated = layer.apply(variables, x, mask=mask, training=True, mutable=["batch_stats"])
    real = np.float64(x)[mask > 0]
    mean, var = real.mean(0), real.var(0)
    expected = (np.float64(x) - mean) / np.sqrt(var + 1e-3) * scale + bias
    np.testing.assert_allclose(y, expected, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(updated["batch_stats"]["mean"], 0.9 * 0.5 + 0.1 * mean, rtol=1e-5)
    np.testing.assert_allclose(updated["batch_stats"]["var"], 0.9 * 2.0 + 0.1 * var, rtol=1e-5)

    still = layer.apply(variables, x, mask=mask, training=False)
    np.testing.assert_allclose(still, (x - 0.5) / np.sqrt(2.0 + 1e-3) * scale + bias, rtol=1e-5, atol=1e-5)
    # The public S5's own momentum and epsilon, the latter where it is a large part of the variance.
    small = np.float32(1e-3) * x
    y, updated = BatchNorm().apply(variables, small, mask=mask, training=True, mutable=["batch_stats"])
    np.testing.assert_allclose(updated["batch_stats"]["mean"], 0.95 * 0.5 + 0.05 * 1e-3 * mean, rtol=1e-5)
    expected_small = (np.float64(small) - 1e-3 * mean) / np.sqrt(1e-6 * var + 1e-5) * scale + bias
    np.testing.assert_allclose(y, expected_small, rtol=1e-5, atol=1e-5)
    # Where the averages cannot be written, training still normalizes by the batch.
    np.testing.assert_allclose(layer.apply(variables, x, mask=mask, training=True), expected, rtol=1e-5, atol=1e-5)


def test_a_language_model_refuses_it():
    tokens = np.ones((1, 4), np.int32)
    with pytest.raises(UserError, match="BatchNorm sees later tokens"):
        Decoder(vocab_size=5, embed_dim=8, norm=BatchNorm).init({}, tokens, tokens, enable_dropout=False)
