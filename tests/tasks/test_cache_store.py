"""Token caches in object stores, held against the same cache in a folder; the store is fsspec's own in memory."""

import json
import sys
import uuid
from typing import ClassVar

import fsspec
import numpy as np
import pytest
from fsspec.implementations.memory import MemoryFileSystem
from fsspec.registry import _registry as known_stores
from token_caches import write_labelled, write_mixture

from t5x_ssm.data.feed import DatasetConfig, open_evaluation, open_feed
from tasks import cache, cache_files, cache_store

NAME = "stored"


@pytest.fixture
def here(tmp_path, monkeypatch):
    """The cache of a mixture in this machine's cache folder."""
    random = np.random.default_rng(0)
    documents = lambda count: [[*random.integers(3, 259, random.integers(1, 40)).tolist(), 1] for _ in range(count)]
    monkeypatch.setenv("T5X_SSM_CACHE_DIR", str(tmp_path / "here"))
    tasks = {task: {"train": documents(30), "validation": documents(5)} for task in ("one", "two")}
    return write_mixture(tmp_path / "here", NAME, tasks, rates=[2.0, 1.0])


@pytest.fixture
def url():
    return f"memory://bucket-{uuid.uuid4().hex}/caches"


def files_of(folder):
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def stored(url):
    store = cache_store.Store(url)
    return {name: store.read(name) for name in store.listed("", deep=True)}


def batches(name, cache_dir, count=6, **settings):
    config = DatasetConfig(name, {"targets": 16}, "train", 4, cache_dir=cache_dir, **settings)
    feed = open_feed(config, seed=3)
    found = [feed.next() for _ in range(count)]
    feed.close()
    return found


def assert_equal_batches(found, expected):
    assert len(found) == len(expected)
    for one, other in zip(found, expected, strict=True):
        assert one.keys() == other.keys()
        for name, value in one.items():
            np.testing.assert_array_equal(value, other[name])


def test_a_published_cache_has_the_same_files_and_gives_the_same_batches(here, url):
    folder = here.parent.parent
    before = files_of(folder)
    expected = batches(NAME, folder)
    cache_store.publish(here, url)
    assert stored(url) == before

    assert_equal_batches(batches(NAME, url), expected)
    copied = [path for path in (folder / cache.STORES).rglob("*") if path.is_file()]
    assert {"tokens.url", "offsets.npy", "manifest.json"} <= {path.name for path in copied}
    assert not [path for path in copied if path.name == "tokens.bin"]

    held_out = lambda place: open_evaluation(
        DatasetConfig(NAME, {"targets": 16}, "validation", 4, cache_dir=place, shuffle=False)
    )
    for task, feed in held_out(folder).items():
        other = held_out(url)[task]
        assert (other.num_bytes(), other.num_tokens()) == (feed.num_bytes(), feed.num_tokens())
        assert_equal_batches(list(other), list(feed))


def test_labelled_examples_are_read_from_a_store_too(tmp_path, monkeypatch, url):
    monkeypatch.setenv("T5X_SSM_CACHE_DIR", str(tmp_path))
    splits = {"train": ([[5, 6, 7], [8] * 20, [9]], [0, 1, 1])}
    cache_store.publish(write_labelled(tmp_path, "labelled", splits, classes=2), url)
    config = DatasetConfig(
        *("labelled", {"inputs": 8, "targets": 1}, "train", 3),
        cache_dir=url,
        objective="classification",
        pack=False,
        shuffle=False,
    )
    feed = open_feed(config)
    batch = feed.next()
    feed.close()
    assert batch["inputs"].tolist() == [[5, 6, 7, 0, 0, 0, 0, 0], [8] * 8, [9, *[0] * 7]]
    assert batch["targets"].tolist() == [0, 1, 1]


class Failing(MemoryFileSystem):
    """A store that a test can have fail."""

    protocol = "failing"
    store, pseudo_dirs = {}, [""]
    left = None  # files that can still be written
    written: ClassVar[list[str]] = []

    def put_file(self, lpath, rpath, **settings):
        if Failing.left == 0:
            raise PermissionError("403, anonymous caller")
        Failing.left = Failing.left and Failing.left - 1
        Failing.written.append(rpath.rpartition("/caches/")[2])
        super().put_file(lpath, rpath, **settings)

    def find(self, path, **settings):
        if Failing.left == 0:
            raise PermissionError("403, anonymous caller")
        return super().find(path, **settings)


@pytest.fixture
def failing():
    fsspec.register_implementation("failing", Failing, clobber=True)
    Failing.left, Failing.written = None, []
    yield f"failing://{uuid.uuid4().hex}/caches"
    Failing.left = None


def test_a_copy_that_was_cut_short_is_no_cache_and_goes_on(here, failing):
    data = sorted(name for name in files_of(here.parent.parent) if not name.endswith(".json"))
    for left in (1, len(data) - 2, 2):
        Failing.left = left
        with pytest.raises(cache.CacheError, match=r"failing://.* cannot be reached \(PermissionError: 403"):
            cache_store.publish(here, failing)
        Failing.left = None
        assert cache.find(NAME, failing) is None
    Failing.left = None
    cache_store.publish(here, failing)
    # What was there was not sent again, and nothing stands before what it lists.
    assert sorted(name for name in Failing.written if not name.endswith(".json")) == data
    assert Failing.written[-1] == f"{NAME}/made.json"
    for manifest in {name for name in Failing.written if name.endswith("manifest.json")}:
        last = len(Failing.written) - 1 - Failing.written[::-1].index(manifest)
        below = [
            name for name in Failing.written[last + 1 :] if name.startswith(manifest.removesuffix("manifest.json"))
        ]
        assert not below
    assert batches(NAME, failing, 1)


def test_a_store_without_a_cache_or_access(here, failing, url):
    assert cache.find(NAME, url) is None
    cache_store.publish(here, failing)
    Failing.left = 0
    with pytest.raises(ValueError, match=r"failing://.*/caches cannot be reached.*403.*service account"):
        batches(NAME, failing, 1)
    with pytest.raises(cache.CacheError, match="nowhere://bucket is of no store that fsspec knows"):
        cache.find(NAME, "nowhere://bucket")


def test_a_missing_package_is_named_before_any_work(here, monkeypatch):
    monkeypatch.setitem(sys.modules, "gcsfs", None)
    # fsspec remembers what it has found.
    for name in ("gs", "gcs"):
        monkeypatch.delitem(known_stores, name, raising=False)
    with pytest.raises(cache.CacheError, match=r"gs://bucket/caches: Please install gcsfs.*t5x_ssm\[gcs\]"):
        cache.build(NAME, "gs://bucket/caches")


def test_damage_in_a_store_is_named(here, url):
    cache_store.publish(here, url)
    directory = cache.find(NAME, url).parent.parent / "one/made/train"
    name = "one/made/train/00001/tokens.bin"
    files, root = fsspec.url_to_fs(url)
    content = files.cat_file(f"{root}/{name}")
    cache_files.check(directory, checksums=True)

    files.pipe_file(f"{root}/{name}", bytes(len(content)))
    with pytest.raises(cache.CacheError, match=r"00001/tokens.bin does not have its recorded checksum"):
        cache_files.check(directory, checksums=True)
    files.pipe_file(f"{root}/{name}", content[:-2])
    with pytest.raises(ValueError, match=rf"00001/tokens.bin has {len(content) - 2} bytes instead of {len(content)}"):
        batches(NAME, url, 1)
    files.pipe_file(f"{root}/{name}", content)
    tokens = cache_store.open_tokens(cache.find(NAME, url).parent.parent / name.rpartition("/")[0], np.dtype("<u2"))
    np.testing.assert_array_equal(tokens[3:9], np.frombuffer(content, "<u2")[3:9])
    files.pipe_file(f"{root}/{name}", content[:-2])
    with pytest.raises(cache.CacheError, match=rf"{url}/{name} is shorter"):
        tokens[tokens.size - 2 : tokens.size]
    files.rm_file(f"{root}/{name}")
    with pytest.raises(cache.CacheError, match=rf"{url}/{name} is missing"):
        tokens[:2]


def test_a_removed_cache_leaves_no_copy_that_could_be_taken_for_it(here, url):
    cache_store.publish(here, url)
    assert cache.find(NAME, url) is not None
    files, root = fsspec.url_to_fs(url)
    files.rm(f"{root}/one", recursive=True)
    assert cache.find(NAME, url) is None


def test_a_cache_is_made_here_and_copied(tmp_path, monkeypatch, url):
    import seqio
    import tensorflow as tf

    from tasks import vocabularies

    monkeypatch.setenv("T5X_SSM_CACHE_DIR", str(tmp_path))
    name = "cache_for_a_store"
    if name not in seqio.TaskRegistry.names():
        seqio.TaskRegistry.add(
            name,
            source=seqio.FunctionDataSource(
                lambda split, shuffle_files, seed=None: tf.data.Dataset.from_tensor_slices({"targets": [b"ab", b"c"]}),
                splits=("train",),
            ),
            preprocessors=[seqio.preprocessors.tokenize, seqio.preprocessors.append_eos],
            output_features={"targets": seqio.Feature(vocabulary=vocabularies.byte_vocabulary())},
        )
    path = cache.build(name, url, modules=())
    assert path == cache.find(name, url)
    # The byte vocabulary: 'a' is its byte and 3, and 1 ends a document.
    (tokens,) = [content for file, content in stored(url).items() if file.endswith("tokens.bin")]
    assert np.frombuffer(tokens, "<u2").tolist() == [100, 101, 1, 102, 1]
    # In the folder of this machine is the whole cache, which another run finds.
    assert cache.find(name) == tmp_path / name / path.name
    assert json.loads(path.read_text()) == json.loads((tmp_path / name / path.name).read_text())


def test_the_cache_folder_of_this_machine_is_no_store(monkeypatch):
    monkeypatch.setenv("T5X_SSM_CACHE_DIR", "gs://bucket/caches")
    with pytest.raises(cache.CacheError, match=r"T5X_SSM_CACHE_DIR is 'gs://bucket/caches'.*--output_dir"):
        cache.default_cache_dir()
