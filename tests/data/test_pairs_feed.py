"""Pairs: held-out rows against seqio's own feature converters, texts that were cut, and what is counted of them."""

import dataclasses
import json

import numpy as np
import pytest

import tasks
from t5x_ssm.data import live
from t5x_ssm.data.feed import DatasetConfig, open_evaluation, open_feed
from t5x_ssm.data.pairs import cut_texts
from t5x_ssm.errors import DataError
from t5x_ssm.train import batch_shapes

LENGTHS = {"inputs": 24, "targets": 8}
CONFIG = DatasetConfig(
    "summarization", LENGTHS, "train", 4, pack=False, source="seqio", objective="sequence_to_sequence"
)
HELD_OUT = dataclasses.replace(CONFIG, split="validation", shuffle=False)
# 'summarize: ' and the end are 12 bytes of an input's 24.
RECORDS = [("x" * n, "s" * (1 + n % 9)) for n in (3, 12, 13, 20, 1, 7, 8)]


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    tasks.register()
    for split in ("train", "validation"):
        records = [json.dumps({"document": document, "summary": summary}) + "\n" for document, summary in RECORDS]
        # A record without a summary is left out.
        (tmp_path / f"{split}.jsonl").write_text("".join(records) + json.dumps({"document": "x", "summary": ""}))
    monkeypatch.setenv("T5X_SSM_SUMMARIZATION", str(tmp_path))
    return tmp_path


def seqio_rows(converter):
    import seqio

    dataset = seqio.get_dataset(
        mixture_or_task_name="summarization",
        task_feature_lengths=LENGTHS,
        dataset_split="validation",
        shuffle=False,
        feature_converter=converter,
        verbose=False,
    )
    return list(dataset.as_numpy_iterator())


@pytest.mark.parametrize("objective", ["sequence_to_sequence", "language_model"])
def test_held_out_rows_are_those_of_seqios_converters(objective):
    import seqio

    config = dataclasses.replace(HELD_OUT, objective=objective)
    (feed,) = open_evaluation(config).values()
    batches = list(feed)
    assert len(batches) == len(feed) == 2
    kind = seqio.EncDecFeatureConverter if objective == "sequence_to_sequence" else seqio.DecoderFeatureConverter
    expected = seqio_rows(kind(pack=False))
    for name, shape in batch_shapes(config).items():
        rows = np.concatenate([batch[name] for batch in batches])
        assert rows.shape == (8, *shape.shape[1:])
        np.testing.assert_array_equal(rows[:7], [row[name] for row in expected])
        assert not rows[7].any()
    halves = [open_evaluation(config, process_index=i, process_count=2)["summarization"] for i in range(2)]
    for batch, *parts in zip(batches, *halves, strict=True):
        for name, rows in batch.items():
            np.testing.assert_array_equal(np.concatenate([part[name] for part in parts]), rows)


@pytest.mark.parametrize("pack", [False, True])
@pytest.mark.parametrize("objective", ["sequence_to_sequence", "language_model"])
def test_cut_texts_are_counted_and_the_count_goes_on(objective, pack, monkeypatch):
    """Of an epoch two inputs are above 12 bytes, and two summaries, with their ends, above 8."""
    monkeypatch.setattr(live, "SNAPSHOT_PERIOD", 2)
    if pack:
        import seqio

        kind = seqio.EncDecFeatureConverter if objective == "sequence_to_sequence" else seqio.DecoderFeatureConverter
        batch = {name: [] for name in seqio_rows(kind(pack=True))[0]}
        for row in seqio_rows(kind(pack=True)):
            for name, value in row.items():
                batch[name].append(value)
        batch = {name: np.stack(value) for name, value in batch.items()}
        assert cut_texts(batch, {"inputs": 1, "targets": 1}) == {"cut_inputs": 2, "cut_targets": 2}
        assert cut_texts(batch, {"inputs": None, "targets": 1}) == {"cut_targets": 2}
        return
    # In order, so that a batch is an epoch.
    config = dataclasses.replace(CONFIG, objective=objective, shuffle=False, batch_size=len(RECORDS))
    with open_feed(config, seed=3) as feed:
        for epoch in range(1, 4):
            feed.next()
            assert feed.counts == {"cut_inputs": 2 * epoch, "cut_targets": 2 * epoch, "empty": 1}
        state = json.loads(json.dumps(feed.state()))
        feed.next()
    with open_feed(config, seed=3) as resumed:
        resumed.restore(state)
        resumed.next()
        assert resumed.counts == feed.counts == {"cut_inputs": 8, "cut_targets": 8, "empty": 1}


def test_mistakes_are_explained(folder):
    with pytest.raises(DataError, match=r"DatasetConfig\.pack=False"):
        open_evaluation(dataclasses.replace(HELD_OUT, pack=True))
    with pytest.raises(DataError, match="has no split 'dev'"):
        open_evaluation(dataclasses.replace(HELD_OUT, split="dev"))
    (folder / "train.jsonl").write_text("{}\n")
    with open_feed(CONFIG) as feed, pytest.raises(DataError, match=r"train\.jsonl, line 1: there is none of"):
        feed.next()
    (folder / "validation.jsonl").unlink()
    with pytest.raises(DataError, match="no file of the split 'validation'"):
        open_evaluation(HELD_OUT)
