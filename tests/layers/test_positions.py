"""Relative buckets against values worked out by hand, rotary embedding against complex phases, learned positions."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest
from tiny import random_parameters

from t5x_ssm.errors import UserError
from t5x_ssm.layers.positions import LearnedPositions, RelativeBias, relative_bias, relative_buckets, rotate


@pytest.mark.parametrize(
    ("bidirectional", "relative", "expected"),
    [
        # 16 exact buckets, then 16 + floor(16 log(d/16) / log 8): a factor of √8 = 2.83 in distance is 8 buckets.
        (False, [3, 0, -1, -15, -16, -18, -19, -32, -45, -46, -64, -127, -128, -5000],
                [0, 0, 1, 15, 16, 16, 17, 21, 23, 24, 26, 31, 31, 31]),
        # Per direction 8 exact, then 8 + floor(8 log(d/8) / log 16): a factor of 2 is 2 buckets; later keys from 16 on.
        (True, [0, -1, -7, -8, -11, -12, -16, -32, -64, -127, -128, -999, 1, 7, 8, 12, 64, 128],
               [0, 1, 7, 8, 8, 9, 10, 12, 14, 15, 15, 15, 17, 23, 24, 25, 30, 31]),
    ],
)  # fmt: skip
def test_buckets_by_hand(bidirectional, relative, expected):
    found = relative_buckets(jnp.asarray(relative), 32, 128, bidirectional)
    assert found.tolist() == expected
    assert [oracles.relative_bucket(r, 32, 128, bidirectional) for r in relative] == expected


def test_bias_is_looked_up_by_head_and_distance():
    layer = RelativeBias(num_heads=3, num_buckets=8)
    q_pos, k_pos = jnp.asarray([[4, 9]]), jnp.asarray([[0, 3, 4, 9, 11]])
    table = layer.apply({"params": random_parameters(layer)})
    assert table.shape == (3, 8)
    bias = np.asarray(relative_bias(table, q_pos, k_pos, max_distance=20, bidirectional=False))
    assert bias.shape == (1, 3, 2, 5)
    for i, q in enumerate([4, 9]):
        for j, k in enumerate([0, 3, 4, 9, 11]):
            bucket = oracles.relative_bucket(k - q, 8, 20, bidirectional=False)
            np.testing.assert_array_equal(bias[0, :, i, j], table[:, bucket])


def test_rotary_turns_pairs_by_position_and_dots_see_only_distance():
    x = np.random.default_rng(0).normal(size=(2, 5, 3, 8))
    positions = np.array([[0, 1, 2, 7, 100], [3, 4, 5, 6, 7]])
    turned = np.asarray(rotate(jnp.asarray(x, jnp.float32), jnp.asarray(positions)))
    expected = np.stack([oracles.rotary(x[b], positions[b]) for b in range(2)])
    np.testing.assert_allclose(turned, expected, atol=2e-5)

    def dot(i, j):
        q, k = (rotate(jnp.asarray(x[:1, n : n + 1], jnp.float32), jnp.asarray([[p]])) for n, p in ((0, i), (1, j)))
        return np.asarray((q * k).sum(-1))

    np.testing.assert_allclose(dot(3, 10), dot(50, 57), atol=1e-4)
    assert np.abs(dot(3, 10) - dot(3, 11)).max() > 1e-2


@pytest.mark.parametrize("layers_first", [False, True])
def test_learned_positions_count_what_each_row_has_read(layers_first):
    layer = LearnedPositions(max_length=9, layers_first=layers_first)
    x = np.zeros((2, 6, 4), np.float32)
    params = random_parameters(layer, x)
    table = np.asarray(params["embedding"])
    apply = functools.partial(layer.apply, mutable=["cache"])
    np.testing.assert_array_equal(layer.apply({"params": params}, x)[1], table[:6])
    given = layer.apply({"params": params}, x, jnp.asarray([[0, 1, 2, 0, 1, 2]] * 2))
    np.testing.assert_array_equal(given[0, 3:], table[:3])

    _, cache = apply({"params": params}, x, decode=True)
    (leaf,) = jax.tree.leaves(cache)
    assert leaf.shape == ((1, 2) if layers_first else (2,)) and not np.any(leaf), "creating it consumes nothing"
    y, cache = apply({"params": params, **cache}, x, prefill=True, prefill_lengths=jnp.asarray([2, 4]))
    np.testing.assert_array_equal(y[0], table[:6])
    y, cache = apply({"params": params, **cache}, x[:, :3], prefill=True, prefill_lengths=jnp.asarray([3, 1]))
    np.testing.assert_array_equal(y, [table[2:5], table[4:7]])
    y, cache = apply({"params": params, **cache}, x[:, :1], decode=True)
    np.testing.assert_array_equal(y[:, 0], table[[5, 5]])
    with pytest.raises(UserError, match="max_length = 9"):
        layer.apply({"params": params}, np.zeros((1, 10, 4), np.float32))
