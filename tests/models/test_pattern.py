"""The pattern language: what it reads, what it refuses, and the cut into scans against a search through all cuts."""

import functools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from t5x_ssm.errors import UserError
from t5x_ssm.models.pattern import Segment, parse, segments


def test_published_patterns():
    assert parse("gss*3 chunk", 8) == ("gss", "gss", "gss", "chunk") * 2
    assert parse("spade swa*15", 16) == ("spade",) + ("swa",) * 15
    assert parse("h3 attn h3*6 attn h3*3") == ("h3", "attn", *["h3"] * 6, "attn", *["h3"] * 3)
    assert segments(parse("gss*3 chunk", 32)) == (Segment(("gss", "gss", "gss", "chunk"), 8),)
    assert segments(parse("spade swa*15")) == (Segment(("spade",), 1), Segment(("swa",), 15))
    # Five layer bodies, whichever way; four scans are fewer than five.
    cut = segments(parse("h3 attn h3*6 attn h3*3"))
    assert cut == (Segment(("h3", "attn"), 1), Segment(("h3",), 6), Segment(("attn",), 1), Segment(("h3",), 3))


@pytest.mark.parametrize(
    ("pattern", "depth", "message"),
    [
        ("", None, "empty"),
        ("  ", 4, "empty"),
        ("gss*", None, r"cannot read 'gss\*'"),
        ("gss*x", None, "cannot read"),
        ("gss * 3", None, r"cannot read '\*'"),
        ("3gss", None, "cannot read"),
        ("gss,attn", None, "cannot read"),
        ("gss*-1", None, "cannot read"),
        ("gss*0", None, "repeats a layer 0 times"),
        ("gss mamba", None, "no mixer is named 'mamba'; there are attn, gss"),
        ("gss*3 attn", 6, "4 layers, which do not repeat to a depth of 6"),
        ("gss", 0, "depth of 0"),
    ],
)
def test_what_cannot_be_read(pattern, depth, message):
    with pytest.raises(UserError, match=message):
        parse(pattern, depth, known=("gss", "attn"))


items = st.lists(st.tuples(st.sampled_from(["a", "b1", "C_d"]), st.integers(1, 4)), min_size=1, max_size=5)


@given(items, st.integers(1, 3))
@settings(max_examples=60, deadline=None)
def test_a_pattern_says_what_it_writes(items, repeats):
    text = " ".join(name if count == 1 else f"{name}*{count}" for name, count in items)
    once = tuple(name for name, count in items for _ in range(count))
    assert parse(text) == once
    assert parse(text, len(once) * repeats) == once * repeats


@functools.cache
def cheapest(layers):
    """(bodies, scans) of the best cut, found by trying every first segment."""
    if not layers:
        return (0, 0)
    best = None
    for period in range(1, len(layers) + 1):
        repeats = 1
        while layers[: period * repeats] == layers[:period] * repeats and period * repeats <= len(layers):
            bodies, count = cheapest(layers[period * repeats :])
            best = min(filter(None, [best, (bodies + period, count + 1)]))
            repeats += 1
    return best


@given(st.lists(st.sampled_from("ab"), min_size=1, max_size=12).map(tuple))
@settings(max_examples=150, deadline=None)
def test_segments_expand_to_the_stack_at_the_least_cost(layers):
    cut = segments(layers)
    assert sum(((*s.period,) * s.repeats for s in cut), ()) == layers
    assert (sum(len(s.period) for s in cut), len(cut)) == cheapest(layers)
