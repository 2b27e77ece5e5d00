"""Pairs from the token cache: rows against seqio's own packing, epochs, resuming, and what is counted and refused."""

import dataclasses
import json

import numpy as np
import pytest

import tasks
from t5x_ssm.data.cached_pairs import row_begins
from t5x_ssm.data.feed import DatasetConfig, open_evaluation, open_feed
from t5x_ssm.errors import DataError
from t5x_ssm.train import batch_shapes
from tasks import cache
from tasks.cache_files import CacheError

LENGTHS = {"inputs": 72, "targets": 24}
# 'summarize: ' and the end are 12 bytes of an input. Two documents and a summary are too long.
DOCUMENT_SIZES = [80 if n in (4, 17) else 1 + n * 7 % 30 for n in range(23)]
SUMMARY_SIZES = [30 if n == 9 else 1 + n * 5 % 9 for n in range(23)]
RECORDS = [("x" * i, chr(ord("a") + n) * k) for n, (i, k) in enumerate(zip(DOCUMENT_SIZES, SUMMARY_SIZES, strict=True))]
CONFIG = DatasetConfig("summarization", LENGTHS, "train", 4, objective="sequence_to_sequence")
OBJECTIVES = ["sequence_to_sequence", "language_model"]


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    tasks.register()
    (tmp_path / "data").mkdir()
    for split in ("train", "validation"):
        records = [json.dumps({"document": document, "summary": summary}) + "\n" for document, summary in RECORDS]
        (tmp_path / "data" / f"{split}.jsonl").write_text(
            "".join(records) + json.dumps({"document": "x", "summary": ""})
        )
    monkeypatch.setenv("T5X_SSM_SUMMARIZATION", str(tmp_path / "data"))
    monkeypatch.setenv("T5X_SSM_CACHE_DIR", str(tmp_path / "caches"))
    return tmp_path / "data"


def seqio_rows(objective, pack):
    import seqio

    kind = seqio.EncDecFeatureConverter if objective == "sequence_to_sequence" else seqio.DecoderFeatureConverter
    dataset = seqio.get_dataset(
        mixture_or_task_name="summarization",
        task_feature_lengths=LENGTHS,
        dataset_split="train",
        shuffle=False,
        feature_converter=kind(pack=pack),
        verbose=False,
    )
    return list(dataset.as_numpy_iterator())


@pytest.mark.parametrize("pack", [True, False])
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_rows_are_those_of_seqios_converters(objective, pack):
    expected = seqio_rows(objective, pack)
    assert len(expected) < len(RECORDS) - 5 if pack else len(expected) == len(RECORDS)
    config = dataclasses.replace(CONFIG, objective=objective, pack=pack, shuffle=False, batch_size=len(expected))
    with open_feed(config) as feed:
        batch = feed.next()
        again = feed.next()
    assert set(batch) == set(batch_shapes(config))
    for name, shape in batch_shapes(config).items():
        assert batch[name].shape == shape.shape and batch[name].dtype == np.int32
        np.testing.assert_array_equal(batch[name], [row[name] for row in expected])
        np.testing.assert_array_equal(again[name], batch[name])


def summaries(batches):
    """Which record each target text of packed rows comes from, by its letter."""
    found = []
    for batch in batches:
        for tokens, segments in zip(batch["decoder_target_tokens"], batch["decoder_segment_ids"], strict=True):
            found += [int(tokens[segments == segment][0]) - 3 - ord("a") for segment in range(1, segments.max() + 1)]
    return found


def test_an_epoch_has_each_pair_once_in_another_order_and_a_run_resumes_on_other_processes():
    rows = len(seqio_rows("sequence_to_sequence", True))
    config = dataclasses.replace(CONFIG, batch_size=2)
    with open_feed(config, seed=1) as feed:
        batches = [feed.next() for _ in range(rows)]  # Two epochs.
        state = json.loads(json.dumps(feed.state()))
        following = feed.next()
    order = summaries(batches)
    assert sorted(order) == sorted([*range(len(RECORDS))] * 2)
    first, second = order[: len(RECORDS)], order[len(RECORDS) :]
    assert sorted(first) == sorted(second) and first != second
    halves = [open_feed(config, seed=1, process_index=i, process_count=2) for i in range(2)]
    for i, half in enumerate(halves):
        half.restore(state)
        for name, value in half.next().items():
            np.testing.assert_array_equal(value, following[name][i : i + 1])
        half.close()
    with (
        open_feed(dataclasses.replace(config, pack=False), seed=1) as other,
        pytest.raises(DataError, match="pack: saved True, now False"),
    ):
        other.restore(state)


def test_what_was_cut_and_left_out_is_counted():
    with open_feed(CONFIG) as feed:
        assert feed.counts == {"empty": 1, "cut_inputs": 2, "cut_targets": 1}


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_a_held_out_split_is_the_one_that_is_read_live(objective):
    config = dataclasses.replace(CONFIG, objective=objective, split="validation", shuffle=False, pack=False)
    live = open_evaluation(dataclasses.replace(config, source="seqio"))["summarization"]
    cached = open_evaluation(config)["summarization"]
    assert len(cached) == len(live) == 6
    for found, expected in zip(cached, live, strict=True):
        assert set(found) == set(expected)
        for name in expected:
            np.testing.assert_array_equal(found[name], expected[name])


def test_rows_end_before_what_does_not_fit_by_brute_force():
    random = np.random.default_rng(0)
    for rooms in ([10], [10, 7]):
        sizes = random.integers(0, [room + 1 for room in rooms], (200, len(rooms)))
        begins, used = [0], np.zeros(len(rooms), int)
        for index, size in enumerate(sizes):
            if np.any(used + size > rooms):
                begins.append(index)
                used = np.zeros(len(rooms), int)
            used = used + size
        assert row_begins(sizes, rooms).tolist() == [*begins, len(sizes)]


def test_a_split_that_is_missing_is_left_out_and_train_may_not_be(folder):
    path = cache.build("summarization", modules=())
    assert sorted(p.parent.name for p in path.parent.glob("*/*/manifest.json")) == ["train", "validation"]
    (folder / "train.jsonl").unlink()
    with pytest.raises(CacheError, match="no file of the split 'train'"):
        cache.build("summarization", modules=())


def test_caches_of_other_kinds_are_refused(folder, tmp_path, monkeypatch):
    with pytest.raises(DataError, match=r"holds pairs: give TASK_FEATURE_LENGTHS for each of \['inputs', 'targets'\]"):
        open_feed(dataclasses.replace(CONFIG, objective="language_model", task_feature_lengths={"targets": 9}))
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "a.txt").write_text("some text " * 9)
    monkeypatch.setenv("T5X_SSM_TEXTS", str(tmp_path / "text"))
    with pytest.raises(DataError, match="'texts' does not hold pairs of 'inputs' and 'targets'"):
        open_feed(dataclasses.replace(CONFIG, mixture_or_task_name="texts"))
    with pytest.raises(CacheError, match=r"'superglue_rte' has no seqio\.CacheDatasetPlaceholder"):
        cache.build("superglue_rte", modules=())
    with pytest.raises(DataError, match=r"DatasetConfig\.pack=False"):
        open_evaluation(dataclasses.replace(CONFIG, split="validation", shuffle=False))
