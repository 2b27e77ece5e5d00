"""Caching plain corpora without TensorFlow gives the tokens of their seqio pipeline."""

import json

import numpy as np
import pytest

import tasks
from tasks import cache, cache_writer, plain_text, train_vocabulary

DOCUMENTS = [
    "The quick brown fox, 1234 times.",
    "  two spaces\tand a tab\n\n\n    indented\r\nline\n",
    "naïve café — ‘quotes’ … 漢字かな交じり文 🙂👩‍👩‍👧",
    "\ufeffmark first, \x00 inside, \u2028 a separator, \u00a0 no break\u200b",
    "e\u0301 is not \u00e9; ﬁ ﬂ ① ½",
    "▁ is the sign of a space, <unk> </s> <pad> are text",
    " ",
    "a" * 5000,
    "def f(x):\n    return {'a': [1, 2.5e-7], **x}  # comment\n" * 40,
]


@pytest.fixture
def corpus(tmp_path, monkeypatch):
    """A folder of JSON lines in two files, and a SentencePiece vocabulary of random words."""
    tasks.register()
    random = np.random.default_rng(0)
    syllables = [
        "the ",
        "qu",
        "ick",
        "br",
        "own",
        "def ",
        "re",
        "turn ",
        "é",
        "caf",
        "x",
        "ti",
        "mes ",
        ": ",
        "漢",
        "字",
    ]
    words = ["".join(random.choice(syllables, 6)) for _ in range(500)]
    model = train_vocabulary.train(iter(words), size=340, num_bytes=10**6)
    (tmp_path / "pieces.model").write_bytes(model)
    folder = tmp_path / "corpus"
    (folder / "validation").mkdir(parents=True)
    for name, part in {"a": DOCUMENTS[::2], "b": DOCUMENTS[1::2], "validation/c": ["held out"]}.items():
        lines = [json.dumps({"text": document}) for document in part]
        (folder / f"{name}.jsonl").write_text("\n".join(lines) + "\n")
    monkeypatch.setenv("T5X_SSM_TEXTS", str(folder))
    monkeypatch.setenv("T5X_SSM_VOCABULARY", str(tmp_path / "pieces.model"))
    return cache.registered("texts")


@pytest.mark.parametrize("count", [1, 2])
def test_tokens_are_those_of_the_pipeline(corpus, monkeypatch, count):
    assert plain_text.is_plain(corpus)
    shards = lambda: [list(cache_writer.documents(corpus, "train", index, count)) for index in range(count)]
    direct = shards()
    monkeypatch.setattr(plain_text, "is_plain", lambda task: False)
    piped = shards()
    assert sum(map(len, direct)) == len([text for text in DOCUMENTS if text.strip()])
    for one, other in zip(direct, piped, strict=True):
        for (tokens, size), (expected, expected_size) in zip(one, other, strict=True):
            np.testing.assert_array_equal(tokens, expected)
            assert (tokens.dtype, size) == (expected.dtype, expected_size)


def test_other_tasks_go_through_seqio(corpus, monkeypatch):
    import seqio

    assert not plain_text.is_plain(cache.registered("embedded_books"))
    assert not plain_text.is_plain(type("Task", (), {"preprocessors": []})())
    monkeypatch.setenv("T5X_SSM_VOCABULARY", "bytes")
    assert not plain_text.is_plain(corpus)
    monkeypatch.undo()
    name = "texts_in_capitals"
    if name not in seqio.TaskRegistry.names():
        upper = seqio.map_over_dataset(lambda example: example)
        steps = [upper, *corpus.preprocessors]
        seqio.TaskRegistry.add(name, source=corpus.source, preprocessors=steps, output_features=corpus.output_features)
    assert not plain_text.is_plain(cache.registered(name, ()))
