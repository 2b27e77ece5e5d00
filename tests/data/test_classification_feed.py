"""Labelled sequences: every example once an epoch, cut and padded, whatever the number of processes."""

import numpy as np
import pytest
from token_caches import write_labelled, write_mixture

from t5x_ssm.data import feed
from t5x_ssm.errors import DataError
from t5x_ssm.train import batch_shapes

CLASSES, LENGTH = 4, 6


def documents(count, texts=1):
    """Example i has texts of 1 + i % 9 tokens 10 + i, and class i % 4."""
    return [[10 + i] * (1 + i % 9) for i in range(count) for _ in range(texts)], [i % CLASSES for i in range(count)]


def config(root, **settings):
    return feed.DatasetConfig(
        **{
            "mixture_or_task_name": "colours",
            "task_feature_lengths": {"inputs": LENGTH, "targets": 1},
            "split": "train",
            "batch_size": 4,
            "pack": False,
            "objective": "classification",
            "cache_dir": root,
        }
        | settings
    )


@pytest.fixture
def root(tmp_path):
    write_labelled(tmp_path, "colours", {"train": documents(12), "validation": documents(5)}, CLASSES)
    return tmp_path


def test_a_row_is_its_document_cut_or_padded(root):
    opened = feed.open_feed(config(root, shuffle=False))
    batches = [opened.batch(step) for step in range(3)]
    for i, (inputs, length, target, weight) in enumerate(
        row for b in batches for row in zip(b["inputs"], b["input_lengths"], b["targets"], b["weights"], strict=True)
    ):
        real = min(1 + i % 9, LENGTH)
        np.testing.assert_array_equal(inputs, [10 + i] * real + [0] * (LENGTH - real))
        assert (length, target, weight) == (real, i % CLASSES, 1)
    shapes = batch_shapes(config(root))
    assert {n: (x.shape, x.dtype) for n, x in batches[0].items()} == {n: (s.shape, s.dtype) for n, s in shapes.items()}


def test_every_epoch_has_every_example_once_in_another_order(root):
    opened = feed.open_feed(config(root), seed=3)
    epochs = [[int(i) for step in range(3) for i in opened.batch(3 * e + step)["inputs"][:, 0]] for e in range(2)]
    assert sorted(epochs[0]) == sorted(epochs[1]) == list(range(10, 22))
    assert epochs[0] != epochs[1]
    assert opened.vocabulary["classes"] == CLASSES


def test_the_position_is_the_step_on_any_number_of_processes(root):
    with feed.open_feed(config(root), seed=5) as opened:
        for _ in range(4):
            opened.next()
        state = opened.state()
        expected = opened.next()
    halves = [feed.open_feed(config(root), seed=5, process_index=i, process_count=2) for i in range(2)]
    for half in halves:
        half.restore(state)
    parts = [half.next() for half in halves]
    for name, rows in expected.items():
        np.testing.assert_array_equal(np.concatenate([part[name] for part in parts]), rows)
    for half in halves:
        half.close()
    with pytest.raises(DataError, match="length: saved 6, now 5"):
        feed.open_feed(config(root, task_feature_lengths={"inputs": 5, "targets": 1}), seed=5).restore(state)


def test_evaluation_reads_every_example_once_and_pads_the_last_batch(root):
    (held_out,) = feed.open_evaluation(config(root, split="validation", shuffle=False)).values()
    batches = list(held_out)
    assert len(batches) == len(held_out) == 2
    weights = np.concatenate([b["weights"] for b in batches])
    assert weights.tolist() == [1] * 5 + [0] * 3
    assert np.concatenate([b["inputs"][:, 0] for b in batches])[:5].tolist() == [10, 11, 12, 13, 14]
    assert not np.concatenate([b["input_lengths"] for b in batches])[5:].any()


def test_pairs(tmp_path):
    write_labelled(tmp_path, "colours", {"train": documents(5, texts=2)}, CLASSES)
    lengths = {"inputs": LENGTH, "inputs2": LENGTH, "targets": 1}
    batch = feed.open_feed(config(tmp_path, task_feature_lengths=lengths, shuffle=False)).batch(0)
    assert batch["inputs"].shape == (4, 2, LENGTH) and batch["input_lengths"].shape == (4, 2)
    assert batch["input_lengths"].tolist() == [[1, 1], [2, 2], [3, 3], [4, 4]]
    assert batch["inputs"][3].tolist() == [[13] * 4 + [0] * 2] * 2
    assert batch["targets"].tolist() == [0, 1, 2, 3]
    with pytest.raises(DataError, match="are pairs"):
        feed.open_feed(config(tmp_path))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"task_feature_lengths": {"inputs": 6, "targets": 2}}, "TASK_FEATURE_LENGTHS"),
        ({"task_feature_lengths": {"targets": 1}}, "TASK_FEATURE_LENGTHS"),
        ({"task_feature_lengths": {"inputs": 6, "inputs2": 5, "targets": 1}}, "same length"),
        ({"pack": True}, "pack=False"),
        ({"source": "seqio"}, "source='cache'"),
    ],
)
def test_settings_that_cannot_be_followed(root, settings, message):
    with pytest.raises(DataError, match=message):
        feed.open_feed(config(root, **settings))


def test_data_and_model_must_both_be_of_classes(tmp_path):
    write_mixture(tmp_path, "colours", {"colours": {"train": [[5, 6, 7, 1]] * 4}})
    with pytest.raises(DataError, match="no class ids"):
        feed.open_feed(config(tmp_path))
    feed.check_classes({"classes": 4}, 4)
    feed.check_classes({}, None)
    with pytest.raises(DataError, match="num_classes = 3"):
        feed.check_classes({"classes": 4}, 3)
    for vocabulary, classes in (({}, 4), ({"classes": 4}, None)):
        with pytest.raises(DataError, match=r"DatasetConfig\.objective"):
            feed.check_classes(vocabulary, classes)
