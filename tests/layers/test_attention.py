"""Attention in all its spans against a dense masked softmax in float64 numpy."""

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest
from tiny import jit, random_parameters

from t5x_ssm.errors import UserError
from t5x_ssm.layers.attention import ENCODED, Attention
from t5x_ssm.parallel.sequence import document_positions, document_starts

WIDTH, LENGTH = 8, 13
# Two documents and padding; then one document that fills the row.
SEGMENTS = np.array([[1] * 6 + [2] * 5 + [0] * 2, [1] * 13])


def sees(span, window, causal, i, j):
    near = {"full": True, "sliding": abs(i - j) < window, "chunk": i // window == j // window}[span]
    return near and (j <= i or not causal)


def visibility(span, window, causal, segments, positions):
    return np.array(
        [
            [s == t and sees(span, window, causal, i, j) for t, j in zip(segments, positions, strict=True)]
            for s, i in zip(segments, positions, strict=True)
        ]
    )


def dense_bias(table, positions, causal):
    heads, buckets = table.shape
    bias = np.zeros((heads, len(positions), len(positions)))
    for a, i in enumerate(positions):
        for b, j in enumerate(positions):
            bias[:, a, b] = table[:, oracles.relative_bucket(j - i, buckets, 20, not causal)]
    return bias


def apply(layer, params, x, **call):
    return jit(lambda params, x: layer.apply({"params": params}, x, enable_dropout=False, **call))(params, x)


def setup(**fields):
    layer = Attention(num_heads=4, relative_buckets=8, relative_max_distance=20, use_bias=True, **fields)
    x = np.random.default_rng(0).normal(size=(2, LENGTH, WIDTH)).astype(np.float32)
    return layer, random_parameters(layer, x, encoded=x), x


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(("span", "window"), [("full", 99), ("sliding", 4), ("chunk", 4), ("sliding", LENGTH)])
def test_spans(span, window, causal, packed):
    layer, params, x = setup(span=span, window=window, causal=causal, num_kv_heads=2, relative_bias=True)
    call = {"segment_ids": jnp.asarray(SEGMENTS)} if packed else {}
    y = apply(layer, params, x, **call)
    p = oracles.numpy_tree(params)
    for b in range(2):
        segments = SEGMENTS[b] if packed else np.ones(LENGTH)
        # Positions were not given: they follow from the segments.
        positions = np.concatenate([np.arange((segments == s).sum()) for s in dict.fromkeys(segments)]).astype(int)
        expected = oracles.attention(
            p,
            np.float64(x[b]),
            visibility(span, window, causal, segments, positions),
            num_heads=4,
            num_kv_heads=2,
            bias=dense_bias(p["relative_bias"]["embedding"], positions, causal),
        )
        np.testing.assert_allclose(y[b], expected, rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize("span", ["full", "sliding", "chunk"])
def test_rotary_and_given_positions(span):
    layer, params, x = setup(span=span, window=5, rotary=True, scale=0.7)
    positions = np.stack([np.arange(3, 3 + LENGTH), np.arange(LENGTH)])
    y = apply(layer, params, x, positions=jnp.asarray(positions))
    for b in range(2):
        visible = visibility(span, 5, True, np.ones(LENGTH), positions[b])
        expected = oracles.attention(
            oracles.numpy_tree(params), np.float64(x[b]), visible, num_heads=4, positions=positions[b], scale=0.7
        )
        np.testing.assert_allclose(y[b], expected, rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize("causal", [True, False])
def test_a_window_holds_exactly_radius_plus_one(causal):
    """SPADE's radius r: itself and the r tokens before it (and after it, when bidirectional)."""
    radius = 3
    layer, params, x = setup(span="sliding", window=radius + 1, causal=causal)
    output = lambda x: jnp.sum(layer.apply({"params": params}, x, enable_dropout=False)[0, 6])
    gradient = jit(jax.grad(output))(x)
    reached = np.flatnonzero(np.abs(gradient[0]).max(-1))
    assert reached.tolist() == list(range(6 - radius, 7 if causal else 6 + radius + 1))


def test_cross_attention_sees_unmasked_encodings():
    layer, params, x = setup(cross=True)
    encoded = np.random.default_rng(1).normal(size=(2, 7, WIDTH)).astype(np.float32)
    mask = np.array([[1, 1, 1, 1, 0, 0, 0], [1] * 7])
    y = apply(layer, params, x, encoded=jnp.asarray(encoded), encoded_mask=jnp.asarray(mask))
    for b in range(2):
        visible = np.broadcast_to(mask[b] > 0, (LENGTH, 7))
        expected = oracles.attention(
            oracles.numpy_tree(params), np.float64(x[b]), visible, num_heads=4, source=np.float64(encoded[b])
        )
        np.testing.assert_allclose(y[b], expected, rtol=1e-5, atol=2e-6)


def test_cross_attention_projects_what_was_encoded_once():
    layer, params, x = setup(cross=True, num_kv_heads=2)
    encoded = jnp.asarray(np.random.default_rng(1).normal(size=(2, 7, WIDTH)).astype(np.float32))
    call = {"encoded_mask": jnp.array([[1, 1, 1, 1, 0, 0, 0], [1] * 7]), "enable_dropout": False}
    expected, made = layer.apply({"params": params}, x, encoded=encoded, **call, mutable=[ENCODED])
    assert jax.tree.map(jnp.shape, made[ENCODED]) == dict.fromkeys(("keys", "values"), (2, 2, 7, WIDTH // 4))
    variables = {"params": {name: params[name] for name in ("query", "out")}, **made}
    np.testing.assert_array_equal(layer.apply(variables, x, **call), expected)
    assert ENCODED not in layer.init(jax.random.key(0), x, encoded=encoded)


def test_cross_attention_stays_within_packed_pairs():
    layer, params, x = setup(cross=True)
    encoded = np.random.default_rng(1).normal(size=(2, 7, WIDTH)).astype(np.float32)
    pairs = np.array([[1, 1, 1, 1, 2, 2, 0], [1] * 7])
    y = apply(
        layer,
        params,
        x,
        encoded=jnp.asarray(encoded),
        encoded_segment_ids=jnp.asarray(pairs),
        segment_ids=jnp.asarray(SEGMENTS),
    )
    p = oracles.numpy_tree(params)
    for b in range(2):
        visible = SEGMENTS[b][:, None] == pairs[b]
        expected = oracles.attention(p, np.float64(x[b]), visible, num_heads=4, source=np.float64(encoded[b]))
        np.testing.assert_allclose(y[b], expected, rtol=1e-5, atol=2e-6)


def test_padding_is_not_seen():
    layer, params, x = setup(span="full", causal=False)
    mask = np.ones((2, LENGTH), np.int32)
    mask[0, 9:] = 0
    other = np.where(mask[..., None] > 0, x, 7.0).astype(np.float32)
    y, z = (apply(layer, params, a, padding_mask=jnp.asarray(mask)) for a in (x, other))
    np.testing.assert_allclose(y[0, :9], z[0, :9], rtol=1e-6)
    alone = apply(layer, params, x[:1, :9])
    np.testing.assert_allclose(y[:1, :9], alone, rtol=1e-5, atol=1e-6)


def test_documents_and_their_positions_from_segments():
    assert np.flatnonzero(document_starts(jnp.asarray(SEGMENTS))[0]).tolist() == [0, 6, 11]
    expected = [[*range(6), *range(5), 0, 1], list(range(13))]
    assert document_positions(jnp.asarray(SEGMENTS)).tolist() == expected


def test_refusals_name_the_setting():
    x = jnp.zeros((1, 4, WIDTH))
    for fields, call, message in [
        ({"span": "global"}, {}, "span"),
        ({"num_heads": 4, "num_kv_heads": 3}, {}, "num_kv_heads"),
        ({"num_heads": 2, "causal": False}, {"decode": True}, "causal"),
        ({"num_heads": 2}, {"return_state": True}, "initial_state"),
        ({"num_heads": 2}, {"prefill": True, "segment_ids": jnp.ones((1, 4), jnp.int32)}, "segment_ids"),
        ({"num_heads": 2}, {"prefill": True, "decode": True}, "decode and prefill"),
        ({"num_heads": 2, "cross": True}, {}, "encoded"),
        ({"num_heads": 2, "cross": True, "rotary": True}, {"encoded": x}, "rotary"),
        ({"num_heads": 3}, {}, "num_heads"),
        ({"num_heads": 2, "shared_bias": True}, {}, "shared_bias"),
        ({"num_heads": 2, "shared_bias": True, "relative_bias": True}, {}, "set one of them"),
    ]:
        with pytest.raises(UserError, match=message):
            Attention(**fields).init(jax.random.key(0), x, enable_dropout=False, **call)
