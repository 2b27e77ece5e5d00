"""The generation benchmark at a tiny size: equal parameters, and the bytes that a Transformer's cache must have."""

import argparse

import pytest

from benchmarks import generation


@pytest.mark.slow
def test_both_networks_are_measured_at_equal_size():
    flags = argparse.Namespace(
        layers=4,
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
    found = generation.measure(flags)
    sizes = found["parameters"]
    # Half of 8 of a feed-forward width: two projections and a bias in each of four layers.
    assert abs(sizes["hybrid"] - sizes["transformer"]) <= 4 * 4 * (2 * 32 + 1)
    row = found["prompts"]["8"]
    per_layer = 2 * 12 * 32 * 4 + 4  # keys and values of 12 tokens, and how many there are
    assert row["bytes_a_sequence"]["transformer"] == 4 * per_layer
    states = 32 * 64 * 4 + 32 * 2 * 32 * 4  # taps, and 32 complex modes, of 32 channels
    assert row["bytes_a_sequence"]["hybrid"] == 2 * per_layer + 2 * states
    assert row["times_transformer_writing"]["repeats"] == 2
    assert 0 < row["times_transformer_writing"]["min"] <= row["times_transformer_writing"]["max"]
