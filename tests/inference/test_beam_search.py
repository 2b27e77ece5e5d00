"""Beam search against the list of all texts there are, and against a search over lists of one forward pass a text."""

import functools
import itertools
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special
import tiny

from t5x_ssm.errors import UserError
from t5x_ssm.inference.beam_search import BeamSearcher
from t5x_ssm.inference.decoding import Generator
from t5x_ssm.inference.encoded import PairGenerator
from t5x_ssm.inference.sampling import Sampling
from t5x_ssm.layers.attention import Attention
from t5x_ssm.layers.basic import MLP
from t5x_ssm.layers.gss import GSS
from t5x_ssm.models.decoder import Decoder
from t5x_ssm.models.encoder_decoder import EncoderDecoder

EOS, LONGEST = 1, 6
# The table is padded: ids from 5 on are no tokens, and 0 is padding.
TOKENS, SETTINGS = (EOS, 2, 3, 4), Sampling(0.0, vocab_size=5)
TEXTS = [[3, 4, 2, 2], [2], [4, 3]]
ATTENTION = functools.partial(Attention, num_heads=2)
COMMON = {"vocab_size": 7, "embed_dim": 8, "mlp": functools.partial(MLP, hidden=8)}
# In one the cache's rows stand first, in the other behind the layers.
NETWORKS = {
    "encoder_decoder": EncoderDecoder(
        encoder_pattern="swa",
        encoder_layers=1,
        decoder_layers=1,
        encoder_mixers={"swa": functools.partial(ATTENTION, span="sliding", window=3, causal=False)},
        decoder_mixers={"attn": ATTENTION},
        cross=functools.partial(ATTENTION, cross=True, causal=False),
        decoder_positions=12,
        scan_layers=False,
        **COMMON,
    ),
    "decoder": Decoder(
        pattern="gss attn", mixers={"attn": ATTENTION, "gss": functools.partial(GSS, state_size=4)}, **COMMON
    ),
}


class Searched:
    """One network: its searches, and log p of the next token by a forward pass over an unpadded example."""

    def __init__(self, kind):
        network = NETWORKS[kind]
        self.pairs = kind == "encoder_decoder"
        tokens = [np.ones((1, 4), np.int32)] * (3 if self.pairs else 2)
        params = tiny.random_parameters(network, *tokens, seed=5, enable_dropout=False)
        # Logits with a spread.
        params["token_embedder"]["embedding"] = 3.0 * params["token_embedder"]["embedding"]
        self._apply = tiny.jit(lambda *inputs: network.apply({"params": params}, *inputs, enable_dropout=False))
        self._tables = {}
        generator = Generator(network, params, piece_size=4) if not self.pairs else None
        self.searcher = PairGenerator(network, params) if self.pairs else BeamSearcher(generator)
        self._search = self.searcher.search if self.pairs else self._continue

    def _continue(self, texts, limit, beams, **settings):
        lengths = np.count_nonzero(texts, axis=1)
        generator = self.searcher.generator
        state = generator.read(generator.start(len(texts), texts.shape[1] + limit), texts, lengths)
        found = self.searcher.search(state, limit, beams, **settings)
        assert state.consumed.tolist() == lengths.tolist()  # It can be searched from again.
        return found

    def search(self, limit, beams, **settings):
        texts = np.array([text + [0] * (4 - len(text)) for text in TEXTS])
        return self._search(texts, limit, beams, eos_id=settings.pop("eos_id", EOS), sampling=SETTINGS, **settings)

    def log_p(self, row, text):
        """Of the token after `text`: float64 [7]."""
        key = (row, *text)
        if key not in self._tables:
            before = [] if self.pairs else TEXTS[row]
            fed = np.array([[0, *before, *text] + [0] * (10 - len(before) - len(text))])
            logits = self._apply(*([np.array([TEXTS[row]])] if self.pairs else []), fed, fed)
            self._tables[key] = scipy.special.log_softmax(np.asarray(logits[0], np.float64), axis=-1)[
                len(before) + len(text)
            ]
        return self._tables[key]

    def score(self, row, text, length_penalty):
        total = sum(self.log_p(row, text[:i])[token] for i, token in enumerate(text))
        return total / ((5 + len(text)) / 6) ** length_penalty


@pytest.fixture(scope="module", params=[pytest.param("decoder", marks=pytest.mark.slow), "encoder_decoder"])
def searched(request):
    return Searched(request.param)


def compare(found, row, expected):
    """expected: (text, score, whether it ended), best first."""
    for i, (text, score, ended) in enumerate(expected[: found.scores.shape[1]]):
        # A log p near 0 is a difference of logits, and has their rounding.
        np.testing.assert_allclose(found.scores[row, i], score, rtol=1e-4, atol=1e-6, err_msg=str(text))
        assert found.tokens[row, i].tolist() == text + [0] * (found.tokens.shape[2] - len(text))
        assert found.ended[row, i] == ended
    assert np.all(found.scores[row, len(expected) :] == -np.inf) and not found.tokens[row, len(expected) :].any()


def ranked(texts):
    return sorted(texts, key=lambda text: (not text[2], -text[1]))


def test_enough_beams_find_every_text_in_its_order(searched):
    limit, beams, alpha = 3, 36, 0.6
    found = searched.search(limit, beams, length_penalty=alpha)
    for row in range(len(TEXTS)):
        texts = [
            [*begin, last]
            for length in range(1, limit + 1)
            for begin in itertools.product(TOKENS[1:], repeat=length - 1)
            for last in (TOKENS if length == limit else [EOS])
        ]
        assert len(texts) == 1 + 3 + 9 + 27
        every = ranked((text, searched.score(row, text, alpha), text[-1] == EOS) for text in texts)
        compare(found, row, every)


def search_of_lists(searched, row, limit, beams, alpha, eos_id):
    """The same search as a person would write it, to the limit and without stopping before."""
    going, ended = [[]], []
    for _ in range(limit):
        longer = sorted(
            ([*text, token] for text in going for token in TOKENS), key=lambda text: -searched.score(row, text, 0)
        )
        ended += [text for text in longer[: 2 * beams] if text[-1] == eos_id]
        ended = sorted(ended, key=lambda text: -searched.score(row, text, alpha))[:beams]
        going = [text for text in longer if text[-1] != eos_id][:beams]
    return ranked((text, searched.score(row, text, alpha), text in ended) for text in [*ended, *going])[:beams]


def test_few_beams_find_what_a_search_of_lists_finds(searched):
    best = {}
    for alpha, eos_id in ((0.0, EOS), (2.0, EOS), (0.6, 3), (1.0, None)):
        found = searched.search(LONGEST, 2, length_penalty=alpha, eos_id=eos_id)
        for row in range(len(TEXTS)):
            compare(found, row, search_of_lists(searched, row, LONGEST, 2, alpha, eos_id))
        best[alpha, eos_id] = found.tokens[:, 0]
    # The cases must differ in what they show: short and long texts, ended and cut off.
    lengths = {key: np.count_nonzero(tokens, axis=1) for key, tokens in best.items()}
    assert (lengths[0.0, EOS] < LONGEST).any() and (lengths[2.0, EOS] > lengths[0.0, EOS]).any()
    assert (lengths[1.0, None] == LONGEST).all()


class Bigram:
    """A network whose logits depend on the last token alone: its parameters are their table [5, 5]."""

    scan_layers, vocab_size = False, 5

    def apply(self, variables, tokens, targets, **call):
        del targets, call
        return variables["params"][tokens], {"cache": {"rows": jnp.zeros(len(tokens))}}


def test_a_search_does_not_end_before_what_it_would_still_find():
    """Of many languages, each alone: rows wait for each other. The longer a text, the more the penalty favours it."""
    searcher = BeamSearcher(Generator(Bigram(), np.zeros((5, 5), np.float32)))
    for seed in range(60):
        # Ends are likely at first, and a text that goes on is likely to have few ways to do so.
        table = 4 * np.random.default_rng(seed).normal(size=(5, 5)).astype(np.float32)
        table[0, EOS] += 6
        log_p = scipy.special.log_softmax(np.float64(table), axis=-1)

        def score(_, text, length_penalty, log_p=log_p):
            total = sum(log_p[before, token] for before, token in zip([0, *text], text, strict=False))
            return total / ((5 + len(text)) / 6) ** length_penalty

        language = searcher.with_params(table)
        for alpha in (1.0, 2.0, 4.0):
            state = language.generator.start(1)
            found = language.search(state, LONGEST, 2, length_penalty=alpha, sampling=SETTINGS, eos_id=EOS)
            compare(found, 0, search_of_lists(types.SimpleNamespace(score=score), 0, LONGEST, 2, alpha, EOS))


def test_settings_without_a_meaning_are_refused(searched):
    with pytest.raises(UserError, match="beams = 0"):
        searched.search(3, 0)
    with pytest.raises(UserError, match="length_penalty = -1"):
        searched.search(3, 2, length_penalty=-1.0)
    for sampling in (Sampling(1.0), Sampling(0.0, top_k=3), Sampling(0.0, top_p=0.5)):
        with pytest.raises(UserError, match="leave temperature, top_k and top_p"):
            searched._search(np.array([[2]]), 3, 2, sampling=sampling)


def test_logits_that_are_not_finite_are_an_error(searched, monkeypatch):
    holder = searched.searcher if searched.pairs else searched.searcher.generator
    monkeypatch.setattr(holder, "params", jax.tree.map(lambda x: x * np.nan, holder.params))
    with pytest.raises(UserError, match="not finite"):
        searched.search(3, 36)
