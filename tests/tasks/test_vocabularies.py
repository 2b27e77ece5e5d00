"""Vocabularies from files: text comes back, hashes follow contents, and a token cache takes every kind."""

import json

import corpus_files
import pytest

import tasks
from t5x_ssm.data import sources
from tasks import cache, train_vocabulary, vocabularies

TEXT = "def f(x):\n\treturn  x + 12345   # été ∑ 🙂\n\n    indented"


def byte_alphabet():
    """GPT-2's characters for bytes, from its definition: the printable ones stand for themselves."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = iter(range(256, 512))
    return [chr(byte) if byte in printable else chr(next(others)) for byte in range(256)]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A SentencePiece model trained by the command on the embedded corpus."""
    path = tmp_path_factory.mktemp("vocabulary") / "small.model"
    train_vocabulary.main(
        [
            "--mixture=embedded_books_code_math",
            f"--output={path}",
            "--size=400",
            "--megabytes=0.05",
            "--split=validation",
        ]
    )
    return path


@pytest.fixture
def gpt2(tmp_path):
    """vocab.json and merges.txt in GPT-2's format: its byte alphabet, two merges, the end of text."""
    alphabet = byte_alphabet()
    tokens = [*alphabet, "in", "ing", "<|endoftext|>"]
    folder = tmp_path / "gpt2"
    folder.mkdir()
    (folder / "vocab.json").write_text(json.dumps({token: i for i, token in enumerate(tokens)}))
    (folder / "merges.txt").write_text("#version: 0.2\ni n\nin g\n")
    return folder


def test_a_trained_vocabulary_keeps_all_text(model):
    vocabulary = vocabularies.load(f"{model}:10")
    assert vocabulary.vocab_size == 410
    ids = vocabulary.encode(TEXT)
    assert vocabulary.decode(ids) == TEXT
    assert list(vocabulary.encode_tf(TEXT).numpy()) == ids
    assert (vocabulary.pad_id, vocabulary.eos_id, vocabulary.unk_id) == (0, 1, 2) and not {0, 1, 2} & set(ids)
    # Every digit is a token of its own.
    pieces = [vocabulary.tokenizer.id_to_piece(i) for i in range(400)]
    assert not [piece for piece in pieces if sum(c.isdigit() for c in piece) > 1 and not piece.startswith("<0x")]


def test_the_hash_follows_contents_and_not_the_path(model, tmp_path):
    copy = tmp_path / "copy.model"
    copy.write_bytes(model.read_bytes())
    first = vocabularies.describe(vocabularies.load(str(model)))
    assert vocabularies.describe(vocabularies.load(str(copy))) == first
    assert vocabularies.describe(vocabularies.load(f"{copy}:5"))["hash"] != first["hash"]
    deferred = vocabularies.deferred(lambda: str(copy))
    assert vocabularies.describe(deferred) == first


def test_byte_pairs_follow_the_published_files(gpt2):
    vocabulary = vocabularies.load(str(gpt2))
    alphabet = byte_alphabet()
    assert vocabulary.encode("sing <|endoftext|>")[:3] == [alphabet.index("s"), 257, alphabet.index("Ġ")]
    assert 258 not in vocabulary.encode("sing <|endoftext|>")
    assert vocabulary.decode(vocabulary.encode(TEXT)) == TEXT
    assert list(vocabulary.encode_tf(TEXT).numpy()) == vocabulary.encode(TEXT)
    described = vocabularies.describe(vocabulary)
    assert (described["pad_id"], described["eos_id"], described["bos_id"], described["size"]) == (None, 258, 258, 259)
    (gpt2 / "merges.txt").write_text("#version: 0.2\ni n\n")
    assert vocabularies.describe(vocabularies.load(str(gpt2)))["hash"] != described["hash"]


def test_a_corpus_follows_the_vocabulary_that_is_set(gpt2, model, tmp_path, monkeypatch):
    tasks.register()
    texts = corpus_files.texts(tmp_path / "corpus")
    monkeypatch.setenv("T5X_SSM_TEXTS", str(tmp_path / "corpus"))
    for name in (str(gpt2), str(model), "bytes"):
        monkeypatch.setenv("T5X_SSM_VOCABULARY", name)
        path = cache.build("texts", tmp_path / "cache", modules=())
        assert cache.find("texts", tmp_path / "cache") == path
        mixture = sources.CachedMixture(path, "train")
        (stream,) = mixture.streams
        vocabulary = vocabularies.load(name)
        assert mixture.vocabulary == vocabularies.describe(vocabulary)
        tokens = stream.read(0, len(stream))[0].tolist()
        expected = [[*vocabulary.encode(text), vocabulary.eos_id] for text in texts]
        assert tokens == [token for ids in expected for token in ids]
        bos = vocabulary.eos_id if name == str(gpt2) else 0
        inputs = stream.window(0, len(stream), len(stream))["decoder_input_tokens"]
        assert inputs[0] == inputs[len(expected[0])] == bos
    monkeypatch.setenv("T5X_SSM_VOCABULARY", "t5")
    assert cache.find("texts", tmp_path / "cache") is None


def test_what_is_no_vocabulary_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"no SentencePiece model nowhere\.model"):
        vocabularies.load("nowhere.model")
    with pytest.raises(ValueError, match="'wordpiece' is no vocabulary"):
        vocabularies.load("wordpiece")
    with pytest.raises(ValueError, match="cannot be read"):
        vocabularies.load(str(tmp_path))
    with pytest.raises(SystemExit, match=r"must end in \.model"):
        train_vocabulary.main(["--mixture=embedded_books", f"--output={tmp_path / 'x'}"])
    with pytest.raises(SystemExit, match="has no split 'test'"):
        train_vocabulary.main(["--mixture=embedded_books", f"--output={tmp_path / 'x.model'}", "--split=test"])
    with pytest.raises(SystemExit, match="--size=99999 could not be trained"):
        train_vocabulary.main(
            ["--mixture=embedded_books", f"--output={tmp_path / 'x.model'}", "--size=99999", "--split=validation"]
        )
