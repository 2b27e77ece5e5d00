"""Corpora from TFDS data sets as they lie on disk: their documents, splits and shards, and caching that was interrupted."""

import functools

import numpy as np
import pytest
import tfds_files

import tasks
from t5x_ssm.data import sources
from t5x_ssm.data.cached_pairs import CachedPairs
from tasks import cache, cache_writer
from tasks.cache_files import CacheError

BOOKS = [{"book_title": f"Title {i}", "book_text": f"Book {i} — its text.\n"} for i in range(7)]
BOOK_SPLITS = {"train": BOOKS[:5], "validation": BOOKS[5:6], "test": BOOKS[6:]}
PG19 = "pg19:0.1.1"


@pytest.fixture(autouse=True)
def tfds_folder(tmp_path, monkeypatch):
    import tensorflow_datasets as tfds

    tasks.register()
    # What TFDS_DATA_DIR sets when a program starts.
    monkeypatch.setattr(tfds.core.constants, "DATA_DIR", str(tmp_path / "tfds"))
    return tmp_path / "tfds"


def plain(texts):
    return [{"text": text} for text in texts]


def texts_of(stream):
    tokens, begins = stream.read(0, len(stream))
    return [bytes(t - 3 for t in part if t > 2).decode() for part in np.split(tokens, begins[1:])]


def build(task, corpus, name, output, monkeypatch, **settings):
    monkeypatch.setenv(f"T5X_SSM_{corpus.upper()}", f"tfds:{name}")
    return cache.build(task, output, modules=(), **settings)


@pytest.mark.parametrize(
    "task, name, splits, own_names",
    [
        ("books", PG19, BOOK_SPLITS, {}),
        ("lm1b", "lm1b:1.1.0", {"train": plain("abc"), "test": plain("d")}, {"test": "validation"}),
        ("wiki40b", "wiki40b/en:1.3.0", {"train": plain(["\n_START_ARTICLE_\nA"]), "test": plain("é")}, {}),
        ("c4", "c4/en:3.1.0", {"train": plain("xyz"), "validation": plain("w")}, {}),
        ("texts", "my_texts:2.0.0", {"train": plain("xyz"), "validation": plain("w")}, {}),
    ],
)
def test_a_corpus_is_read_from_its_data_set(task, name, splits, own_names, tfds_folder, tmp_path, monkeypatch):
    tfds_files.write(tfds_folder, name, splits)
    path = build(task, task, name, tmp_path / "cache", monkeypatch)
    for split, records in splits.items():
        (stream,) = sources.CachedMixture(path, own_names.get(split, split)).streams
        assert texts_of(stream) == [record.get("book_text") or record["text"] for record in records]


def test_the_names_and_fields_are_those_that_tfds_has_registered(tfds_folder, monkeypatch):
    import seqio
    import tensorflow_datasets as tfds

    # TFDS would ask its bucket for the sizes, which takes long where there is no network.
    monkeypatch.setattr(tfds.core.utils.gcs_utils, "_is_gcs_disabled", True)
    for task, name in (("books", PG19), ("lm1b", "lm1b:1.1.0"), ("wiki40b", "wiki40b/en:1.3.0"), ("c4", "c4/en:3.1.0")):
        builder = tfds.builder(name, data_dir=str(tfds_folder))
        assert seqio.TaskRegistry.get(task).source._tfds_fields[0] in builder.info.features


def test_pairs_of_a_data_set_are_cached_with_their_scores_as_text(tfds_folder, tmp_path, monkeypatch):
    import tensorflow_datasets as tfds

    monkeypatch.setattr(tfds.core.utils.gcs_utils, "_is_gcs_disabled", True)
    records = [{"sentence1": "A.", "sentence2": f"B{i}.", "label": score} for i, score in enumerate((0.25, 3.75, 5.0))]
    tfds_files.write(tfds_folder, "glue/stsb:2.0.0", {"train": records, "validation": records[:1]})
    path = build("glue_stsb", "glue", "glue:2.0.0", tmp_path / "cache", monkeypatch)
    open_pairs = functools.partial(CachedPairs, lengths={"inputs": 64, "targets": 8})
    (pairs,) = sources.CachedMixture(path, "train", open_stream=open_pairs).streams
    found = [
        [bytes(token - 3 for token in text if token > 2).decode() for text in pair]
        for pair in (pairs[i] for i in range(len(pairs)))
    ]
    assert found == [[f"stsb sentence1: A. sentence2: B{i}.", t] for i, t in enumerate(("0.2", "3.8", "5.0"))]


def test_caching_goes_on_with_the_files_that_were_done(tfds_folder, tmp_path, monkeypatch):
    tfds_files.write(tfds_folder, PG19, BOOK_SPLITS)
    whole = build("books", "books", PG19, tmp_path / "whole", monkeypatch)
    kept = {p.relative_to(tmp_path / "whole"): p for p in (tmp_path / "whole").rglob("*") if p.is_file()}
    # Two books a file.
    assert sum(path.name == "tokens.bin" for path in kept) == 3 + 1 + 1

    write_shard, made = cache_writer.write_shard, []

    def until_the_third(task, split, index, *rest):
        if len(made) == 2:
            raise KeyboardInterrupt
        made.append((split, index))
        return write_shard(task, split, index, *rest)

    monkeypatch.setattr(cache_writer, "write_shard", until_the_third)
    with pytest.raises(KeyboardInterrupt):
        cache.build("books", tmp_path / "again", modules=())
    done, made = made, []
    monkeypatch.setattr(cache_writer, "write_shard", lambda *a: made.append(a[1:3]) or write_shard(*a))
    cache.build("books", tmp_path / "again", modules=())
    assert len(made) == 3 and not set(made) & set(done)
    for path, original in kept.items():
        assert (tmp_path / "again" / path).read_bytes() == original.read_bytes()
    assert (tmp_path / "again" / "books" / whole.name).is_file()


@pytest.mark.nightly
def test_two_processes_make_the_same_cache(tfds_folder, tmp_path, monkeypatch):
    monkeypatch.setenv("TFDS_DATA_DIR", str(tfds_folder))
    tfds_files.write(tfds_folder, PG19, BOOK_SPLITS)
    one = build("books", "books", PG19, tmp_path / "one", monkeypatch)
    two = cache.build("books", tmp_path / "two", processes=2)
    assert two.read_bytes() == one.read_bytes()
    for path in sorted(one.parent.rglob("*.bin")):
        assert (two.parent / path.relative_to(one.parent)).read_bytes() == path.read_bytes()


def test_processes_share_the_files_and_train_alone_is_split_by_its_texts(tfds_folder, monkeypatch):
    import seqio

    texts = [f"document {i}" for i in range(1200)]
    monkeypatch.setattr(tfds_files, "EXAMPLES_IN_A_FILE", 300)
    tfds_files.write(tfds_folder, "my_texts:1.0.0", {"train": plain(texts)})
    monkeypatch.setenv("T5X_SSM_TEXTS", "tfds:my_texts:1.0.0")
    source = seqio.TaskRegistry.get("texts").source
    parts = {split: [d.decode() for d in source.documents(split)] for split in ("train", "validation")}
    assert sorted(parts["train"] + parts["validation"]) == sorted(texts)
    # A binomial of 1,200 with mean 6.
    assert 1 <= len(parts["validation"]) <= 20
    shares = [
        [e["targets"].decode() for e in source.get_dataset("train", True, 3, seqio.ShardInfo(i, 2)).as_numpy_iterator()]
        for i in range(2)
    ]
    assert min(map(len, shares)) > 500 and sorted([*shares[0], *shares[1]]) == sorted(parts["train"])


def test_published_words_belong_to_the_published_splits(tfds_folder, tmp_path, monkeypatch):
    import seqio

    tfds_files.write(tfds_folder, PG19, BOOK_SPLITS)
    source = seqio.TaskRegistry.get("books").source
    published = {"validation": {"documents": 1, "words": 17}, "test": {"documents": 2, "words": 5}}
    monkeypatch.setattr(source, "_published", published)
    path = build("books", "books", PG19, tmp_path / "cache", monkeypatch)
    words = {split: sources.CachedMixture(path, split).streams[0].num_words for split in BOOK_SPLITS}
    assert words == {"train": None, "validation": 17, "test": None}


@pytest.mark.parametrize(
    "corpus, name, message",
    [
        ("books", "pg19:0.1.0", r"pg19:0\.1\.0 has not been prepared in .*TFDS_DATA_DIR.*`tfds build pg19`"),
        ("books", "pg19", "the version of a TFDS data set is missing"),
        ("books", "bare:1.0.0", r"bare:1\.0\.0 has the fields \['body'\], and none of \['book_text', 'text'\]"),
        ("lm1b", "halved:1.0.0", r"no split 'train'; it has test"),
        ("wikitext103", PG19, "'wikitext103' is read from its files; TFDS does not have it"),
    ],
)
def test_what_is_not_there_is_said(corpus, name, message, tfds_folder, tmp_path, monkeypatch):
    tfds_files.write(tfds_folder, PG19, BOOK_SPLITS)
    tfds_files.write(tfds_folder, "bare:1.0.0", {"train": [{"body": "x"}]})
    tfds_files.write(tfds_folder, "halved:1.0.0", {"test": plain("x")})
    with pytest.raises(CacheError, match=message):
        build(corpus, corpus, name, tmp_path / "cache", monkeypatch)


def test_a_torn_file_is_named(tfds_folder, tmp_path, monkeypatch):
    tfds_files.write(tfds_folder, PG19, BOOK_SPLITS)
    path = tfds_folder / "pg19/0.1.1/pg19-train.tfrecord-00001"
    path.write_bytes(path.read_bytes()[:-7])
    with pytest.raises(CacheError, match=r"'books': pg19-train\.tfrecord-00001 of .*pg19:0\.1\.1 cannot be read"):
        build("books", "books", PG19, tmp_path / "cache", monkeypatch)
