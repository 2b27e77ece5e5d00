"""T5X's decoding of a scanned stack with a layer outside the period, against the forward pass that knows no cache."""

import functools

import jax
import numpy as np
import pytest
import seqio
import tiny

pytest.importorskip("t5x.models", reason="T5X cannot be imported; docs/t5x.md says how to get it")

from t5x import decoding, models

from t5x_ssm.layers.attention import Attention
from t5x_ssm.layers.basic import MLP
from t5x_ssm.layers.s4 import S4StateSpace
from t5x_ssm.layers.spade import Spade
from t5x_ssm.models.decoder import Decoder

pytestmark = [pytest.mark.t5x, pytest.mark.slow]

VOCAB, LENGTH, EOS = 259, 28, 1
PROMPTS = ([0, 7, 9, 30, 12, 45, 8, 77], [0, 5, 200], [0, 90, 91, 92, 93, 17])
sliding = functools.partial(Attention, num_heads=2, span="sliding", window=6)


@functools.cache
def network(ends=False):
    """The network and its parameters; with `ends` EOS is often likely."""
    spade = functools.partial(Spade, state_space=functools.partial(S4StateSpace, state_size=4), attention=sliding)
    net = Decoder(
        vocab_size=VOCAB,
        embed_dim=16,
        pattern="spade swa*3",
        mixers={"spade": spade, "swa": sliding},
        mlp=functools.partial(MLP, hidden=32),
        logits_via_embedding=False,
    )
    tokens = np.zeros((1, 4), np.int32)
    params = tiny.random_parameters(net, tokens, tokens, seed=3, enable_dropout=False)
    # Logits with a spread; id 0 is padding and nobody writes it.
    params["logits"]["kernel"] = (3.0 * params["logits"]["kernel"]).at[:, 0].set(0.0)
    if ends:
        params["logits"]["kernel"] = params["logits"]["kernel"].at[:, EOS].multiply(5.0)
    return net, params


@functools.cache
def forward(ends=False):
    net, params = network(ends)
    return jax.jit(lambda tokens: net.apply({"params": params}, tokens, tokens, enable_dropout=False))


def batch():
    """A batch of prompts of different lengths, as seqio's converter gives it: `decoder_causal_attention` marks them."""
    inputs, marks = np.zeros((2, len(PROMPTS), LENGTH), np.int32)
    for row, prompt in enumerate(PROMPTS):
        inputs[row, : len(prompt)] = prompt
        marks[row, : len(prompt)] = 1
    targets = np.concatenate([inputs[:, 1:], np.zeros_like(inputs[:, :1])], axis=1)
    return {"decoder_input_tokens": inputs, "decoder_target_tokens": targets, "decoder_causal_attention": marks}


def model(decode_fn):
    return models.DecoderOnlyModel(
        network()[0], seqio.ByteVocabulary(extra_ids=0), optimizer_def=None, decode_fn=decode_fn
    )


def predict(decode_fn, ends=False, **how):
    _, params = network(ends)
    return jax.jit(functools.partial(model(decode_fn).predict_batch_with_aux, **how))(params, batch())


def written(row):
    """The tokens of a row up to EOS, EOS included."""
    row = [int(i) for i in row]
    return row[: row.index(EOS) + 1] if EOS in row else [i for i in row if i]


def log_probabilities(prompt, text, ends=False):
    """log p of each token of `text` after `prompt`, from one forward pass."""
    fed = np.zeros((1, LENGTH), np.int32)
    whole = [*prompt, *text][:LENGTH]
    fed[0, : len(whole)] = whole
    log_p = jax.nn.log_softmax(forward(ends)(fed)[0])
    return np.asarray(log_p)[len(prompt) - 1 : len(prompt) - 1 + len(text)]


def test_greedy_text_is_the_forward_passs_own():
    found, _ = predict(functools.partial(decoding.temperature_sample, temperature=0.0))
    for prompt, row in zip(PROMPTS, found, strict=True):
        text = written(row)
        assert len(text) > 3
        np.testing.assert_array_equal(log_probabilities(prompt, text).argmax(axis=-1), text)


def test_beams_keep_the_state_of_their_own_text():
    """A finished beam's score is the probability of its text: a cache reordered along a wrong axis gives another."""
    alpha = 0.6
    search = functools.partial(decoding.beam_search, alpha=alpha)
    found, aux = predict(search, ends=True, return_all_decodes=True, num_decodes=3)
    finished = 0
    for prompt, rows, scores in zip(PROMPTS, np.asarray(found), np.asarray(aux["scores"]), strict=True):
        for text, score in zip(map(written, rows), scores, strict=True):
            if EOS not in text:  # T5X goes on past the end of the longer prompts and cuts such a text.
                continue
            log_p = log_probabilities(prompt, text, ends=True)[np.arange(len(text)), text].sum()
            # T5X counts the prompt without its last token.
            penalty = ((5.0 + len(prompt) - 1 + len(text)) / 6.0) ** alpha
            np.testing.assert_allclose(score, log_p / penalty, rtol=1e-4)
            finished += len(text) > 3
    assert finished >= 3
