"""The generation benchmark at a tiny size: equal parameters, and the bytes that caches must have."""

import argparse

import pytest

from benchmarks import generation

FLAGS = argparse.Namespace(
    layers=2,
    width=32,
    heads=2,
    vocab=259,
    batch=2,
    prompts="8",
    new_tokens=4,
    steps_per_call=2,
    dtype="float32",
    repeats=2,
)


@pytest.mark.slow
def test_both_networks_are_of_equal_size_and_keep_what_they_must():
    both = generation.generators(FLAGS)
    sizes = {kind: generation.size(generator.network) for kind, generator in both.items()}
    # Half of 8 of a feed-forward width: two projections and a bias in each of two layers.
    assert abs(sizes["hybrid"] - sizes["transformer"]) <= 4 * 2 * (2 * 32 + 1)
    found = {kind: generation.bytes_a_sequence(generator, 2, 12) for kind, generator in both.items()}
    attention = 2 * 12 * 32 * 4 + 4  # keys and values of 12 tokens, and how many there are
    states = 32 * 64 * 4 + 32 * 2 * 32 * 4  # taps, and 32 complex modes, of 32 channels
    assert found == {"hybrid": attention + states, "transformer": 2 * attention}


@pytest.mark.nightly
def test_both_are_measured_in_turns():
    row = generation.measure(FLAGS)["prompts"]["8"]
    assert row["times_transformer_writing"]["repeats"] == 2
    for what in ("writing", "all"):
        assert 0 < row[f"times_transformer_{what}"]["min"] <= row[f"times_transformer_{what}"]["max"]
    speeds = {what: row[f"tokens_per_second_{what}"]["hybrid"]["median"] for what in ("writing", "all")}
    assert speeds["all"] < speeds["writing"], "reading the prompt takes no time"
