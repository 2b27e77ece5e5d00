"""Feeds of the token cache: resume, processes, evaluation, errors, and what they import."""

import dataclasses
import json
import math
import os
import pathlib
import subprocess
import sys
import time

import numpy as np
import pytest

from t5x_ssm.data import feed as feed_lib
from t5x_ssm.data import made_cache
from t5x_ssm.data.feed import DatasetConfig
from t5x_ssm.data.prefetch import Prefetcher
from tasks import cache

ROOT = pathlib.Path(feed_lib.__file__).parents[2]


@pytest.fixture
def config(make_cache, counting_documents, tmp_path):
    tasks = {
        "one": {"train": counting_documents(96), "validation": counting_documents(45)},
        "two": {"train": counting_documents(41, first=200), "validation": counting_documents(7)},
    }
    make_cache(tasks, rates=[2.0, 1.0])
    return DatasetConfig("mixture", {"targets": 8}, "train", 4, cache_dir=tmp_path)


def assert_same(found, expected):
    assert set(found) == set(expected)
    for name in expected:
        np.testing.assert_array_equal(found[name], expected[name])


def take(feed, count):
    return [feed.next() for _ in range(count)]


def test_batch_shapes_and_names(config):
    with feed_lib.open_feed(config) as feed:
        batch = feed.next()
    names = {"input_tokens", "target_tokens", "loss_weights", "segment_ids", "positions"}
    assert set(batch) == {f"decoder_{name}" for name in names}
    assert all(value.shape == (4, 8) and value.dtype == np.int32 for value in batch.values())
    with feed_lib.open_feed(dataclasses.replace(config, pack=False)) as feed:
        plain = feed.next()
    assert set(plain) == {"decoder_input_tokens", "decoder_target_tokens", "decoder_loss_weights"}
    np.testing.assert_array_equal(plain["decoder_target_tokens"], batch["decoder_target_tokens"])
    np.testing.assert_array_equal(plain["decoder_input_tokens"][:, 1:], plain["decoder_target_tokens"][:, :-1])


def test_state_belongs_to_the_next_batch_and_not_to_the_prefetcher(config):
    with feed_lib.open_feed(config, seed=3, prefetch=4) as feed:
        take(feed, 5)
        deadline = time.monotonic() + 30
        while feed.ready < 4 and time.monotonic() < deadline:
            time.sleep(0.01)
        assert feed.ready == 4
        state = json.loads(json.dumps(feed.state()))
        expected = take(feed, 6)
        assert state["step"] == 5 and feed.state()["step"] == 11
    with feed_lib.open_feed(config, seed=3) as resumed:
        resumed.restore(state)
        assert resumed.state() == state
        for batch in expected:
            assert_same(resumed.next(), batch)
        # And back again in the same feed, which is a while ahead.
        resumed.restore(state)
        assert_same(resumed.next(), expected[0])
        assert resumed.wait_seconds > 0


def test_a_closed_feed_goes_on_with_the_same_batch(config):
    with feed_lib.open_feed(config) as feed:
        expected = take(feed, 4)
    feed = feed_lib.open_feed(config)
    found = take(feed, 2)
    feed.close()
    feed.close()
    found += take(feed, 2)
    feed.close()
    for batch, other in zip(found, expected, strict=True):
        assert_same(batch, other)


def test_start_does_not_depend_on_how_far_the_run_was(config, monkeypatch):
    """Restored at step 10**12 of a feed, only the batches from there on are read."""
    from t5x_ssm.data import sources

    calls = []
    window = sources.WindowSource.__getitem__
    monkeypatch.setattr(sources.WindowSource, "__getitem__", lambda self, i: calls.append(i) or window(self, i))
    with feed_lib.open_feed(config, prefetch=1) as feed:
        feed.restore({**feed.state(), "step": 10**12})
        feed.next()
    assert 4 <= len(calls) <= 4 * 3


@pytest.mark.parametrize("count", [2, 4])
def test_global_batch_does_not_depend_on_the_number_of_processes(config, count):
    with feed_lib.open_feed(config, seed=9) as alone:
        expected = take(alone, 3)
        state = alone.state()
        following = alone.next()
    feeds = [feed_lib.open_feed(config, seed=9, process_index=i, process_count=count) for i in range(count)]
    for batch in expected:
        parts = [feed.next() for feed in feeds]
        assert_same({name: np.concatenate([part[name] for part in parts]) for name in batch}, batch)
    # A position taken on one process continues on several.
    for feed in feeds:
        feed.restore(state)
    parts = [feed.next() for feed in feeds]
    assert_same({name: np.concatenate([part[name] for part in parts]) for name in following}, following)
    for feed in feeds:
        feed.close()


def test_own_seed_of_the_config_comes_before_the_runs(config):
    with feed_lib.open_feed(config, seed=1) as a, feed_lib.open_feed(config, seed=2) as b:
        assert not np.array_equal(
            [x["decoder_target_tokens"] for x in take(a, 3)], [x["decoder_target_tokens"] for x in take(b, 3)]
        )
    own = dataclasses.replace(config, seed=7)
    with feed_lib.open_feed(own, seed=1) as a, feed_lib.open_feed(own, seed=2) as b:
        assert a.state() == b.state() and a.state()["seed"] == 7


def test_positions_of_other_data_or_settings_are_refused(config):
    with feed_lib.open_feed(config, seed=1) as feed:
        state = feed.state()
    for change, message in {
        "seed": "seed: saved 1, now 2",
        "batch_size": "batch_size: saved 4, now 8",
        "length": "length: saved 8, now 4",
        "shuffle": "shuffle: saved True, now False",
    }.items():
        other = {
            "batch_size": dataclasses.replace(config, batch_size=8),
            "length": dataclasses.replace(config, task_feature_lengths={"targets": 4}),
            "shuffle": dataclasses.replace(config, shuffle=False),
        }.get(change, config)
        with (
            feed_lib.open_feed(other, seed=2 if change == "seed" else 1) as feed,
            pytest.raises(ValueError, match=message),
        ):
            feed.restore(state)
    with feed_lib.open_feed(config, seed=1) as feed, pytest.raises(ValueError, match="data: saved 'other', now"):
        feed.restore({**state, "data": "other"})
    with feed_lib.open_feed(config, seed=1) as feed, pytest.raises(ValueError, match="kind: saved 'seqio'"):
        feed.restore({"kind": "seqio"})


def test_prefetcher_reraises_after_the_items_before_the_failure():
    def produce(index):
        if index == 2:
            raise OSError("disk gone")
        return index

    prefetcher = Prefetcher(produce, depth=3)
    assert [prefetcher.next(), prefetcher.next()] == [0, 1]
    for _ in range(2):
        with pytest.raises(OSError, match="disk gone"):
            prefetcher.next()
    prefetcher.close()
    closed = Prefetcher(lambda index: index, depth=1)
    closed.close()
    with pytest.raises(RuntimeError, match="closed"):
        closed.next()
    with pytest.raises(ValueError, match="at least 1"):
        Prefetcher(produce, depth=0)


def test_a_read_error_reaches_the_training_loop(config, monkeypatch):
    feed = feed_lib.open_feed(config)
    monkeypatch.setattr(feed, "batch", lambda step: (_ for _ in ()).throw(OSError("disk gone")))
    with feed, pytest.raises(OSError, match="disk gone"):
        feed.next()


@pytest.mark.parametrize("length", [8, 16, 64, 3])
@pytest.mark.parametrize("processes", [1, 2])
def test_evaluation_sees_every_token_once_and_counts_bytes(config, counting_documents, length, processes):
    config = dataclasses.replace(config, split="validation", shuffle=False, task_feature_lengths={"targets": length})
    feeds = [feed_lib.open_evaluation(config, process_index=i, process_count=processes) for i in range(processes)]
    assert set(feeds[0]) == {"one", "two"}
    for task, tokens in {"one": range(3, 48), "two": range(3, 10)}.items():
        batches = list(zip(*(feed[task] for feed in feeds), strict=True))
        assert len(batches) == feeds[0][task].num_batches == math.ceil(len(tokens) / (4 * length))
        seen = []
        for number, parts in enumerate(batches):
            batch = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
            assert batch["decoder_target_tokens"].shape == (4, length)
            weights = batch["decoder_loss_weights"]
            seen += batch["decoder_target_tokens"][weights == 1].tolist()
            assert not batch["decoder_target_tokens"][weights == 0].any()
            np.testing.assert_array_equal(batch["decoder_segment_ids"] == 0, weights == 0)
            # Every token of these documents is one byte.
            assert feeds[0][task].num_tokens(number + 1) == feeds[0][task].num_bytes(number + 1) == len(seen)
        assert seen == list(tokens)
        assert feeds[0][task].num_bytes() == feeds[0][task].num_tokens() == len(tokens)


def test_uniform_bits_per_byte_are_exact(config, make_cache, tmp_path):
    """A model that spreads its probability evenly over 256 tokens costs 8 bits per token, EOS included."""
    documents = [[65] * 10 + [1], [66] * 6 + [1]]
    make_cache({"text": {"validation": documents}}, name="alone", root=tmp_path)
    alone = dataclasses.replace(config, mixture_or_task_name="alone", split="validation", shuffle=False)
    (evaluation,) = feed_lib.open_evaluation(alone).values()
    nats = sum(int(batch["decoder_loss_weights"].sum()) for batch in evaluation) * math.log(256)
    assert nats / math.log(2) / evaluation.num_bytes() == pytest.approx(8 * 18 / 16)


def test_bytes_per_token_follow_the_rates(config, make_cache, tmp_path):
    tasks = {"plain": {"train": [[65] * 20]}, "ended": {"train": [[65, 1] * 10]}}
    make_cache(tasks, rates=[1.0, 3.0], name="uneven", root=tmp_path)
    with feed_lib.open_feed(dataclasses.replace(config, mixture_or_task_name="uneven")) as feed:
        assert feed.bytes_per_token == pytest.approx((1 * 1.0 + 3 * 0.5) / 4)


def test_settings_that_cannot_be_followed_are_named(config):
    for change, message in {
        "task_feature_lengths": ({"inputs": 8}, "TASK_FEATURE_LENGTHS must have a length for 'targets'"),
        "batch_size": (6, r"BATCH_SIZE must be .* multiple of the number of processes \(4\), but it is 6"),
        "source": ("tfds", "DatasetConfig.source must be 'cache' or 'seqio', but it is 'tfds'"),
        "use_cached": (True, r"USE_CACHED_TASKS .* Set it to False"),
        "split": ("test", "'one' has no split 'test'; it has train, validation"),
    }.items():
        value, text = message
        with pytest.raises(ValueError, match=text):
            feed_lib.open_feed(dataclasses.replace(config, **{change: value}), process_count=4)
    for lengths, text in [
        ({"targets": 0}, "positive integer, but it is 0"),
        ({"targets": 8.0}, r"positive integer, but it is 8\.0"),
        ({"targets": 8, "inputs": 8}, "does not hold pairs of 'inputs' and 'targets'"),
        ({"targets": 8, "answers": 8}, "has the feature 'targets', or 'inputs' and 'targets', but"),
        ({"targets": 97}, r"'one' has 96 tokens, fewer than one window .*= 97"),
    ]:
        with pytest.raises(ValueError, match=text):
            feed_lib.open_feed(dataclasses.replace(config, task_feature_lengths=lengths))
    with pytest.raises(ValueError, match=r"DatasetConfig\.shuffle=False"):
        feed_lib.open_evaluation(dataclasses.replace(config, split="validation"))
    with pytest.raises(ValueError, match=r"DatasetConfig\.source='cache'"):
        feed_lib.open_evaluation(dataclasses.replace(config, source="seqio", shuffle=False))


def test_vocabulary_mismatch(config):
    with feed_lib.open_feed(config) as feed:
        vocabulary = feed.vocabulary
    feed_lib.check_vocabulary(vocabulary, embedding_size=259, expected_hash=vocabulary["hash"])
    feed_lib.check_vocabulary(vocabulary, embedding_size=384)
    with pytest.raises(ValueError, match=r"ByteVocabulary, 259 ids.* model's vocabulary size 258"):
        feed_lib.check_vocabulary(vocabulary, embedding_size=258)
    with pytest.raises(ValueError, match="not the one that the checkpoint was trained with"):
        feed_lib.check_vocabulary(vocabulary, expected_hash="other")


def test_damaged_cache_is_named(config):
    path = pathlib.Path(config.cache_dir) / "two/made/train/00000/offsets.npy"
    path.write_bytes(path.read_bytes()[:-8])
    with pytest.raises(ValueError, match=r"two/made/train/00000/offsets\.npy has .* bytes instead of"):
        feed_lib.open_feed(config)


def test_first_process_makes_the_cache_while_the_others_wait(config, make_cache, tmp_path, monkeypatch):
    events = []
    other = tmp_path / "elsewhere"
    other.mkdir()

    def make(name, cache_dir, module):
        events.append("made")
        return make_cache({"one": {"train": [[5] * 9]}}, name=name, root=cache_dir)

    monkeypatch.setattr(made_cache, "make", make)
    missing = dataclasses.replace(config, cache_dir=other)
    feed_lib.open_feed(missing, process_index=0, process_count=2, barrier=lambda: events.append("barrier"))
    assert events == ["made", "barrier"]
    feed_lib.open_feed(missing, process_index=1, process_count=2, barrier=lambda: events.append("barrier"))
    assert events == ["made", "barrier", "barrier"]
    # On a disk of its own, process 1 finds nothing after the barrier and makes its cache.
    own = tmp_path / "own"
    own.mkdir()
    apart = dataclasses.replace(config, cache_dir=own)
    feed_lib.open_feed(apart, process_index=1, process_count=2, barrier=lambda: events.append("barrier"))
    assert events[-2:] == ["barrier", "made"]
    # A failure on process 0 does not leave the others waiting.
    monkeypatch.setattr(made_cache, "make", lambda *_: (_ for _ in ()).throw(ValueError("no such task")))
    nowhere = dataclasses.replace(config, cache_dir=tmp_path / "nowhere")
    with pytest.raises(ValueError, match="no such task"):
        feed_lib.open_feed(nowhere, process_index=0, process_count=2, barrier=lambda: events.append("last"))
    assert events[-1] == "last"


def run_without_tensorflow(code, *arguments):
    program = "import sys\nfor name in ('tensorflow', 'seqio', 'gin', 'clu'): sys.modules[name] = None\n" + code
    return subprocess.run(
        [sys.executable, "-c", program, *map(str, arguments)],
        env={**os.environ, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
    )


OPEN_AND_READ = """
import logging
from t5x_ssm.data import feed
logging.basicConfig(level=logging.INFO, format="%(message)s", force=True)
config = feed.DatasetConfig(sys.argv[2], {"targets": 256}, "train", 2, cache_dir=sys.argv[1])
try:
    with feed.open_feed(config) as opened:
        print(opened.next()["decoder_target_tokens"].shape)
except ValueError as error:
    print(error)
"""


@pytest.mark.slow
def test_missing_cache_is_made_and_read_without_tensorflow_in_this_process(tmp_path):
    """The real thing, from nothing: the corpus is tokenised by seqio in a process of its own."""
    first = run_without_tensorflow(OPEN_AND_READ, tmp_path, "embedded_books")
    assert first.stdout == "(2, 256)\n", first.stderr
    assert f"no token cache of embedded_books in {tmp_path} yet" in first.stderr
    # The second time as programs often end, without closing the feed.
    program = OPEN_AND_READ.replace("with feed.open_feed(config) as opened:", "if opened := feed.open_feed(config):")
    again = run_without_tensorflow(program, tmp_path, "embedded_books")
    assert again.returncode == 0, again.stderr
    assert again.stdout == "(2, 256)\n" and "no token cache" not in again.stderr
    assert cache.find("embedded_books", tmp_path)


def test_errors_of_the_process_that_makes_the_cache_are_passed_on(config, monkeypatch, tmp_path):
    monkeypatch.delitem(sys.modules, "seqio", raising=False)
    missing = dataclasses.replace(config, mixture_or_task_name="embeded_books", cache_dir=tmp_path / "new")

    def fail_with(stderr):
        failed = subprocess.CompletedProcess([], 1, stdout="", stderr=stderr)
        monkeypatch.setattr(made_cache.subprocess, "run", lambda *_, **__: failed)

    fail_with("I0000 noise\ntasks.cache: No task is named 'embeded_books'. The nearest names: embedded_books.\n")
    with pytest.raises(ValueError, match=r"^No task is named 'embeded_books'\. The nearest names: embedded_books\.$"):
        feed_lib.open_feed(missing)
    fail_with("Traceback …\nMemoryError")
    with pytest.raises(RuntimeError, match=r"(?s)token cache of embeded_books failed.*MemoryError"):
        feed_lib.open_feed(missing)


def test_a_task_that_the_program_registered_is_cached_in_this_process(config, tmp_path):
    import seqio
    import tensorflow as tf

    from tasks.vocabularies import byte_vocabulary, decode_bytes

    def open_texts(split, shuffle_files, seed=None):
        return tf.data.Dataset.from_tensor_slices({"targets": [b"only here"] * 5})

    seqio.TaskRegistry.add(
        "feed_own_task",
        source=seqio.FunctionDataSource(open_texts, splits=("train",)),
        preprocessors=[seqio.preprocessors.tokenize, seqio.preprocessors.append_eos],
        output_features={"targets": seqio.Feature(vocabulary=byte_vocabulary())},
    )
    own = dataclasses.replace(config, mixture_or_task_name="feed_own_task", cache_dir=tmp_path / "new")
    with feed_lib.open_feed(own) as feed:
        tokens = feed.next()["decoder_target_tokens"][0]
    assert decode_bytes(tokens.tolist()) in b"only here" * 3
