"""Generation against the teacher-forced forward pass, which knows no cache."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from t5x_ssm.errors import UserError
from t5x_ssm.inference import decoding
from t5x_ssm.inference.decoding import Generator
from t5x_ssm.inference.sampling import GREEDY, Sampling
from t5x_ssm.layers.attention import Attention
from t5x_ssm.layers.basic import MLP
from t5x_ssm.layers.gss import GSS
from t5x_ssm.models.decoder import Decoder

VOCAB = 40
LONGEST = 64
MIXERS = {
    "gss": functools.partial(GSS, state_size=8),
    "chunk": functools.partial(Attention, span="chunk", window=8, num_heads=2, rotary=True),
    "attn": functools.partial(Attention, span="full", num_heads=2, relative_bias=True),
}
SAMPLED = Sampling(temperature=1.3, top_p=0.95)
# Longer than a piece and than a chunk, on a piece's edge, shorter, empty.
LENGTHS = np.array([19, 8, 3, 0])
EVERYTHING = "gss chunk attn"


@functools.cache
def network(pattern, scan_layers=True):
    net = Decoder(
        vocab_size=VOCAB,
        embed_dim=16,
        pattern=pattern,
        mixers=MIXERS,
        mlp=functools.partial(MLP, hidden=32),
        logits_via_embedding=False,
        scan_layers=scan_layers,
    )
    tokens = np.zeros((1, 4), np.int32)
    params = tiny.random_parameters(net, tokens, tokens, seed=3, enable_dropout=False)
    # Tokens that matter and logits with a spread, so that greedy text does not repeat one id.
    params["token_embedder"]["embedding"] = 4.0 * params["token_embedder"]["embedding"]
    params["logits"]["kernel"] = 3.0 * params["logits"]["kernel"]
    return net, params


@functools.cache
def generator(pattern, scan_layers=True):
    return Generator(*network(pattern, scan_layers), piece_size=8)


def teacher_forced(pattern, scan_layers, texts):
    """Logits of the token after each prefix: row b, position i chooses texts[b][i]."""
    net, params = network(pattern, scan_layers)
    fed = np.zeros((len(texts), LONGEST), np.int32)
    for row, text in enumerate(texts):
        fed[row, 1 : len(text)] = text[:-1]
    forward = jax.jit(lambda tokens: net.apply({"params": params}, tokens, tokens, enable_dropout=False))
    return np.array(forward(fed))


def prompts(seed=0, lengths=LENGTHS):
    tokens = np.random.default_rng(seed).integers(1, VOCAB, (len(lengths), max(lengths)))
    # What lies beyond a row's length must not matter.
    return tokens, lengths


def collect(stream):
    return np.stack(list(stream), axis=1)


def run(gen, tokens, lengths, new, sampling=GREEDY, **how):
    """Reads prompts and continues them: (tokens [B, new], the stream)."""
    how = {"eos_id": None, **how}
    state = gen.read(gen.start(len(lengths), LONGEST), tokens, lengths)
    stream = gen.generate(state, new, sampling, **how)
    return collect(stream), stream


def joined(tokens, lengths, written):
    return [[*tokens[b, : lengths[b]], *written[b]] for b in range(len(lengths))]


@pytest.mark.parametrize(
    "pattern, scan_layers",
    [
        ("gss chunk", True),
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in (("gss*2", True), (EVERYTHING, True), (EVERYTHING, False))
        ),
    ],
)
def test_greedy_is_the_argmax_of_the_full_forward(pattern, scan_layers):
    tokens, lengths = prompts()
    written, _ = run(generator(pattern, scan_layers), tokens, lengths, 20)
    logits = teacher_forced(pattern, scan_layers, joined(tokens, lengths, written))
    logits[..., 0] = -np.inf  # padding is not drawn
    assert written.shape == (len(lengths), 20)
    for b, n in enumerate(lengths):
        assert written[b].tolist() == logits[b, n : n + 20].argmax(-1).tolist()
    assert len(set(written.ravel().tolist())) > 8


@pytest.mark.slow
def test_a_ragged_batch_gives_each_row_what_it_gives_alone():
    tokens, lengths = prompts(seed=1)
    gen = generator(EVERYTHING)
    together, _ = run(gen, tokens, lengths, 12, SAMPLED, seeds=[5, 6, 7, 8])
    for b in (0, 2, 3):
        alone, _ = run(gen, tokens[b : b + 1], lengths[b : b + 1], 12, SAMPLED, seeds=[5 + b])
        assert together[b].tolist() == alone[0].tolist()
    again, _ = run(gen, tokens, lengths, 12, SAMPLED, seeds=5)
    assert together.tolist() == again.tolist()
    other, _ = run(gen, tokens, lengths, 12, SAMPLED, seeds=9)
    assert together.tolist() != other.tolist()


@pytest.mark.slow
@pytest.mark.parametrize("scan_layers", [True, False])
def test_a_conversation_goes_on_as_if_it_had_been_read_at_once(scan_layers):
    """Two turns from one state equal one reading of everything; rows ended early must not have moved on."""
    tokens, lengths = prompts(seed=2)
    gen = generator(EVERYTHING, scan_layers)
    probe, _ = run(gen, tokens, lengths, 9, SAMPLED)
    # An end that some rows meet early and others never.
    eos = next(e for e in probe[:, 1:5].ravel() if not (probe == e).any(axis=1).all())
    first, stream = run(gen, tokens, lengths, 9, SAMPLED, eos_id=eos)
    ended = first == eos
    assert ended.any(axis=1).any() and not ended.any(axis=1).all()
    assert stream.ended.tolist() == ended.any(axis=1).tolist()
    turn, turn_lengths = prompts(seed=3, lengths=np.array([2, 11, 0, 9]))
    state = gen.read(stream.state, turn, turn_lengths)
    second = collect(gen.generate(state, 7, SAMPLED, eos_id=None, seeds=50))

    texts = []
    for b in range(len(lengths)):
        drawn = first[b][: np.argmax(ended[b]) + 1] if ended[b].any() else first[b]
        assert np.all(first[b][len(drawn) :] == decoding.PAD)
        texts.append([*tokens[b, : lengths[b]], *drawn, *turn[b, : turn_lengths[b]]])
    total = np.array([len(text) for text in texts])
    whole = np.zeros((len(texts), total.max()), int)
    for b, text in enumerate(texts):
        whole[b, : total[b]] = text
    assert second.tolist() == run(gen, whole, total, 7, SAMPLED, seeds=50)[0].tolist()


@pytest.mark.slow
def test_several_steps_a_call_draw_the_same():
    tokens, lengths = prompts(seed=4)
    gen = generator(EVERYTHING)
    free, _ = run(gen, tokens, lengths, 10, SAMPLED)
    how = {"sampling": SAMPLED, "eos_id": int(free[1, 5])}
    one, stream = run(gen, tokens, lengths, 10, **how)
    many, many_stream = run(gen, tokens, lengths, 10, steps_per_call=4, **how)
    assert one.tolist() == many.tolist()
    for a, b in zip(jax.tree.leaves(stream.state), jax.tree.leaves(many_stream.state), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)
    left = gen.generate(many_stream.state, 4, SAMPLED, eos_id=None, steps_per_call=4)
    next(left)
    with pytest.raises(ValueError, match="steps_per_call"):
        _ = left.state


@pytest.mark.slow
def test_a_stream_can_be_left_after_any_token():
    tokens, lengths = prompts(seed=5)
    gen = generator(EVERYTHING)
    whole, _ = run(gen, tokens, lengths, 8, SAMPLED, seeds=3)
    stream = gen.generate(gen.read(gen.start(4, LONGEST), tokens, lengths), 8, SAMPLED, eos_id=None, seeds=3)
    first = [next(stream) for _ in range(3)]
    rest = collect(gen.generate(stream.state, 5, SAMPLED, eos_id=None, seeds=3))
    assert np.concatenate([np.stack(first, axis=1), rest], axis=1).tolist() == whole.tolist()
    with pytest.raises(StopIteration):
        next(stream)


def test_a_batch_stops_when_every_row_has_ended():
    gen = generator(EVERYTHING)
    tokens, lengths = prompts()
    tokens, lengths = np.tile(tokens[:1], (4, 1)), np.tile(lengths[:1], 4)
    free, _ = run(gen, tokens, lengths, 10)
    eos = int(free[0, 3])
    written, stream = run(gen, tokens, lengths, 10, eos_id=eos)
    stop = free[0].tolist().index(eos) + 1
    assert written.tolist() == free[:, :stop].tolist()
    assert stream.ended.all()


@pytest.mark.slow
def test_no_length_in_shapes_without_full_attention():
    net, params = network("gss chunk")
    assert not decoding.cache_grows(net, params)
    gen = Generator(net, params, piece_size=64)
    shapes, lowered = [], []
    for length in (512, 8192):
        state = gen.read(gen.start(1, length + 4), np.full((1, length), 5))
        shapes.append([(leaf.shape, leaf.dtype) for leaf in jax.tree.leaves(state)])
        arguments = (params, state, jnp.ones(1, bool), decoding.row_keys(0, 1), np.int32(1), np.int32(4))
        lowered.append(gen.make_steps.lower(*arguments, sampling=SAMPLED, steps=1).as_text())
        assert len(list(gen.generate(state, 4, SAMPLED, eos_id=None))) == 4
    assert shapes[0] == shapes[1]
    assert lowered[0] == lowered[1]
    assert gen.make_steps._cache_size() == gen.read_piece._cache_size() == 1


@pytest.mark.slow
def test_full_attention_has_a_capacity_and_says_when_it_does_not_suffice():
    gen = generator(EVERYTHING)
    assert decoding.cache_grows(*network(EVERYTHING))
    with pytest.raises(UserError, match="max_length"):
        gen.start(1)
    tokens = np.full((1, 10), 3)
    with pytest.raises(UserError, match="max_length = 9"):
        gen.read(gen.start(1, 9), tokens)
    state = gen.read(gen.start(1, 12), tokens)
    with pytest.raises(UserError, match="13 tokens"):
        gen.generate(state, 3)
    # Exactly full is fine, and still right.
    written = collect(gen.generate(state, 2, eos_id=None))
    assert written.tolist() == run(gen, tokens, np.array([10]), 2)[0].tolist()


@pytest.mark.slow
@pytest.mark.parametrize("scan_layers", [True, False])
def test_copies_share_a_prompt(scan_layers):
    tokens, lengths = prompts(seed=6)
    gen = generator(EVERYTHING, scan_layers)
    state = gen.read(gen.start(4, LONGEST), tokens, lengths)
    rows = [2, 0, 2, 1]
    copies = collect(gen.generate(gen.copy(state, rows), 6, SAMPLED, eos_id=None, seeds=[1, 2, 3, 4]))
    expected, _ = run(gen, tokens[rows], lengths[rows], 6, SAMPLED, seeds=[1, 2, 3, 4])
    assert copies.tolist() == expected.tolist()
    # The original is still there.
    assert collect(gen.generate(state, 2)).shape == (4, 2)


def test_mistakes_are_named():
    gen = generator("gss*2")
    with pytest.raises(UserError, match=f"vocabulary of {VOCAB}"):
        gen.read(gen.start(1), np.array([[VOCAB]]))
    with pytest.raises(ValueError, match="lengths"):
        gen.read(gen.start(1), np.array([[1, 2]]), np.array([3]))
    net, params = network("gss*2")
    params = {**params, "logits": {"kernel": jnp.full_like(params["logits"]["kernel"], jnp.nan)}}
    broken = Generator(net, params)
    with pytest.raises(UserError, match="not finite"):
        next(broken.generate(broken.start(1), 1))
