"""Sampling against distributions worked out in NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from t5x_ssm.errors import UserError
from t5x_ssm.inference import sampling
from t5x_ssm.inference.sampling import Sampling


def oracle(logits, temperature, top_k, top_p, forbidden):
    """The distribution of one row, in float64 and with plain loops."""
    weights = {i: float(x) / temperature for i, x in enumerate(logits) if i not in forbidden}
    ranked = sorted(weights, key=lambda i: (-weights[i], i))[: top_k or len(weights)]
    best = weights[ranked[0]]
    mass = {i: np.exp(weights[i] - best) for i in ranked}
    total = sum(mass.values())
    kept, reached = {}, 0.0
    for i in ranked:
        if reached >= top_p:
            break
        kept[i] = mass[i] / total
        reached += kept[i]
    kept_total = sum(kept.values())
    p = np.zeros(len(logits))
    for i, mass_i in kept.items():
        p[i] = mass_i / kept_total
    return p


def distribution(logits, settings):
    """What `candidates` gives, as probabilities over the vocabulary."""
    scaled, ids = sampling.candidates(jnp.asarray(logits)[None], settings)
    p = np.zeros(len(logits))
    np.add.at(p, np.asarray(ids[0]), np.asarray(jax.nn.softmax(scaled[0])))
    return p


# Probabilities 0.4, 0.3, 0.2, 0.08, 0.02 at ids 3, 1, 4, 0, 2.
SKEWED = np.log(np.array([0.08, 0.3, 0.02, 0.4, 0.2], np.float32))


@pytest.mark.parametrize(
    "settings, expected",
    [
        (Sampling(forbidden=()), [0.08, 0.3, 0.02, 0.4, 0.2]),
        (Sampling(top_k=2, forbidden=()), [0, 3 / 7, 0, 4 / 7, 0]),
        (Sampling(top_k=2, forbidden=(3,)), [0, 0.6, 0, 0, 0.4]),
        (Sampling(forbidden=(), vocab_size=4), [0.1, 0.375, 0.025, 0.5, 0]),
        (Sampling(top_k=99, forbidden=()), [0.08, 0.3, 0.02, 0.4, 0.2]),
        (Sampling(top_p=0.69, forbidden=()), [0, 3 / 7, 0, 4 / 7, 0]),
        (Sampling(top_p=0.71, forbidden=()), [0, 3 / 9, 0, 4 / 9, 2 / 9]),
        (Sampling(top_p=1e-9, forbidden=()), [0, 0, 0, 1, 0]),
        # Top-k first: of 0.4 and 0.3 the first alone already has 4/7 > 0.55.
        (Sampling(top_k=2, top_p=0.55, forbidden=()), [0, 0, 0, 1, 0]),
        # Temperature before the nucleus: squared, 0.16 of 0.2968 is more than half.
        (Sampling(temperature=0.5, top_p=0.5, forbidden=()), [0, 0, 0, 1, 0]),
    ],
)
def test_hand_made_distributions(settings, expected):
    np.testing.assert_allclose(distribution(SKEWED, settings), expected, atol=1e-6)


@settings(max_examples=40, deadline=None)
@given(
    logits=st.lists(st.integers(-40, 40), min_size=7, max_size=7),
    temperature=st.sampled_from([0.3, 1.0, 2.5]),
    top_k=st.integers(0, 9),
    top_p=st.sampled_from([1e-6, 0.31, 0.77, 1.0]),
    forbidden=st.sampled_from([(), (0,), (2, 5)]),
)
def test_every_combination_agrees_with_the_oracle(logits, temperature, top_k, top_p, forbidden):
    # Tenths that differ by row, so that no cumulative probability sits on top_p to within rounding; ties stay ties.
    logits = np.array(logits, np.float32) / 10
    expected = oracle(logits, temperature, top_k, top_p, forbidden)
    reached = np.cumsum(np.sort(oracle(logits, temperature, top_k, 1.0, forbidden))[::-1])
    if top_p < 1 and np.min(np.abs(reached - top_p)) < 1e-5:
        return
    got = distribution(logits, Sampling(temperature, top_k, top_p, forbidden))
    np.testing.assert_allclose(got, expected, atol=2e-6)


@pytest.mark.slow
def test_draws_have_the_distribution():
    settings = Sampling(temperature=0.8, top_k=4, top_p=0.97, forbidden=(1,))
    draws = 40_000
    keys = jax.random.split(jax.random.key(0), draws)
    ids = jax.jit(lambda k: sampling.draw(jnp.broadcast_to(SKEWED, (draws, 5)), k, settings))(keys)
    frequencies = np.bincount(np.asarray(ids), minlength=5) / draws
    expected = oracle(SKEWED, 0.8, 4, 0.97, (1,))
    # Five standard deviations of the largest.
    np.testing.assert_allclose(frequencies, expected, atol=5 * 0.5 / np.sqrt(draws))
    assert frequencies[expected == 0].sum() == 0


def test_a_row_draws_the_same_whatever_is_beside_it():
    logits = jax.random.normal(jax.random.key(1), (6, 50))
    keys = jax.random.split(jax.random.key(2), 6)
    together = sampling.draw(logits, keys, Sampling(top_p=0.9))
    alone = [int(sampling.draw(logits[i : i + 1], keys[i : i + 1], Sampling(top_p=0.9))[0]) for i in range(6)]
    assert together.tolist() == alone


def test_greedy_takes_the_best_allowed_id():
    logits = jnp.array([[9.0, 1.0, 3.0, 3.0], [0.0, -5.0, -6.0, -4.0]])
    for greedy in (sampling.GREEDY, Sampling(top_k=1), Sampling(temperature=1e-12)):
        # Id 0 is forbidden by default; of equals the smaller id.
        assert sampling.draw(logits, None, greedy).tolist() == [2, 3]


def test_bfloat16_and_extreme_logits_do_not_overflow():
    logits = jnp.array([[3e38, -3e38, 3e38, 0.0]], jnp.bfloat16)
    scaled, _ = sampling.candidates(logits, Sampling(temperature=1e-3, forbidden=()))
    assert scaled.dtype == jnp.float32
    np.testing.assert_allclose(jax.nn.softmax(scaled[0]), [0.5, 0, 0.5, 0])


@pytest.mark.parametrize(
    "values, name",
    [
        ({"temperature": -1.0}, "temperature"),
        ({"temperature": float("nan")}, "temperature"),
        ({"top_k": -1}, "top_k"),
        ({"top_p": 0.0}, "top_p"),
        ({"top_p": 1.5}, "top_p"),
    ],
)
def test_values_out_of_range_are_named(values, name):
    with pytest.raises(UserError, match=name):
        Sampling(**values)


def test_a_vocabulary_without_allowed_ids_is_refused():
    with pytest.raises(UserError, match="forbidden"):
        sampling.allowed(jnp.zeros((1, 5)), Sampling(forbidden=(0, 1, 2), vocab_size=3))
