"""Every registered corpus from a fixture in its real format through to a training batch; bad input; mixtures."""

import os
import subprocess
import sys

import corpus_files
import numpy as np
import pytest

import tasks
from t5x_ssm.data import feed, sources
from tasks import cache
from tasks.cache_files import CacheError
from tasks.corpora import formats


@pytest.fixture(autouse=True)
def registered():
    tasks.register()


def located(monkeypatch, corpus, root):
    monkeypatch.setenv(f"T5X_SSM_{corpus.upper()}", str(root))


def tokens_of(texts):
    return [[byte + 3 for byte in text.encode()] + [1] for text in texts]


@pytest.mark.parametrize(
    "task, corpus, write", corpus_files.FORMATS, ids=[w.__name__ for _, _, w in corpus_files.FORMATS]
)
def test_a_corpus_is_read_through_to_a_training_batch(task, corpus, write, tmp_path, monkeypatch):
    expected = tokens_of(write(tmp_path / "corpus"))
    located(monkeypatch, corpus, tmp_path / "corpus")
    path = cache.build(task, tmp_path / "cache", modules=())
    (stream,) = sources.CachedMixture(path, "train").streams
    tokens, begins = stream.read(0, len(stream))
    found = [part.tolist() for part in np.split(tokens, begins[1:])]
    assert sorted(found) == sorted(expected)
    config = feed.DatasetConfig(task, {"targets": 16}, "train", 2, cache_dir=tmp_path / "cache")
    with feed.open_feed(config) as opened:
        batch = opened.next()
    assert batch["decoder_target_tokens"].shape == (2, 16)
    everything = tokens.tolist()
    for row in batch["decoder_target_tokens"].tolist():
        assert any(everything[i : i + 16] == row for i in range(0, len(everything), 16))


def test_importing_registers_without_a_file_or_a_setting(tmp_path):
    code = (
        "import builtins, sys, tasks, seqio, gin, tensorflow, sentencepiece, numpy.random\n"
        "def refuse(event, arguments):\n"
        "    if event.startswith('socket.') or (event == 'open' and 'corpus' in str(arguments[0])\n"
        "                                       and not str(arguments[0]).endswith(('.py', '.pyc'))):\n"
        "        raise SystemExit(f'{event} {arguments}')\n"
        "sys.addaudithook(refuse)\n"
        "tasks.register(); tasks.register()\n"
        "assert {'books', 'code', 'mathematics', 'pile_dm_mathematics', 'c4'} <= set(seqio.TaskRegistry.names())\n"
    )
    environment = {k: v for k, v in os.environ.items() if not k.startswith("T5X_SSM_")}
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        env={**environment, "T5X_SSM_BOOKS": "/nowhere/corpus"},
    )
    assert done.returncode == 0, done.stderr


def test_bad_text_is_counted_and_said(tmp_path, monkeypatch, capsys):
    root = tmp_path / "corpus"
    root.mkdir()
    (root / "a.txt").write_bytes(b"good \xff bad")
    (root / "b.txt").write_bytes(b"")
    (root / "c.txt").write_bytes(b" \n")
    (root / "d.txt").write_bytes(b"12345\n" * 4)
    located(monkeypatch, "texts", root)
    monkeypatch.setattr(formats, "LONGEST_TEXT", 15)
    cache.main(["--mixture=texts", f"--output_dir={tmp_path / 'cache'}"])
    line = next(line for line in capsys.readouterr().out.splitlines() if " train " in line)
    assert "3 documents" in line
    assert line.endswith("2 empty documents left out; 1 documents with invalid UTF-8 replaced; 1 cuts in long files")
    (stream,) = sources.CachedMixture(cache.find("texts", tmp_path / "cache"), "train").streams
    text = bytes(token - 3 for token in stream.read(0, len(stream))[0] if token > 2).decode()
    assert text == "good � bad" + "12345\n" * 4
    assert stream.counts == {"invalid_utf8": 1, "empty": 2, "cut": 1}
    # A training feed has them, for the history of its run.
    config = feed.DatasetConfig("texts", {"targets": 8}, "train", 2, cache_dir=tmp_path / "cache")
    with feed.open_feed(config) as opened:
        assert opened.counts == stream.counts


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("a.jsonl", b'{"text": "x"}\n{"text": \n', r"a\.jsonl, line 2: this is no JSON"),
        ("a.jsonl", b'{"body": "x"}\n', r"a\.jsonl, line 1: there is no text under any of .*has \['body'\]"),
        ("a.jsonl.gz", b"no gzip", r"The corpus 'texts': .*a\.jsonl\.gz cannot be read"),
        ("a.jsonl.zst", b"no zst!", r"a\.jsonl\.zst.* cannot be read"),
        ("a.parquet", b"no parquet", r"a\.parquet cannot be read as Parquet"),
        ("a.unknown", b"x", r"The corpus 'texts': .* no file for the split 'train'; looked for"),
    ],
)
def test_a_file_that_cannot_be_read_is_named(name, content, message, tmp_path, monkeypatch):
    (tmp_path / "corpus").mkdir()
    (tmp_path / "corpus" / name).write_bytes(content)
    located(monkeypatch, "texts", tmp_path / "corpus")
    with pytest.raises(CacheError, match=message):
        cache.build("texts", tmp_path / "cache", modules=())


def test_a_corpus_without_a_place_names_the_setting(tmp_path, monkeypatch):
    monkeypatch.delenv("T5X_SSM_BOOKS", raising=False)
    with pytest.raises(CacheError, match=r"Set \$T5X_SSM_BOOKS \(or books/corpora\.location\.path in gin\)"):
        cache.build("books", tmp_path, modules=())
    located(monkeypatch, "books", tmp_path / "gone")
    with pytest.raises(CacheError, match=r"gone', which does not exist"):
        cache.build("books", tmp_path, modules=())


def test_held_out_documents_are_one_in_two_hundred_and_in_one_split(tmp_path, monkeypatch):
    root = tmp_path / "corpus"
    root.mkdir()
    documents = [f"document {i}" for i in range(4000)]
    (root / "all.txt").write_text("")
    (root / "all.jsonl").write_bytes(corpus_files._json_lines(documents + documents[:50]))
    located(monkeypatch, "texts", root)
    import seqio

    source = seqio.TaskRegistry.get("texts").source
    parts = {split: list(source.documents(split)) for split in ("train", "validation")}
    assert len(parts["train"]) + len(parts["validation"]) == 4050
    assert not set(parts["train"]) & set(parts["validation"])
    # A binomial of 4,000 with mean 20.
    assert 5 <= len(set(parts["validation"])) <= 40


def test_published_words_belong_to_the_published_corpus_only(tmp_path, monkeypatch):
    import seqio

    corpus_files.books(tmp_path / "corpus")
    located(monkeypatch, "books", tmp_path / "corpus")
    source = seqio.TaskRegistry.get("books").source
    path = cache.build("books", tmp_path / "cache", modules=())
    assert sources.CachedMixture(path, "validation").streams[0].num_words is None
    monkeypatch.setattr(source, "_published", {"validation": {"documents": 3, "words": 17}})
    path = cache.build("books", tmp_path / "other", modules=())
    assert sources.CachedMixture(path, "validation").streams[0].num_words == 17


def test_rates_of_books_code_math_come_from_gin(tmp_path, monkeypatch):
    for corpus, write in {
        "books": corpus_files.books,
        "code": corpus_files.code_tree,
        "mathematics": corpus_files.mathematics_latex,
    }.items():
        write(tmp_path / corpus)
        located(monkeypatch, corpus, tmp_path / corpus)
    import gin

    def rates(*bindings):
        with gin.unlock_config():
            gin.clear_config()
            path = cache.build("books_code_math", tmp_path / "cache", modules=(), gin_bindings=bindings)
            gin.clear_config()
        return [component["rate"] for component in cache.read_json(path)["components"]]

    assert rates() == [1.0, 1.0, 1.0]
    assert rates("corpora.rates.books = 4.0") == [4.0, 1.0, 1.0]
    assert rates("corpora.rates.books = 4.0", "corpora.rates.temperature = 2.0") == [2.0, 1.0, 1.0]
    for bad in ("corpora.rates.code = 0.0", "corpora.rates.code = -1.0"):
        with pytest.raises(CacheError, match=r"corpora\.rates\.code must be positive"):
            rates(bad)


def test_the_published_weights_of_the_pile_are_a_whole():
    from tasks.corpora import pile

    assert len(pile.WEIGHTS) == 22
    assert sum(pile.WEIGHTS.values()) == pytest.approx(100.0)
