"""The arena's tasks through seqio and the token cache: what is cached is what is generated, and missing data is named."""

import json

import numpy as np
import pytest

from t5x_ssm.data import feed
from t5x_ssm.errors import DataError
from tasks import cache, inspect, vocabularies
from tasks.long_range_arena import generated, listops

pytestmark = pytest.mark.slow


def config(name, root, lengths, **settings):
    return feed.DatasetConfig(
        name, {**lengths, "targets": 1}, "train", 4, pack=False, objective="classification", cache_dir=root, **settings
    )


def test_generated_examples_are_cached(tmp_path, monkeypatch):
    monkeypatch.setenv("T5X_SSM_LRA_LIMIT", "6")
    monkeypatch.setitem(generated.COUNTS, "lra_listops", (9, 4, 8))
    monkeypatch.setattr(generated, "SHARD_SIZE", 3)
    path = cache.build("lra_listops", tmp_path)
    assert cache.find("lra_listops", tmp_path) == path
    opened = feed.open_feed(config("lra_listops", tmp_path, {"inputs": 2048}, shuffle=False))
    assert opened.vocabulary["size"] == 18 and opened.vocabulary["classes"] == 10
    rows = [row for step in range(2) for row in zip(*opened.batch(step).values(), strict=True)]
    # A limited split takes from its shards in turn: the first of each, the second of each.
    for row, index in zip(rows, [0, 3, 6, 1, 4, 7, 0, 3], strict=True):
        example = generated.example("lra_listops", "train", index)
        inputs, length, label, _ = row
        assert inputs[:length].tolist() == example["inputs"] and not inputs[length:].any()
        assert label == example["targets"][0] == listops.value(example["inputs"][:-1])
    counts = {m["split"]: m["documents"] for m, _ in cache.manifests(path)}
    assert counts == {"train": 6, "validation": 4, "test": 6}
    ids = generated.example("lra_listops", "train", 0)["inputs"]
    vocabulary = cache.registered("lra_listops").output_features["inputs"].vocabulary
    shown = inspect.report(path, "train", length=2048, examples=1, characters=40, vocabulary=vocabulary)
    assert " ".join(map(str, ids))[:40] in shown
    # Another limit is another data set.
    monkeypatch.delenv("T5X_SSM_LRA_LIMIT")
    assert cache.find("lra_listops", tmp_path) is None
    full = cache.build("lra_listops", tmp_path)
    assert {m["split"]: m["documents"] for m, _ in cache.manifests(full)} == {"train": 9, "validation": 4, "test": 8}


def test_a_live_pipeline_reads_every_example_in_every_epoch(monkeypatch):
    import seqio

    monkeypatch.setitem(generated.COUNTS, "lra_listops", (5, 1, 1))
    monkeypatch.setattr(generated, "SHARD_SIZE", 2)
    provider = cache.registered("lra_listops")
    assert isinstance(provider, seqio.Task)
    expected = [generated.example("lra_listops", "train", i)["inputs"] for i in range(5)]
    epochs = provider.get_dataset(sequence_length=None, split="train", shuffle=True, seed=1, num_epochs=2)
    found = [example["inputs"].tolist() for example in epochs.as_numpy_iterator()]
    assert sorted(found) == sorted(2 * expected)


def test_pairs_and_images_are_cached(tmp_path, monkeypatch):
    monkeypatch.setenv("T5X_SSM_LRA_RETRIEVAL", str(tmp_path / "aan"))
    (tmp_path / "aan").mkdir()
    for name in ("train", "eval", "test"):
        (tmp_path / "aan" / f"new_aan_pairs.{name}.tsv").write_bytes(b"1.0\ta\tb\tone\tother\n0.0\ta\tc\tx\tyz\n")
    lengths = {"inputs": 4, "inputs2": 4}
    cache.build("lra_retrieval", tmp_path)
    batch = feed.open_feed(config("lra_retrieval", tmp_path, lengths, shuffle=False)).batch(0)
    texts = [[vocabularies.decode_bytes(text) for text in pair] for pair in batch["inputs"][:2].tolist()]
    assert texts == [[b"one", b"othe"], [b"x", b"yz"]]
    assert batch["input_lengths"][:2].tolist() == [[4, 4], [2, 3]] and batch["targets"][:2].tolist() == [1, 0]

    monkeypatch.setenv("T5X_SSM_LRA_LIMIT", "2")
    monkeypatch.setitem(generated.COUNTS, "lra_pathfinder", (2, 2, 2))
    path = cache.build("lra_pathfinder", tmp_path)
    pixels = feed.open_feed(config("lra_pathfinder", tmp_path, {"inputs": 1024}, shuffle=False)).batch(0)["inputs"]
    np.testing.assert_array_equal(pixels[1], generated.example("lra_pathfinder", "train", 1)["inputs"])
    directory = path.parent.parent / json.loads(path.read_text())["components"][0]["directory"]
    assert (directory / "train/00000/tokens.bin").stat().st_size == 2 * 1024, "a pixel takes one byte"


@pytest.mark.parametrize(
    ("name", "variable"),
    [
        ("lra_text", "T5X_SSM_LRA_TEXT"),
        ("lra_image", "T5X_SSM_LRA_IMAGE"),
        ("speech_commands", "T5X_SSM_SPEECH_COMMANDS"),
    ],
)
def test_data_that_is_not_there_is_named(tmp_path, monkeypatch, name, variable):
    import tasks

    tasks.register()
    monkeypatch.delenv(variable, raising=False)
    with pytest.raises(DataError, match=rf"\${variable}"):
        feed.open_feed(config(name, tmp_path, {"inputs": 8}))
    monkeypatch.setenv(variable, str(tmp_path))
    with pytest.raises(DataError, match=rf"{name}.*needs.*\${variable}"):
        feed.open_feed(config(name, tmp_path, {"inputs": 8}))
