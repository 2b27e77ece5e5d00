"""A live seqio pipeline: exact resume through its saved iterator, and what it refuses."""

import dataclasses
import json

import numpy as np
import pytest

from t5x_ssm.data import live
from t5x_ssm.data.feed import DatasetConfig, open_feed

CONFIG = DatasetConfig("live_mixture", {"targets": 16}, "train", 4, source="seqio")


@pytest.fixture(scope="module", autouse=True)
def registered_tasks():
    import seqio
    import tensorflow as tf

    from tasks.vocabularies import byte_vocabulary

    def texts(prefix):
        return [f"{prefix}{i:03d}".encode() * (1 + i % 3) for i in range(60)]

    for name, features in {"live_a": ["targets"], "live_b": ["targets"], "live_pairs": ["inputs", "targets"]}.items():

        def open_texts(split, shuffle_files, seed=None, name=name, features=tuple(features)):
            return tf.data.Dataset.from_tensor_slices({f: texts(name[-1] + f[0]) for f in features})

        seqio.TaskRegistry.add(
            name,
            source=seqio.FunctionDataSource(open_texts, splits=("train",)),
            preprocessors=[seqio.preprocessors.tokenize, seqio.preprocessors.append_eos],
            output_features={f: seqio.Feature(vocabulary=byte_vocabulary()) for f in features},
            shuffle_buffer_size=20,
        )
    seqio.MixtureRegistry.add("live_mixture", [("live_a", 2), ("live_b", 1)])


@pytest.fixture
def often(monkeypatch):
    """Iterators are saved every third batch."""
    monkeypatch.setattr(live, "SNAPSHOT_PERIOD", 3)


def take(feed, count):
    return [feed.next() for _ in range(count)]


def assert_same(found, expected):
    assert set(found) == set(expected)
    for name in expected:
        np.testing.assert_array_equal(found[name], expected[name])


@pytest.mark.slow
def test_resume_gives_the_same_shuffled_batches(often):
    with open_feed(CONFIG, seed=4, prefetch=3) as feed:
        states, batches = [], []
        for _ in range(11):
            states.append(json.loads(json.dumps(feed.state())))
            batches.append(feed.next())
    assert len({batch["decoder_target_tokens"].tobytes() for batch in batches}) == 11
    for at in (2, 3, 7):
        # The iterator is saved with the batch that follows it, so at step 3 the one of step 0 is the newest.
        assert states[at]["step"] == at and states[at]["skip"] == (at and (at - 1) % 3 + 1)
        assert (states[at]["iterator"] is None) == (at <= 3)
        with open_feed(CONFIG, seed=4) as resumed:
            resumed.restore(states[at])
            assert resumed.state() == states[at]
            found = take(resumed, 11 - at)
            # Resumed feeds save again, at the same steps.
            later = resumed.state()
        for batch, expected in zip(found, batches[at:], strict=True):
            assert_same(batch, expected)
        assert (later["step"], later["skip"]) == (11, 2)
    with open_feed(CONFIG, seed=4) as second:
        second.restore(later)
        with open_feed(CONFIG, seed=4) as straight:
            expected = take(straight, 13)[11:]
        for batch, other in zip(take(second, 2), expected, strict=True):
            assert_same(batch, other)
    assert len(json.dumps(later)) < 2**20


def test_batches_are_seqios(often):
    """Packed, with the features and types of the token cache's."""
    with open_feed(CONFIG, seed=1) as feed:
        batch = feed.next()
        assert feed.wait_seconds > 0 and feed.vocabulary["size"] == 259
    names = {"input_tokens", "target_tokens", "loss_weights", "segment_ids", "positions"}
    assert set(batch) == {f"decoder_{name}" for name in names}
    assert all(value.shape == (4, 16) and value.dtype == np.int32 for value in batch.values())
    assert batch["decoder_segment_ids"].max() > 1
    with open_feed(CONFIG, seed=2) as other:
        assert not np.array_equal(other.next()["decoder_target_tokens"], batch["decoder_target_tokens"])
    with open_feed(dataclasses.replace(CONFIG, pack=False), seed=1) as feed:
        assert "decoder_segment_ids" not in feed.next()


def test_processes_read_different_documents(often):
    def texts(index, count):
        with open_feed(CONFIG, seed=1, process_index=index, process_count=count) as feed:
            batches = take(feed, 2)
        assert batches[0]["decoder_target_tokens"].shape == (4 // count, 16)
        rows = np.concatenate([batch["decoder_target_tokens"] for batch in batches])
        return {bytes(t - 3 for t in part if t > 2) for row in rows.tolist() for part in split_at_eos(row)}

    assert not texts(0, 2) & texts(1, 2)


def split_at_eos(row):
    parts = [[]]
    for token in row:
        if token > 1:
            parts[-1].append(token)
        elif parts[-1]:
            parts.append([])
    return [part for part in parts if part]


def test_another_number_of_processes_is_refused_and_says_what_to_do():
    with open_feed(CONFIG, seed=1) as feed:
        state = feed.state()
    with (
        open_feed(CONFIG, seed=1, process_count=2) as feed,
        pytest.raises(ValueError, match=r"as many processes as it was saved with \(1, now 2\).*source='cache'"),
    ):
        feed.restore(state)
    with open_feed(CONFIG, seed=2) as feed, pytest.raises(ValueError, match="seed: saved 1, now 2"):
        feed.restore(state)
    with open_feed(CONFIG, seed=1) as feed, pytest.raises(ValueError, match=r"tensorflow: saved '0\.1'"):
        feed.restore({**state, "tensorflow": "0.1"})


def test_wrong_names_and_features_are_told_apart():
    def message(**changes):
        with pytest.raises(ValueError) as caught:
            open_feed(dataclasses.replace(CONFIG, **changes))
        return str(caught.value)

    assert "The nearest names: live_mixture" in message(mixture_or_task_name="live_mixtur")
    assert "has no split 'test'; it has train" in message(split="test")
    text = message(mixture_or_task_name="live_pairs")
    assert "['targets']" in text and "['inputs', 'targets']" in text and "'inputs' is in one of them only" in text
    assert "Cannot import 'no_such_module'" in message(module="no_such_module")


def test_prefix_language_model_batches():
    """Tasks with inputs pass through; seqio's converter joins inputs and targets."""
    config = dataclasses.replace(
        CONFIG, mixture_or_task_name="live_pairs", task_feature_lengths={"inputs": 8, "targets": 8}, pack=False
    )
    with open_feed(config, seed=0) as feed:
        batch = feed.next()
    assert batch["decoder_target_tokens"].shape == (4, 16)
    assert batch["decoder_loss_weights"].sum() < (batch["decoder_target_tokens"] != 0).sum()
