"""The encoder-decoder under the calls that T5X makes: what it sees, what it decodes, what packing and padding change."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import jit, random_parameters, shapes

from t5x_ssm.layers.attention import Attention
from t5x_ssm.layers.basic import MLP, RMSNorm
from t5x_ssm.layers.gss import GSS
from t5x_ssm.layers.positions import RelativeBias
from t5x_ssm.models.encoder_decoder import EncoderDecoder, cross_attention

VOCAB, SOURCE, TARGET = 11, 7, 8
RANDOM = np.random.default_rng(0)
INPUTS = RANDOM.integers(1, VOCAB, (3, SOURCE))
TARGETS = RANDOM.integers(1, VOCAB, (3, TARGET))
attention = functools.partial(Attention, num_heads=2)


def network(decoder_pattern="attn gss*2", **fields):
    fields = {
        "encoder_mixers": {"attn": functools.partial(attention, causal=False, shared_bias=True)},
        "decoder_mixers": {"attn": attention, "gss": functools.partial(GSS, hidden=8, channels=4, state_size=2)},
        "cross": functools.partial(cross_attention, num_heads=2),
        "encoder_shared_bias": functools.partial(RelativeBias, num_heads=2, num_buckets=8),
        "decoder_positions": TARGET,
        "mlp": functools.partial(MLP, hidden=8),
    } | fields
    return EncoderDecoder(VOCAB, 8, encoder_pattern="attn", encoder_layers=2, decoder_pattern=decoder_pattern, **fields)


def shifted(targets):
    return np.pad(targets, [(0, 0), (1, 0)])[:, :TARGET]


@pytest.mark.slow
@pytest.mark.parametrize("scan_layers", [True, False])
def test_t5x_decodes_with_this_cache(scan_layers):
    """The calls of T5X's EncoderDecoderModel: cache, prefill of prompts of different lengths, then steps."""
    net = network(scan_layers=scan_layers)
    params = random_parameters(net, INPUTS, TARGETS, TARGETS)
    lengths = np.array([0, 3, 5])

    @jit
    def t5x(targets):
        ones = jnp.ones((3, TARGET), jnp.int32)
        variables = {"params": params}
        call = functools.partial(net.apply, mutable=["cache"], enable_dropout=False)
        _, created = call(
            variables,
            encoder_input_tokens=jnp.ones_like(INPUTS),
            decoder_input_tokens=ones,
            decoder_target_tokens=ones,
            decode=True,
        )
        encoded = net.apply(variables, INPUTS, enable_dropout=False, method=net.encode)
        _, cache = call(
            {**variables, **created},
            encoded=encoded,
            encoder_input_tokens=INPUTS,
            decoder_input_tokens=targets,
            decoder_target_tokens=ones,
            prefill=True,
            prefill_lengths=lengths,
            method=net.decode,
        )

        def step(cache, i):
            token = jnp.take_along_axis(targets, jnp.minimum(lengths + i, TARGET - 1)[:, None], axis=1)
            logits, cache = call(
                {**variables, **cache}, encoded, INPUTS, token, token, decode=True, max_decode_length=TARGET,
                method=net.decode,
            )  # fmt: skip
            return cache, logits[:, 0]

        _, stepped = jax.lax.scan(step, cache, jnp.arange(TARGET - 5))
        return created["cache"], jnp.swapaxes(stepped, 0, 1), net.apply(variables, INPUTS, targets, targets)

    cache, stepped, full = t5x(shifted(TARGETS))
    assert "decoder" in cache and "encoder" not in cache
    for leaf in jax.tree.leaves(cache):
        assert leaf.shape[int(scan_layers)] == 3, "the batch axis is where cache_offset says in every leaf"
        assert not np.any(leaf)
    assert full.shape == (3, TARGET, VOCAB) and full.dtype == jnp.float32
    for b, n in enumerate(lengths):
        np.testing.assert_allclose(stepped[b], full[b, n : n + TARGET - 5], rtol=1e-3, atol=1e-4)


def test_outputs_see_the_whole_input_and_earlier_targets():
    net = network()
    params = random_parameters(net, INPUTS, TARGETS, TARGETS)
    run = jit(lambda inputs, targets: net.apply({"params": params}, inputs, targets, targets, enable_dropout=False))
    base = run(INPUTS, TARGETS)
    late = np.array(TARGETS)
    late[:, 5] = late[:, 5] % (VOCAB - 1) + 1
    changed = np.abs(run(INPUTS, late) - base).max((0, 2))
    assert changed[:5].max() < 1e-5 and changed[5:].min() > 1e-4
    other = np.array(INPUTS)
    other[:, -1] = other[:, -1] % (VOCAB - 1) + 1
    assert np.abs(run(other, TARGETS) - base).max((0, 2)).min() > 1e-4


def test_padding_of_the_input_is_not_seen():
    net = network()
    params = random_parameters(net, INPUTS, TARGETS, TARGETS)
    run = lambda inputs: jit(lambda: net.apply({"params": params}, inputs, TARGETS, TARGETS, enable_dropout=False))()
    padded = np.pad(INPUTS[:, :4], [(0, 0), (0, 3)])
    np.testing.assert_allclose(run(padded), run(INPUTS[:, :4]), rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_packed_pairs_give_what_they_give_alone():
    net = network()
    params = random_parameters(net, INPUTS, TARGETS, TARGETS)
    run = jit(lambda *tokens, **call: net.apply({"params": params}, *tokens, enable_dropout=False, **call))
    packed = run(
        INPUTS,
        TARGETS,
        TARGETS,
        encoder_segment_ids=np.array([[1] * 4 + [2] * 3] * 3),
        decoder_segment_ids=np.array([[1] * 5 + [2] * 3] * 3),
        encoder_positions=np.array([[*range(4), *range(3)]] * 3),
        decoder_positions=np.array([[*range(5), *range(3)]] * 3),
    )
    first = run(INPUTS[:, :4], TARGETS[:, :5], TARGETS[:, :5])
    second = run(INPUTS[:, 4:], TARGETS[:, 5:], TARGETS[:, 5:])
    np.testing.assert_allclose(packed[:, :5], first, rtol=1e-3, atol=1e-5)
    np.testing.assert_allclose(packed[:, 5:], second, rtol=1e-3, atol=1e-5)


def test_spades_own_shape():
    """Post-norm with a norm after the embeddings has no final norms; untied logits have their own projection."""
    net = network(pre_norm=False, embed_norm=RMSNorm, norm=RMSNorm, logits_via_embedding=False)
    params = shapes(net, INPUTS, TARGETS, TARGETS)["params"]
    assert {"encoder_embed_norm", "decoder_embed_norm", "logits", "decoder_position_embedder"} <= set(params)
    assert not {"encoder_norm", "decoder_norm"} & set(params)
    assert set(params["decoder"]["segment_0"]["block_0"]) >= {"mixer", "cross", "cross_norm", "mlp", "mlp_norm"}
    assert "cross" not in params["encoder"]["segment_0"]["block_0"]
    assert params["encoder_bias"]["embedding"].shape == (2, 8), "one table for all layers"


def test_one_table_serves_all_layers():
    """The shared bias is that of each layer having it as its own."""
    shared = network("attn")
    own = network(
        "attn", encoder_shared_bias=None,
        encoder_mixers={"attn": functools.partial(attention, causal=False, relative_bias=True, relative_buckets=8)},
    )  # fmt: skip
    params = random_parameters(shared, INPUTS, TARGETS, TARGETS)
    table = params["encoder_bias"]["embedding"]
    split = {k: v for k, v in params.items() if k != "encoder_bias"}
    split = jax.tree.map(lambda x: x, split)
    mixer = split["encoder"]["segment_0"]["block_0"]["mixer"]
    mixer["relative_bias"] = {"embedding": jnp.stack([table, table])}
    run = lambda net, p: jit(lambda: net.apply({"params": p}, INPUTS, TARGETS, TARGETS, enable_dropout=False))()
    np.testing.assert_allclose(run(shared, params), run(own, split), rtol=1e-5, atol=1e-6)
