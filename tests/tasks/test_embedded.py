"""The embedded corpus: what is in it, how it is split, and its seqio tasks."""

import ast
import pathlib
import sys

import numpy as np
import pytest

import tasks
from tasks import embedded_corpus, vocabularies


def test_registering_reads_nothing_but_the_modules(monkeypatch):
    """No data is opened before it is asked for. (That reading needs no seqio is shown beside the feeds.)"""
    import gin  # noqa: F401, tasks that can be configured need it
    import seqio

    names = ["embedded_books", "embedded_code", "embedded_math", "embedded_books_code_math"]
    for name in names:
        for registry in (seqio.TaskRegistry, seqio.MixtureRegistry):
            if name in registry.names():
                registry.remove(name)
    monkeypatch.delitem(sys.modules, "tasks.embedded", raising=False)
    opened, listening = [], True

    def listen(event, arguments):
        if listening and event in ("open", "os.listdir", "os.scandir", "socket.connect"):
            opened.append(str(arguments[0]))

    sys.addaudithook(listen)
    tasks.register()
    tasks.register()
    listening = False
    own = pathlib.Path(tasks.__file__).parent
    assert [name for name in opened if own not in (pathlib.Path(name), *pathlib.Path(name).parents)] == []
    assert set(names) <= {*seqio.TaskRegistry.names(), *seqio.MixtureRegistry.names()}


@pytest.mark.parametrize("domain", embedded_corpus.DOMAINS)
def test_domain_is_large_enough_and_split_in_two(domain):
    train, validation = (embedded_corpus.documents(domain, split) for split in embedded_corpus.SPLITS)
    assert all(text.strip() for text in train + validation)
    assert not set(train) & set(validation)
    sizes = [sum(map(len, texts)) for texts in (train, validation)]
    assert sizes[0] > {"books": 300_000, "code": 5_000_000, "math": 1_000_000}[domain]
    # Long-length evaluation concatenates validation documents: several windows of 4,096 bytes.
    assert 30_000 < sizes[1] <= 0.1 * sum(sizes) + 1 and sizes[1] <= 96 * 1024
    assert len(validation) >= 10


def test_validation_lines_do_not_occur_in_train():
    """Over the whole mixture: a line of one domain may not be trained on in another."""
    lines = {
        split: [
            line.strip()
            for domain in embedded_corpus.DOMAINS
            for text in embedded_corpus.documents(domain, split)
            for line in text.decode().splitlines()
        ]
        for split in embedded_corpus.SPLITS
    }
    train = set(lines["train"])
    for length in (80, 50):
        long = [line for line in lines["validation"] if len(line) > length]
        assert len(long) > 50
        assert sum(line in train for line in long) <= 0.02 * len(long)


def test_split_is_the_same_on_every_python():
    """Recorded choices for a made-up corpus, where documents 3, 13, 23, … share a long line."""
    texts = {f"doc{i:02d}": f"{'shared ' * 10 if i % 10 == 3 else ''}\n{str(i) * 200}\n" for i in range(60)}
    held_out = embedded_corpus._held_out(texts)
    assert held_out == {"doc01", "doc14", "doc16", "doc25", "doc26", "doc38"}


def test_near_duplicates_stay_together_transitively():
    def line(c):
        return c * 60

    texts = {
        "a": line("x"),
        "b": f"  {line('x')}\n{line('y')}",
        "c": f"{line('y')}  \nz",
        "d": line("w"),
        "e": "short line\nz",
        "f": "same",
        "g": "same",
    }
    assert sorted(map(sorted, embedded_corpus._near_duplicates(texts))) == [["a", "b", "c"], ["d"], ["e"], ["f", "g"]]


def test_code_has_no_tests_and_no_machine_settings():
    texts, _ = embedded_corpus._corpus("code")
    folders = {part for name in texts for part in name.split("/")[:-1]}
    assert not folders & {"test", "tests", "site-packages", "pydoc_data", "idlelib", "lib2to3", "encodings"}
    assert not [name for name in texts if name.startswith("_sysconfigdata") or name.startswith("config-")]
    assert {"os.py", "ast.py", "asyncio/tasks.py"} <= set(texts)


def test_docstrings_are_found_in_source():
    source = '''
"""Module."""
import warnings
class C:
    r"""Class \\d.

    Text:
        indented
    """
    def method(self):
        """Method."""
        def inner():
            """Inner."""
    if True:
        async def conditional(self):
            """Conditional."""
add_newdoc("pkg", "compiled",
    """
    Compiled.

        more
    """)
'''
    found = embedded_corpus._docstrings(source, "m")
    assert found == {
        "m": "Module.",
        "m.C": "Class \\d.\n\nText:\n    indented",
        "m.C.method": "Method.",
        "m.C.method.inner": "Inner.",
        "m.C.conditional": "Conditional.",
        "m.pkg.compiled": "Compiled.\n\n    more",
    }
    assert ast.get_docstring(ast.parse(source)) == "Module."


def test_math_documents_contain_latex():
    for split in embedded_corpus.SPLITS:
        for text in embedded_corpus.documents("math", split):
            assert b":math:`" in text or b".. math::" in text


def test_unknown_names_are_errors():
    with pytest.raises(ValueError, match=r"Unknown domain 'poems'.*books, code, math"):
        embedded_corpus.documents("poems", "train")
    with pytest.raises(ValueError, match=r"Unknown split 'test'.*train, validation"):
        embedded_corpus.documents("books", "test")


def test_byte_ids_equal_seqio():
    vocabulary = vocabularies.byte_vocabulary()
    text = "naïve ∑ 𝔽\n\x00\ttab"
    assert vocabularies.encode_bytes(text) == vocabulary.encode(text) == vocabularies.encode_bytes(text.encode())
    assert vocabularies.decode_bytes([0, *vocabulary.encode(text), 1, 2, 259]) == text.encode()
    assert vocabulary.vocab_size == vocabularies.BYTE_VOCABULARY_SIZE
    assert (vocabulary.pad_id, vocabulary.eos_id) == (vocabularies.PAD_ID, vocabularies.EOS_ID)


def test_vocabulary_hash_tells_vocabularies_apart():
    import seqio

    plain = vocabularies.describe(vocabularies.byte_vocabulary())
    assert plain == vocabularies.describe(seqio.ByteVocabulary(extra_ids=0))
    assert plain["size"] == 259 and plain["eos_id"] == 1
    hashes = {plain["hash"]}
    hashes.add(vocabularies.describe(seqio.ByteVocabulary(extra_ids=5))["hash"])
    hashes.add(vocabularies.describe(seqio.PassThroughVocabulary(259))["hash"])
    assert len(hashes) == 3


def test_tasks_tokenize_whole_documents_with_eos():
    import seqio

    tasks.register()
    task = seqio.get_mixture_or_task("embedded_books")
    assert set(task.output_features) == {"targets"}
    examples = list(task.get_dataset(None, "validation", shuffle=False).as_numpy_iterator())
    expected = embedded_corpus.documents("books", "validation")
    assert len(examples) == len(expected)
    for example, text in zip(examples, expected, strict=True):
        np.testing.assert_array_equal(example["targets"], [*(byte + 3 for byte in text), 1])


def test_mixture_gives_full_t5x_batches_and_loses_no_token():
    import seqio

    tasks.register()
    mixture = seqio.get_mixture_or_task("embedded_books_code_math")
    assert {task.name: mixture.get_rate(task) for task in mixture.tasks} == {
        "embedded_books": 1,
        "embedded_code": 2,
        "embedded_math": 1,
    }
    pieces = list(
        seqio.get_mixture_or_task("embedded_books")
        .get_dataset({"targets": 100}, "validation", shuffle=True, seed=0)
        .as_numpy_iterator()
    )
    assert max(len(piece["targets"]) for piece in pieces) == 100
    texts = embedded_corpus.documents("books", "validation")
    assert sum(len(piece["targets"]) for piece in pieces) == sum(len(text) + 1 for text in texts)
    batch = next(
        seqio.get_dataset(
            "embedded_books_code_math",
            {"targets": 256},
            seqio.DecoderFeatureConverter(pack=True),
            dataset_split="validation",
            shuffle=True,
            seed=1,
            batch_size=4,
            verbose=False,
        ).as_numpy_iterator()
    )
    assert batch["decoder_target_tokens"].shape == (4, 256)
    assert batch["decoder_loss_weights"].mean() > 0.5
