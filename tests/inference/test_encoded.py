"""Texts of an encoder-decoder against one forward pass a token: greedy decoding, scores, and what padding may not change."""

import functools

import numpy as np
import pytest
import scipy.special
import tiny

from t5x_ssm.errors import UserError
from t5x_ssm.inference.encoded import PairGenerator, PairScorer, padded_to_power
from t5x_ssm.layers.attention import Attention
from t5x_ssm.layers.basic import MLP
from t5x_ssm.models.encoder_decoder import EncoderDecoder

NETWORK = EncoderDecoder(
    vocab_size=11,
    embed_dim=8,
    encoder_pattern="swa",
    decoder_pattern="attn",
    encoder_layers=1,
    decoder_layers=2,
    encoder_mixers={"swa": functools.partial(Attention, num_heads=2, span="sliding", window=3, causal=False)},
    decoder_mixers={"attn": functools.partial(Attention, num_heads=2)},
    cross=functools.partial(Attention, num_heads=2, num_kv_heads=1, cross=True, causal=False),
    mlp=functools.partial(MLP, hidden=8),
    decoder_positions=8,
)
INPUTS = [[3, 4, 5, 6, 7, 1], [9, 1], [8, 1]]
TARGETS = [[2, 3, 1], [5, 1], [7, 4, 10, 6, 1]]


@pytest.fixture(scope="module")
def params():
    tokens = np.ones((1, 4), np.int32)
    params = tiny.random_parameters(NETWORK, tokens, tokens, tokens, enable_dropout=False)
    assert "encoded" not in tiny.shapes(NETWORK, tokens, tokens, tokens, enable_dropout=False)
    # Logits with a spread.
    params["token_embedder"]["embedding"] = 4.0 * params["token_embedder"]["embedding"]
    return params


@pytest.fixture(scope="module")
def log_p(params):
    """log p of the next token after a target's beginning, of one unpadded example and by one forward pass."""
    run = tiny.jit(
        lambda inputs, before: NETWORK.apply({"params": params}, inputs, before, before, enable_dropout=False)
    )

    def next_token(inputs, before):
        padded = np.array([[0, *before, *[0] * (7 - len(before))]])
        logits = np.asarray(run(np.array([inputs]), padded), np.float64)
        return scipy.special.log_softmax(logits[0, len(before)])

    return next_token


def rows(texts, length):
    return np.array([text + [0] * (length - len(text)) for text in texts])


@pytest.mark.slow
def test_greedy_writing_takes_the_likeliest_token_of_a_forward_pass(params, log_p):
    stream = PairGenerator(NETWORK, params).generate(rows(INPUTS, 6), 6, steps_per_call=4)
    written = np.stack(list(stream), axis=1)
    assert written.shape == (3, 6) or (written[:, -1] == 1).any()
    for inputs, row in zip(INPUTS, written.tolist(), strict=True):
        before = []
        for token in row:
            if before and before[-1] == 1:
                assert token == 0  # after its end
                continue
            expected = log_p(inputs, before)
            expected[0] = -np.inf  # padding is never written
            assert token == int(expected.argmax())
            before.append(token)


@pytest.mark.slow
def test_scores_are_those_of_forward_passes(params, log_p):
    lengths = np.array([len(target) for target in TARGETS])
    found = PairScorer(NETWORK, params).score(rows(INPUTS, 6), rows(TARGETS, 5), lengths)
    for row, (inputs, target) in enumerate(zip(INPUTS, TARGETS, strict=True)):
        table = [log_p(inputs, target[:i]) for i in range(len(target))]
        expected = sum(p[token] for p, token in zip(table, target, strict=True))
        np.testing.assert_allclose(found.log_likelihood[row], expected, rtol=1e-4)
        assert found.tokens[row] == len(target)
        assert found.greedy[row] == all(p.argmax() == token for p, token in zip(table, target, strict=True))


def test_more_tokens_than_learned_positions_are_refused(params):
    with pytest.raises(UserError, match="max_new_tokens = 9, but the decoder has only 8 learned positions"):
        PairGenerator(NETWORK, params).generate(rows(INPUTS, 6), 9)


def test_lengths_are_powers_of_two_within_bounds():
    shapes = [
        padded_to_power(np.ones((2, length)), most).shape for length, most in ((3, None), (33, None), (33, 40), (9, 8))
    ]
    assert shapes == [(2, 32), (2, 64), (2, 40), (2, 9)]
