"""Windows, byte counts and the schedule of a mixture, against a loop over tokens and against seqio."""

import collections

import hypothesis
import numpy as np
import pytest
from hypothesis import strategies as st

from t5x_ssm.data import sources


def window_by_loop(documents, start, stop, length, segments):
    """The definition: one token after the other."""
    stream = [(token, d, i == 0) for d, document in enumerate(documents) for i, token in enumerate(document)]
    example = collections.defaultdict(lambda: [0] * length)
    segment = position = 0
    for at, (token, _, first) in enumerate(stream[start:stop]):
        begins = at == 0 or (first and segments)
        segment, position = (segment + 1, 0) if begins else (segment, position + 1)
        example["decoder_target_tokens"][at] = token
        example["decoder_input_tokens"][at] = 0 if begins else stream[start + at - 1][0]
        example["decoder_loss_weights"][at] = 1
        example["decoder_segment_ids"][at] = segment
        example["decoder_positions"][at] = position
    keys = ["decoder_input_tokens", "decoder_target_tokens", "decoder_loss_weights"]
    keys += ["decoder_segment_ids", "decoder_positions"] if segments else []
    return {key: np.array(example[key], np.int32) for key in keys}


def assert_equal(found, expected):
    assert set(found) == set(expected)
    for name, value in expected.items():
        assert found[name].dtype == np.int32
        np.testing.assert_array_equal(found[name], value, err_msg=name)


@hypothesis.given(
    lengths=st.lists(st.integers(0, 9), min_size=1, max_size=12),
    length=st.integers(1, 12),
    segments=st.booleans(),
)
@hypothesis.settings(
    max_examples=60, deadline=None, suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture]
)
def test_windows_equal_a_loop_over_tokens(lengths, length, segments, make_cache, tmp_path_factory):
    hypothesis.assume(sum(lengths) >= length)
    documents = [[10 * d + i + 1 for i in range(n)] for d, n in enumerate(lengths)]
    path = make_cache({"task": {"train": documents}}, root=tmp_path_factory.mktemp("cache"))
    (stream,) = sources.CachedMixture(path, "train").streams
    windows = sources.WindowSource(stream, length, segments=segments)
    assert len(windows) == sum(lengths) // length
    for index in range(len(windows)):
        expected = window_by_loop(documents, index * length, (index + 1) * length, length, segments)
        assert_equal(windows[index], expected)
    # The padded end of an evaluation.
    start = len(windows) * length
    expected = window_by_loop(documents, start, sum(lengths), length, segments)
    if start < sum(lengths):
        assert_equal(stream.window(start, sum(lengths), length, segments=segments), expected)


def test_window_equals_seqio_packing(make_cache):
    """Where documents fill the window, as seqio's converter packs them."""
    import seqio
    import tensorflow as tf

    documents = [[3, 9, 4, 1], [4, 1], [8, 7, 1]]
    (stream,) = sources.CachedMixture(make_cache({"task": {"train": documents}}), "train").streams
    dataset = tf.data.Dataset.from_generator(
        lambda: ({"targets": np.array(d, np.int32)} for d in documents),
        output_signature={"targets": tf.TensorSpec([None], tf.int32)},
    )
    (expected,) = seqio.DecoderFeatureConverter(pack=True)(dataset, {"targets": 9}).as_numpy_iterator()
    assert_equal(stream.window(0, 9, 9), expected)


def test_padding_is_zero(make_cache):
    (stream,) = sources.CachedMixture(make_cache({"task": {"train": [[5, 6], [7]]}}), "train").streams
    for example in (stream.window(3, 3, 4), stream.window(3, 3, 4, segments=False)):
        assert all(not value.any() and value.shape == (4,) for value in example.values())


@hypothesis.given(lengths=st.lists(st.integers(0, 30), min_size=1, max_size=10), data=st.data())
@hypothesis.settings(
    max_examples=40, deadline=None, suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture]
)
def test_bytes_before_is_exact_at_documents_and_monotone(lengths, data, make_cache, tmp_path_factory):
    # One EOS per document, which stands for no byte.
    documents = [[3] * n + [1] for n in lengths]
    path = make_cache({"task": {"train": documents}}, root=tmp_path_factory.mktemp("cache"))
    (stream,) = sources.CachedMixture(path, "train").streams
    ends = np.cumsum([0] + [len(d) for d in documents])
    np.testing.assert_array_equal(stream.bytes_before(ends), np.cumsum([0, *lengths]))
    assert stream.num_bytes == sum(lengths)
    everywhere = stream.bytes_before(np.arange(ends[-1] + 1))
    assert (np.diff(everywhere) >= 0).all()
    true = np.concatenate([[0], np.cumsum(np.concatenate([np.array(d) > 2 for d in documents]))])
    assert np.abs(everywhere - true).max() <= 1


def counts(schedule, start, stop):
    """How often each stream comes in a range of rows; checks that its own rows are consecutive."""
    seen = collections.Counter()
    following = {}
    for row in range(start, stop):
        which, index = schedule[row]
        assert index == following.get(which, index)
        following[which] = index + 1
        seen[which] += 1
    return seen


@hypothesis.given(
    rates=st.lists(st.floats(0.01, 10), min_size=1, max_size=6), start=st.integers(0, 10**12), rows=st.integers(0, 300)
)
@hypothesis.settings(max_examples=60, deadline=None)
def test_rates_hold(rates, start, rows):
    schedule = sources.ProportionalSchedule(rates)
    shares = np.array(rates) / sum(rates)
    window = counts(schedule, start, start + rows)
    beginning = counts(schedule, 0, rows)
    for which, share in enumerate(shares):
        assert abs(beginning[which] - rows * share) < (1 + 1e-6 if len(rates) <= 3 else 2)
        allowed = {1: 1e-6, 2: 1 + 1e-3, 3: 2}.get(len(rates), 4)
        assert abs(window[which] - rows * share) <= allowed


@pytest.mark.parametrize("rates", [[1, 2, 1], [0.25, 0.5, 0.25], [3, 1], [0.1, 0.9], [1, 1, 1, 1]])
def test_rates_hold_within_one_row_in_every_window(rates):
    schedule = sources.ProportionalSchedule(rates)
    chosen = np.array([schedule[row][0] for row in range(80)])
    for which, rate in enumerate(rates):
        taken = np.concatenate([[0], np.cumsum(chosen == which)])
        for size in range(1, 81):
            assert np.abs(taken[size:] - taken[:-size] - size * rate / sum(rates)).max() < 1 + 1e-9


def test_rates_are_exact_in_the_long_run():
    """0.1 : 0.2 : 0.7 as written, not as the binary fractions next to them, and no drift after 10**15 rows."""
    schedule = sources.ProportionalSchedule([0.1, 0.2, 0.7])
    rows = 10**15
    firsts = {}
    for row in range(rows, rows + 20):
        which, index = schedule[row]
        firsts.setdefault(which, index)
    assert firsts == {0: rows // 10, 1: rows // 5, 2: rows // 10 * 7}


def test_rates_must_be_positive():
    for rates in ([], [1, 0], [1, -1], [float("nan")], [float("inf"), 1]):
        with pytest.raises(ValueError, match="must be positive"):
            sources.ProportionalSchedule(rates)


@pytest.fixture
def mixture(make_cache, counting_documents):
    tasks = {"one": {"train": counting_documents(96)}, "two": {"train": counting_documents(41, first=200)}}
    return sources.CachedMixture(make_cache(tasks, rates=[2.0, 1.0]), "train")


def first_tokens(rows, numbers):
    return [int(rows[number]["decoder_target_tokens"][0]) for number in numbers]


def test_an_epoch_is_every_window_once_and_the_next_is_in_another_order(mixture):
    rows = sources.training_rows(mixture, 8, seed=5)
    firsts = first_tokens(rows, range(72))
    one = [token for token in firsts if token < 200]
    two = [token for token in firsts if token >= 200]
    assert (len(one), len(two)) == (48, 24)
    every = list(range(3, 99, 8))
    epochs = [one[e * 12 : (e + 1) * 12] for e in range(4)]
    assert all(sorted(epoch) == every for epoch in epochs)
    assert len({tuple(epoch) for epoch in [*epochs, every]}) == 5
    # 41 tokens hold five windows; the sixth would be short.
    assert sorted(two[:5]) == list(range(200, 240, 8))
    unshuffled = sources.training_rows(mixture, 8, seed=5, shuffle=False)
    assert [t for t in first_tokens(unshuffled, range(36)) if t < 200] == every * 2


def test_seeds_give_unrelated_orders(mixture):
    orders = {}
    for seed in range(4):
        rows = sources.training_rows(mixture, 8, seed=seed)
        one = [token for token in first_tokens(rows, range(54)) if token < 200]
        for epoch in range(3):
            orders[tuple(one[epoch * 12 : (epoch + 1) * 12])] = (seed, epoch)
    assert len(orders) == 12
    rows = sources.training_rows(mixture, 8, seed=-(10**20))
    assert sorted(first_tokens(rows, range(18)))[:12] == list(range(3, 99, 8))


def test_any_row_is_reached_directly(mixture):
    rows, again = (sources.training_rows(mixture, 8, seed=1) for _ in range(2))
    for number in (10**12, 3, 10**12 + 1, 0):
        assert_equal(rows[number], again[number])
    firsts = first_tokens(rows, range(18 * 10**9, 18 * 10**9 + 18))
    assert sorted(token for token in firsts if token < 200) == list(range(3, 99, 8))


def test_contents_and_rates_are_in_the_checksum(make_cache, counting_documents, tmp_path):
    def checksum(name, first=3, rate=1.0):
        tasks = {"task": {"train": counting_documents(20, first=first)}, "other": {"train": [[9] * 9]}}
        return sources.CachedMixture(make_cache(tasks, [rate, 1.0], root=tmp_path / name), "train").checksum

    for name in "abcd":
        (tmp_path / name).mkdir()
    first = checksum("a")
    assert first == checksum("b")
    assert len({first, checksum("c", first=4), checksum("d", rate=2.0)}) == 3


def test_errors_name_the_cause(make_cache):
    path = make_cache({"task": {"train": [[5, 6, 1]], "validation": []}})
    with pytest.raises(ValueError, match=r"'task' has no split 'test'; it has train, validation"):
        sources.CachedMixture(path, "test")
    (stream,) = sources.CachedMixture(path, "train").streams
    with pytest.raises(ValueError, match=r"'task' has 3 tokens, fewer than one window .*= 4"):
        sources.WindowSource(stream, 4)
    (empty,) = sources.CachedMixture(path, "validation").streams
    assert len(empty) == 0 and empty.num_bytes == 0
    tokens = path.parent.parent / "task/made/train/00000/tokens.bin"
    tokens.write_bytes(b"\0" * 6)
    sources.CachedMixture(path, "train")
    with pytest.raises(ValueError, match=r"tokens\.bin does not have its recorded checksum"):
        sources.CachedMixture(path, "train", checksums=True)
    tokens.write_bytes(b"\0" * 5)
    with pytest.raises(ValueError, match=r"tokens\.bin has 5 bytes instead of 6"):
        sources.CachedMixture(path, "train")
