"""Classifiers: pooling by hand, masked positions, the retrieval features, batch norms in a scanned stack."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest
from tiny import jit, key, random_parameters, shapes

from t5x_ssm.errors import UserError
from t5x_ssm.layers.attention import Attention
from t5x_ssm.layers.batch_norm import BatchNorm
from t5x_ssm.models.classifier import Classifier, RetrievalClassifier, SequenceEncoder, pool

encoder = functools.partial(
    SequenceEncoder,
    embed_dim=8,
    pattern="attn",
    num_layers=2,
    mixers={"attn": functools.partial(Attention, num_heads=2, causal=False, feed_forward=False)},
)
FEATURES = np.random.default_rng(0).normal(size=(2, 6, 3)).astype(np.float32)
MASK = np.array([[1, 1, 1, 1, 0, 0], [1] * 6])


def test_pooling_by_hand():
    x = np.arange(12.0).reshape(2, 3, 2)
    mask = np.array([[1, 1, 0], [0, 1, 1]])
    np.testing.assert_allclose(pool(x, mask, "mean"), [[1, 2], [9, 10]])
    np.testing.assert_allclose(pool(x, mask, "last"), [[2, 3], [10, 11]])
    np.testing.assert_allclose(pool(x, mask, "first"), [[0, 1], [8, 9]])
    np.testing.assert_allclose(pool(x, None, "last"), [[4, 5], [10, 11]])


@pytest.mark.parametrize("pooling", ["mean", "last"])
def test_padding_changes_nothing(pooling):
    net = Classifier(5, functools.partial(encoder, pooling=pooling))
    params = random_parameters(net, FEATURES, MASK)
    run = jit(lambda x, mask: net.apply({"params": params}, x, mask, enable_dropout=False))
    logits = run(np.where(MASK[..., None] > 0, FEATURES, 9.0), MASK)
    assert logits.shape == (2, 5) and logits.dtype == jnp.float32
    alone = run(FEATURES[:1, :4], MASK[:1, :4])
    np.testing.assert_allclose(logits[:1], alone, rtol=1e-4, atol=1e-5)


def test_a_stack_that_adds_nothing_leaves_encoder_pool_and_head():
    net = Classifier(5, encoder)
    params = random_parameters(net, FEATURES, MASK)
    params["sequence_encoder"]["encoder"] = jax.tree.map(jnp.zeros_like, params["sequence_encoder"]["encoder"])
    logits = net.apply({"params": params}, FEATURES, MASK, enable_dropout=False)
    p = oracles.numpy_tree(params)
    x = oracles.dense(p["sequence_encoder"]["input"], np.float64(FEATURES))
    mean = np.stack([x[0, :4].mean(0), x[1].mean(0)])
    np.testing.assert_allclose(logits, oracles.dense(p["classes"], mean), rtol=1e-5, atol=1e-6)


def test_retrieval_compares_two_documents():
    net = RetrievalClassifier(2, functools.partial(encoder, vocab_size=7), hidden=16)
    tokens = np.random.default_rng(1).integers(0, 7, (3, 2, 5))
    mask = np.ones_like(tokens)
    params = random_parameters(net, tokens, mask)
    logits = jit(lambda: net.apply({"params": params}, tokens, mask, enable_dropout=False))()
    single = SequenceEncoder(**encoder.keywords, vocab_size=7)
    vector = lambda t: np.float64(
        single.apply({"params": params["sequence_encoder"]}, t, jnp.ones_like(t), enable_dropout=False)
    )
    a, b = vector(tokens[:, 0]), vector(tokens[:, 1])
    p = oracles.numpy_tree(params)
    hidden = oracles.gelu_tanh(oracles.dense(p["hidden"], np.concatenate([a, b, a - b, a * b], -1)))
    np.testing.assert_allclose(logits, oracles.dense(p["classes"], hidden), rtol=1e-4, atol=1e-5)


def test_batch_norms_of_a_scanned_stack_have_averages_of_their_own():
    net = Classifier(5, functools.partial(encoder, norm=BatchNorm))
    variables = net.init({"params": key()}, FEATURES, MASK, enable_dropout=False)
    _, updated = net.apply(
        variables, FEATURES, MASK, enable_dropout=True, mutable=["batch_stats"], rngs={"dropout": key()}
    )
    means = updated["batch_stats"]["sequence_encoder"]["encoder"]["segment_0"]["block_0"]["mixer_norm"]["mean"]
    assert means.shape == (2, 8)
    p = oracles.numpy_tree(variables["params"])
    x = oracles.dense(p["sequence_encoder"]["input"], np.float64(FEATURES))
    np.testing.assert_allclose(means[0], 0.05 * x[MASK > 0].mean(0), rtol=1e-4, atol=1e-6)
    assert np.abs(means[0] - means[1]).max() > 1e-4


def test_refusals_name_the_setting():
    tokens = np.ones((2, 5), np.int32)
    for net, inputs, message in [
        (Classifier(2, encoder), tokens, "vocab_size"),
        (Classifier(2, functools.partial(encoder, vocab_size=7)), FEATURES, "vocab_size"),
        (Classifier(2, functools.partial(encoder, pooling="max")), FEATURES, "mean, last, first"),
        (RetrievalClassifier(2, functools.partial(encoder, vocab_size=7)), tokens, "pair"),
    ]:
        with pytest.raises(UserError, match=message):
            shapes(net, inputs)
