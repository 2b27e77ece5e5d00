"""Generation against the teacher-forced forward pass, which knows no cache."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

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
PATTERNS = {"gss": "gss*2", "hybrid": "gss chunk", "full": "gss attn"}
SAMPLED = Sampling(temperature=1.3, top_p=0.95)
# Longer than a piece and than a chunk, on a piece's edge, shorter, empty.
LENGTHS = np.array([19, 8, 3, 0])


@functools.cache
def network(kind, scan_layers):
    net = Decoder(
        vocab_size=VOCAB,
        embed_dim=16,
        pattern=PATTERNS[kind],
        mixers=MIXERS,
        mlp=functools.partial(MLP, hidden=32),
        logits_via_embedding=False,
        embed_init_scale=1.0,
        scan_layers=scan_layers,
    )
    tokens = jnp.zeros((1, 4), jnp.int32)
    params = net.init(jax.random.key(3), tokens, tokens, enable_dropout=False)["params"]
    # Logits with a spread, so that greedy text does not repeat one id.
    params["logits"]["kernel"] = 3.0 * params["logits"]["kernel"]
    return net, params


@functools.cache
def generator(kind, scan_layers=True, sampling=GREEDY, eos_id=None, steps_per_call=1):
    return Generator(
        *network(kind, scan_layers), sampling, eos_id=eos_id, piece_size=8, steps_per_call=steps_per_call
    )


@functools.cache
def forward(kind, scan_layers=True):
    net, params = network(kind, scan_layers)
    return jax.jit(lambda tokens: net.apply({"params": params}, tokens, tokens, enable_dropout=False))


def teacher_forced(kind, texts, scan_layers=True):
    """Logits of the token after each prefix: row b, position i is the choice of texts[b][i]."""
    fed = np.zeros((len(LENGTHS), LONGEST), np.int32)
    for row, text in enumerate(texts):
        fed[row, 1 : len(text)] = text[:-1]
    return np.asarray(forward(kind, scan_layers)(fed))


def prompts(seed=0, lengths=LENGTHS):
    tokens = np.random.default_rng(seed).integers(1, VOCAB, (len(lengths), max(lengths)))
    # What lies beyond a row's length must not matter.
    return tokens, lengths


def collect(stream):
    return np.stack(list(stream), axis=1)


def run(gen, tokens, lengths, new, seeds=0):
    state = gen.read(gen.start(len(lengths), LONGEST), tokens, lengths)
    stream = gen.generate(state, new, seeds=seeds)
    return collect(stream), stream


def joined(tokens, lengths, written):
    return [[*tokens[b, : lengths[b]], *written[b]] for b in range(len(lengths))]


@pytest.mark.parametrize("scan_layers", [True, False])
@pytest.mark.parametrize("kind", PATTERNS)
def test_greedy_is_the_argmax_of_the_full_forward(kind, scan_layers):
    tokens, lengths = prompts()
    written, _ = run(generator(kind, scan_layers), tokens, lengths, 20)
    logits = teacher_forced(kind, joined(tokens, lengths, written), scan_layers)
    logits[..., 0] = -np.inf  # padding is not drawn
    assert written.shape == (len(lengths), 20)
    for b, n in enumerate(lengths):
        assert written[b].tolist() == logits[b, n : n + 20].argmax(-1).tolist()
    assert len(set(written.ravel().tolist())) > 8


@pytest.mark.parametrize("kind", PATTERNS)
def test_a_ragged_batch_gives_each_row_what_it_gives_alone(kind):
    tokens, lengths = prompts(seed=1)
    gen = generator(kind, sampling=SAMPLED)
    together, _ = run(gen, tokens, lengths, 12, seeds=[5, 6, 7, 8])
    for b in (0, 2, 3):
        alone, _ = run(gen, tokens[b : b + 1], lengths[b : b + 1], 12, seeds=[5 + b])
        assert together[b].tolist() == alone[0].tolist()
    again, _ = run(gen, tokens, lengths, 12, seeds=5)
    assert together.tolist() == again.tolist()
    other, _ = run(gen, tokens, lengths, 12, seeds=9)
    assert together.tolist() != other.tolist()


@pytest.mark.parametrize("kind", PATTERNS)
def test_a_conversation_goes_on_as_if_it_had_been_read_at_once(kind):
    """Two turns from one state equal one reading of everything; rows ended early must not have moved on."""
    tokens, lengths = prompts(seed=2)
    probe, _ = run(generator(kind, sampling=SAMPLED), tokens, lengths, 9)
    # An end that some rows meet early and others never.
    eos = int(probe[1, 2])
    gen = generator(kind, sampling=SAMPLED, eos_id=eos)
    first, stream = run(gen, tokens, lengths, 9)
    ended = first == eos
    assert ended.any(axis=1).any() and not ended.any(axis=1).all()
    turn, turn_lengths = prompts(seed=3, lengths=np.array([2, 11, 0, 9]))
    state = gen.read(stream.state, turn, turn_lengths)
    second = collect(gen.generate(state, 7, seeds=50))

    texts = []
    for b in range(len(lengths)):
        drawn = first[b][: np.argmax(ended[b]) + 1] if ended[b].any() else first[b]
        assert np.all(first[b][len(drawn) :] == decoding.PAD)
        texts.append([*tokens[b, : lengths[b]], *drawn, *turn[b, : turn_lengths[b]]])
    total = np.array([len(text) for text in texts])
    whole = np.zeros((len(texts), total.max()), int)
    for b, text in enumerate(texts):
        whole[b, : total[b]] = text
    assert second.tolist() == run(gen, whole, total, 7, seeds=50)[0].tolist()


def test_several_steps_a_call_draw_the_same():
    tokens, lengths = prompts(seed=4)
    one, stream = run(generator("hybrid", sampling=SAMPLED, eos_id=7), tokens, lengths, 10)
    many_gen = generator("hybrid", sampling=SAMPLED, eos_id=7, steps_per_call=4)
    many, many_stream = run(many_gen, tokens, lengths, 10)
    assert one.tolist() == many.tolist()
    for a, b in zip(jax.tree.leaves(stream.state), jax.tree.leaves(many_stream.state), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)
    left = many_gen.generate(many_stream.state, 4)
    next(left)
    with pytest.raises(ValueError, match="steps_per_call"):
        _ = left.state


def test_every_row_stops_at_its_end():
    tokens, lengths = prompts()
    free, _ = run(generator("gss"), tokens, lengths, 10)
    eos = int(free[0, 3])
    written, stream = run(generator("gss", eos_id=eos), tokens[:1], lengths[:1], 10)
    stop = free[0].tolist().index(eos) + 1
    assert written[0].tolist() == free[0, :stop].tolist()
    assert stream.ended.all()


@pytest.mark.parametrize("kind", ["gss", "hybrid"])
def test_no_length_in_shapes_without_full_attention(kind):
    net, params = network(kind, True)
    assert not decoding.cache_grows(net, params)
    gen = Generator(net, params, SAMPLED, eos_id=None, piece_size=64)
    sizes, lowered = [], []
    for length in (512, 8192):
        state = gen.read(gen.start(1, length + 4), np.full((1, length), 5))
        sizes.append([(leaf.shape, leaf.dtype) for leaf in jax.tree.leaves(state)])
        keys = decoding.row_keys(0, 1)
        lowered.append(gen.make_steps.lower(params, state, jnp.ones(1, bool), keys, np.int32(4), steps=1).as_text())
        assert len(list(gen.generate(state, 4))) == 4
    assert sizes[0] == sizes[1]
    assert lowered[0] == lowered[1]
    assert gen.make_steps._cache_size() == gen.read_piece._cache_size() == 1


def test_full_attention_has_a_capacity_and_says_when_it_does_not_suffice():
    net, params = network("full", True)
    gen = generator("full")
    assert decoding.cache_grows(net, params)
    with pytest.raises(UserError, match="max_length"):
        gen.start(1)
    tokens = np.full((1, 10), 3)
    with pytest.raises(UserError, match="max_length = 9"):
        gen.read(gen.start(1, 9), tokens)
    state = gen.read(gen.start(1, 12), tokens)
    with pytest.raises(UserError, match="13 tokens"):
        gen.generate(state, 3)
    # Exactly full is fine, and still right.
    written = collect(gen.generate(state, 2))
    assert written.tolist() == run(gen, tokens, np.array([10]), 2)[0].tolist()


def test_copies_share_a_prompt():
    tokens, lengths = prompts(seed=6)
    for scan_layers in (True, False):
        gen = generator("hybrid", scan_layers, SAMPLED)
        state = gen.read(gen.start(4), tokens, lengths)
        copies = collect(gen.generate(gen.copy(state, [2, 0, 2]), 6, seeds=[1, 2, 3]))
        rows = [2, 0, 2]
        expected, _ = run(gen, tokens[rows], lengths[rows], 6, seeds=[1, 2, 3])
        assert copies.tolist() == expected.tolist()
        # The original is still there.
        assert collect(gen.generate(state, 2)).shape == (4, 2)


def test_mistakes_are_named():
    gen = generator("gss")
    with pytest.raises(UserError, match=f"vocabulary of {VOCAB}"):
        gen.read(gen.start(1), np.array([[VOCAB]]))
    with pytest.raises(ValueError, match="lengths"):
        gen.read(gen.start(1), np.array([[1, 2]]), np.array([3]))
    net, params = network("gss", True)
    params = {**params, "logits": {"kernel": jnp.full_like(params["logits"]["kernel"], jnp.nan)}}
    broken = Generator(net, params)
    with pytest.raises(UserError, match="not finite"):
        next(broken.generate(broken.start(1), 1))
