"""Scores against the softmax of the full forward pass, worked out in NumPy."""

import functools

import jax
import numpy as np
import pytest
import scipy.special
import tiny

from t5x_ssm.errors import UserError
from t5x_ssm.inference.scoring import DocumentScorer, score_batch
from t5x_ssm.layers.attention import Attention
from t5x_ssm.layers.basic import MLP
from t5x_ssm.layers.gss import GSS
from t5x_ssm.models.decoder import Decoder
from t5x_ssm.models.objectives import LanguageModel

VOCAB = 12
MIXERS = {
    "gss": functools.partial(GSS, state_size=8),
    "chunk": functools.partial(Attention, span="chunk", window=8, num_heads=2, rotary=True),
    "attn": functools.partial(Attention, span="full", num_heads=2, relative_bias=True),
}
LENGTHS = np.array([37, 16, 5, 0])


@functools.cache
def network(pattern="gss chunk"):
    net = Decoder(vocab_size=VOCAB, embed_dim=8, pattern=pattern, mixers=MIXERS, mlp=functools.partial(MLP, hidden=16))
    tokens = np.zeros((1, 4), np.int32)
    params = tiny.random_parameters(net, tokens, tokens, enable_dropout=False)
    return net, params


@functools.cache
def documents():
    return np.random.default_rng(0).integers(0, VOCAB, (len(LENGTHS), max(LENGTHS)))


def batch_of(tokens, weights):
    inputs = np.concatenate([np.zeros_like(tokens[:, :1]), tokens[:, :-1]], axis=1)
    return {"decoder_input_tokens": inputs, "decoder_target_tokens": tokens, "decoder_loss_weights": weights}


@functools.cache
def full_forward(pattern):
    """(log p of every token, whether it is the likeliest), each [B, L]."""
    net, params = network(pattern)
    batch = batch_of(documents(), None)
    apply = jax.jit(lambda inputs: net.apply({"params": params}, inputs, inputs, enable_dropout=False))
    logits = np.asarray(apply(batch["decoder_input_tokens"]), np.float64)
    log_p = np.take_along_axis(scipy.special.log_softmax(logits, axis=-1), documents()[..., None], axis=-1)[..., 0]
    return log_p, logits.argmax(-1) == documents()


@pytest.mark.slow
def test_score_batch_counts_what_has_weight():
    net, params = network()
    log_p, likeliest = full_forward("gss chunk")
    # Row 0 everything, row 1 after a prompt, row 2 only tokens that are likeliest, row 3 nothing.
    weights = np.zeros(documents().shape, np.int32)
    weights[0] = 1
    weights[1, 10:20] = 1
    weights[2] = likeliest[2]
    assert likeliest[2].any() and not likeliest[1, 10:20].all()
    batch = batch_of(documents(), weights)
    scores = jax.jit(functools.partial(score_batch, LanguageModel(net)))(params, batch)
    np.testing.assert_allclose(scores.log_likelihood, (log_p * weights).sum(1), rtol=1e-5, atol=1e-6)
    assert scores.tokens.tolist() == weights.sum(1).tolist()
    assert scores.greedy.tolist() == [False, False, True, True]


@pytest.mark.slow
@pytest.mark.parametrize("pattern, window", [("gss chunk", 8), ("gss chunk", 13), ("gss attn", 16)])
def test_carried_state_equals_one_forward_pass(pattern, window):
    log_p, likeliest = full_forward(pattern)
    scorer = DocumentScorer(*network(pattern), window=window)
    windows = list(scorer.windows(documents(), LENGTHS))
    assert [nats.shape[1] for nats, _ in windows][:-1] == [window] * (len(windows) - 1)
    nats = np.concatenate([nats for nats, _ in windows], axis=1)
    hits = np.concatenate([hits for _, hits in windows], axis=1)
    real = np.arange(max(LENGTHS)) < LENGTHS[:, None]
    np.testing.assert_allclose(nats, np.where(real, -log_p, 0), rtol=2e-5, atol=2e-5)
    assert hits.tolist() == (likeliest & real).tolist()
    assert scorer.read_window._cache_size() == 1

    first = np.array([30, 0, 5, 0])
    scores = scorer.score(documents(), LENGTHS, first)
    counted = real & (np.arange(max(LENGTHS)) >= first[:, None])
    np.testing.assert_allclose(scores.log_likelihood, np.where(counted, log_p, 0).sum(1), rtol=2e-5, atol=2e-5)
    assert scores.tokens.tolist() == [7, 16, 0, 0]
    assert scores.greedy.tolist() == [bool(np.all(likeliest[b][counted[b]])) for b in range(4)]


def test_memory_does_not_depend_on_the_length():
    net, params = network()
    scorer = DocumentScorer(net, params, window=8)
    long = np.full((1, 3 * 8 + 1), 5)
    seen = []
    for _ in scorer.windows(long):
        # What is alive between windows: parameters, one cache, one window's results.
        seen.append(sum(a.nbytes for a in jax.live_arrays()))
    assert len(seen) == 4 and max(seen) - min(seen[1:]) < 1024


def test_foreign_tokens_are_refused():
    with pytest.raises(UserError, match=f"vocabulary of {VOCAB}"):
        DocumentScorer(*network()).score(np.array([[1, VOCAB]]))
