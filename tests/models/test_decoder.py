"""The decoder under the calls that T5X makes, and the pieces around its stack."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import draw, jit, key, random_parameters, shapes

from t5x_ssm.errors import UserError
from t5x_ssm.layers.attention import Attention
from t5x_ssm.layers.basic import MLP
from t5x_ssm.layers.gss import GSS
from t5x_ssm.models.decoder import Decoder

VOCAB, LENGTH = 11, 8
MIXERS = {
    "gss": functools.partial(GSS, hidden=8, channels=4, state_size=2),
    "attn": functools.partial(Attention, num_heads=2),
    "chunk": functools.partial(Attention, span="chunk", num_heads=2, window=3, relative_bias=True),
}
TOKENS = np.random.default_rng(0).integers(1, VOCAB, (3, LENGTH))


def decoder(pattern="attn", **fields):
    fields = {"mlp": functools.partial(MLP, hidden=8), "mixers": MIXERS, **fields}
    return Decoder(vocab_size=VOCAB, embed_dim=8, pattern=pattern, **fields)


@pytest.mark.slow
def test_t5x_decodes_with_this_cache():
    """The calls of T5X's DecoderOnlyModel, on a stack whose first layer is outside the repeating period."""
    net = decoder("attn gss*2")
    params = random_parameters(net, TOKENS, TOKENS)
    inputs = np.pad(TOKENS, [(0, 0), (1, 0)])[:, :LENGTH]  # shifted right, 0 first
    lengths = np.array([0, 3, 5])

    @jit
    def t5x(inputs):
        ones = jnp.ones((3, LENGTH), jnp.int32)
        call = functools.partial(net.apply, mutable=["cache"], enable_dropout=False)
        _, created = call({"params": params}, ones, ones, decode=True)
        _, cache = call(
            {"params": params, "cache": created["cache"]},
            decoder_input_tokens=inputs,
            decoder_target_tokens=ones,
            decoder_causal_attention=None,
            prefill=True,
            prefill_lengths=lengths,
        )

        def step(carry, i):
            token = jnp.take_along_axis(inputs, jnp.minimum(lengths + i, LENGTH - 1)[:, None], axis=1)
            logits, cache = call({"params": params, **carry}, token, token, decode=True, max_decode_length=LENGTH)
            return cache, logits[:, 0]

        _, stepped = jax.lax.scan(step, cache, jnp.arange(LENGTH - 5))
        return created["cache"], jnp.swapaxes(stepped, 0, 1), net.apply({"params": params}, inputs, ones)

    cache, stepped, full = t5x(inputs)
    for leaf in jax.tree.leaves(cache):
        assert leaf.shape[1] == 3, "one batch axis, after the layers', in every leaf"
        assert not np.any(leaf)
    assert full.shape == (3, LENGTH, VOCAB) and full.dtype == jnp.float32
    for b, n in enumerate(lengths):
        np.testing.assert_allclose(stepped[b], full[b, n : n + LENGTH - 5], rtol=1e-3, atol=1e-4)


def test_packing_goes_through_to_the_layers():
    net = decoder("chunk", num_layers=2)
    params = random_parameters(net, TOKENS, TOKENS)
    segments = np.array([[1] * 4 + [2] * 4] * 3)
    run = jit(lambda tokens, **call: net.apply({"params": params}, tokens, tokens, enable_dropout=False, **call))
    packed = run(TOKENS, decoder_segment_ids=segments)
    given = run(TOKENS, decoder_segment_ids=segments, decoder_positions=np.array([[*range(4), *range(4)]] * 3))
    np.testing.assert_allclose(packed, given, rtol=1e-6)
    np.testing.assert_allclose(packed[:, 4:], run(TOKENS[:, 4:]), rtol=1e-4, atol=1e-5)
    assert np.abs(packed[:, 4:] - run(TOKENS)[:, 4:]).max() > 1e-2


@pytest.mark.parametrize("tied", [True, False])
def test_logits_and_norms_around_the_stack(tied):
    # A stack that adds nothing leaves embedding, final norm and logits.
    net = decoder(logits_via_embedding=tied)
    params = random_parameters(net, TOKENS, TOKENS)
    params["decoder"] = jax.tree.map(jnp.zeros_like, params["decoder"])
    logits = jit(lambda: net.apply({"params": params}, TOKENS, TOKENS, enable_dropout=False))()
    table = np.float64(params["token_embedder"]["embedding"])
    x = table[TOKENS]
    x = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-6)
    x = x * np.asarray(params["final_norm"]["scale"]) + np.asarray(params["final_norm"]["bias"])
    expected = x @ (table.T if tied else np.asarray(params["logits"]["kernel"]))
    np.testing.assert_allclose(logits, expected, rtol=1e-4, atol=1e-5)
    assert ("logits" in params) != tied


def test_post_norm_has_no_final_norm():
    assert "final_norm" not in shapes(decoder(pre_norm=False), TOKENS, TOKENS)["params"]


def test_bfloat16_network_has_float32_parameters_and_logits():
    net = decoder("attn gss", dtype=jnp.bfloat16)
    variables = shapes(net, TOKENS, TOKENS)
    assert {leaf.dtype for leaf in jax.tree.leaves(variables["params"])} == {jnp.dtype("float32")}
    _, captured = jax.eval_shape(
        lambda: net.apply(
            {"params": draw(variables["params"])}, TOKENS, TOKENS, rngs={"dropout": key()}, capture_intermediates=True
        )
    )
    stream = captured["intermediates"]["decoder"]["__call__"][0]
    assert stream.dtype == jnp.bfloat16
    assert captured["intermediates"]["__call__"][0].dtype == jnp.float32


@pytest.mark.parametrize("per_token", [False, True])
def test_an_embedding_dropout_mask_is_of_a_text_or_of_a_token(per_token):
    net = decoder(embed_dropout_rate=0.5, embed_dropout_per_token=per_token)
    params = draw(shapes(net, TOKENS, TOKENS)["params"])

    @jit
    def embedded():
        _, captured = net.apply(
            {"params": params}, TOKENS, TOKENS, rngs={"dropout": key()}, capture_intermediates=True, mutable=True
        )
        return captured["intermediates"]["Dropout_0"]["__call__"][0]

    kept = np.asarray(embedded()) != 0
    assert 0.2 < kept.mean() < 0.8
    assert (kept == kept[:, :1]).all() != per_token


def test_mistakes_name_the_setting():
    for net, call, message in [
        (decoder(), {"decode": True, "prefill": True}, "decode and prefill"),
        (decoder(), {"prefill": True, "decoder_segment_ids": TOKENS}, "segment_ids"),
        (decoder("hyena"), {}, "no mixer is named 'hyena'"),
        (decoder(mlp=None), {}, "mlp"),
    ]:
        with pytest.raises(UserError, match=message):
            shapes(net, TOKENS, TOKENS, **call)
