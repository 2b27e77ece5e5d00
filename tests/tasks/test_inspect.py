"""What `tasks.inspect` says of a small corpus, against counting by hand."""

import json

import numpy as np
import pytest

from tasks import inspect


def test_it_shows_documents_counts_and_padding(tmp_path, monkeypatch, capsys):
    corpus = tmp_path / "corpus"
    corpus.mkdir()
    (corpus / "a.txt").write_text("first\nbook")
    (corpus / "b.txt").write_text("ünïcode" * 30)
    monkeypatch.setenv("T5X_SSM_TEXTS", str(corpus))
    picture = tmp_path / "lengths.png"
    command = ["--mixture=texts", f"--output_dir={tmp_path / 'cache'}", f"--histogram={picture}"]
    inspect.main([*command, "--length=100", "--characters=20"])
    out = capsys.readouterr().out
    size = len(("ünïcode" * 30).encode())
    # Documents of 11 and size + 1 tokens: one row, and three of 100.
    assert f"2 documents {10 + size + 2:>14,} tokens {10 + size:>14,} bytes" in out
    assert f"{1 - (size + 12) / 400:.1%} padding" in out
    assert "┌── document 0, 11 tokens\n  │ first\n  │ book\n  └── end of document" in out
    assert f"┌── document 1, {size + 1} tokens\n  │ ünïcodeünïcodeünïcod …\n" in out
    assert picture.read_bytes().startswith(b"\x89PNG")
    with pytest.raises(SystemExit, match=r"'texts' has no split 'test'; it has train, validation"):
        inspect.main([*command, "--split=test"])


def test_it_shows_the_texts_of_pairs_by_their_names(tmp_path, monkeypatch, capsys):
    pairs = ({"document": "abc", "summary": "a"}, {"document": "xyz", "summary": "y"})
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    monkeypatch.setenv("T5X_SSM_SUMMARIZATION", str(tmp_path))
    inspect.main(["--mixture=summarization", f"--output_dir={tmp_path / 'cache'}", "--histogram=", "--examples=1"])
    out = capsys.readouterr().out
    assert "┌── inputs 0, 15 tokens\n  │ summarize: abc\n  └── end of inputs\n  ┌── targets 0, 2 tokens\n  │ a\n" in out
    assert out.endswith("└── end of targets\n") and "windows" not in out


def test_padding_by_hand():
    assert inspect.padding(np.array([1, 4, 5]), 4) == pytest.approx(1 - 10 / 16)
    assert inspect.padding(np.array([], np.int64), 4) == 0.0
