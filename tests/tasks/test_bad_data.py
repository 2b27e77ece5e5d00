"""Data that is not as it should be: replaced and counted, or refused with a message that says where and why."""

import gzip
import sys

import pytest

import tasks
from t5x_ssm.data.feed import DatasetConfig, open_feed
from t5x_ssm.data.sources import CachedMixture
from t5x_ssm.errors import DataError
from tasks import cache
from tasks.cache_files import CacheError

BAD, REPLACED = b"good \xff bad", "good \ufffd bad"


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    tasks.register()
    monkeypatch.setenv("T5X_SSM_CACHE_DIR", str(tmp_path / "caches"))
    for corpus in ("texts", "summarization", "glue"):
        monkeypatch.setenv(f"T5X_SSM_{corpus.upper()}", str(tmp_path / "data"))
    (tmp_path / "data").mkdir()
    return tmp_path / "data"


def parquet_with(text, folder):
    """A Parquet file whose column says text; Parquet itself does not check what is in it."""
    import numpy as np
    import pyarrow
    import pyarrow.parquet

    offsets = pyarrow.py_buffer(np.array([0, len(text)], np.int32))
    column = pyarrow.Array.from_buffers(pyarrow.string(), 1, [None, offsets, pyarrow.py_buffer(text)])
    pyarrow.parquet.write_table(pyarrow.table({"text": column}), folder / "a.parquet")


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.jsonl.gz", "a.parquet"])
def test_invalid_utf8_is_replaced_and_counted_in_every_format(name, folder):
    if name == "a.parquet":
        parquet_with(BAD, folder)
    else:
        content = BAD if name == "a.txt" else b'{"text": "' + BAD + b'"}\n'
        (folder / name).write_bytes(gzip.compress(content) if name.endswith(".gz") else content)
    (stream,) = CachedMixture(cache.build("texts", modules=()), "train").streams
    assert bytes(token - 3 for token in stream.read(0, len(stream))[0] if token > 2).decode() == REPLACED
    assert stream.counts == {"invalid_utf8": 1}


@pytest.mark.parametrize("task", ["summarization", "glue_sst2"])
def test_invalid_utf8_of_records_is_counted_too(task, folder):
    import seqio

    (folder / "train.jsonl").write_bytes(b'{"document": "' + BAD + b'", "summary": "s"}\n')
    (folder / "sst2").mkdir()
    (folder / "sst2/train.tsv").write_bytes(b"sentence\tlabel\n" + BAD + b"\t1\n")
    source = seqio.TaskRegistry.get(task).source
    (record,) = source.read("train")
    assert REPLACED in record.values() and source.left_out("train") == {"invalid_utf8": 1}


def test_a_column_of_numbers_is_no_text(folder):
    import pyarrow
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.table({"text": [1, 2]}), folder / "a.parquet")
    with pytest.raises(CacheError, match=r"column 'text' of .*a\.parquet has the type int64, and not text"):
        cache.build("texts", modules=())


def test_empty_shards_are_passed_over_and_an_empty_corpus_is_said(folder):
    for name in ("a.jsonl", "c.jsonl"):
        (folder / name).write_bytes(b"")
    config = DatasetConfig("texts", {"targets": 4}, "train", 1)
    with pytest.raises(DataError, match="'texts' has 0 tokens, fewer than one window"):
        open_feed(config)
    (folder / "b.jsonl").write_bytes(b'{"text": "abcdefg"}\n{"text": ""}\n')
    cache.build(
        "texts", modules=()
    )  # It looks at the files again; training takes the cache of the place that is there.
    with open_feed(config) as feed:
        rows = sorted(feed.next()["decoder_target_tokens"][0].tolist() for _ in range(2))
    assert rows == [[100, 101, 102, 103], [104, 105, 106, 1]]
    assert feed.counts == {"empty": 1}


def test_a_name_that_is_taken_is_said_with_the_module(tmp_path, monkeypatch):
    (tmp_path / "taking_a_name.py").write_text(
        "import seqio, tasks.corpora.books\nseqio.TaskRegistry.add('books', source=seqio.TaskRegistry.get('books').source, output_features={})\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(CacheError, match=r"'taking_a_name', which should register tasks, cannot: .*books"):
        cache.build("books", modules=("taking_a_name",))
    assert "taking_a_name" not in sys.modules


@pytest.mark.parametrize("task, can", [("texts", False), ("embedded_books", True)])
def test_a_live_pipeline_that_could_not_be_resumed_is_refused_at_once(task, can, folder):
    (folder / "a.txt").write_text("some text " * 20)
    with open_feed(DatasetConfig(task, {"targets": 16}, "train", 2, source="seqio")) as feed:
        if can:
            feed.next()
        else:
            with pytest.raises(DataError, match=r"read by Python code.*DatasetConfig\.source='cache'"):
                feed.next()
