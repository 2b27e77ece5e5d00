"""The token cache: contents, atomicity, damage, and the errors of a user who asks for the wrong thing."""

import json
import multiprocessing
import os
import pathlib
import re
import shutil
import signal
import time

import numpy as np
import pytest

from tasks import cache, cache_writer, vocabularies

TEXTS = {"train": [b"abc", b"", "é∑".encode(), b"x" * 300], "validation": [b"held out"]}
VOCABULARY = {"name": "FakeVocabulary", "size": 200, "hash": "0123"}


class FakeTask:
    """The part of seqio.Task that the cache uses, so that processes of their own need no TensorFlow."""

    name = "fake"
    splits = ("train", "validation")

    def __init__(self, documents, on_document=lambda index: None):
        self.documents, self.on_document = documents, on_document
        self.source = self
        self.output_features = {"targets": type("Feature", (), {"vocabulary": None})}

    def list_shards(self, split):
        return [split]

    def get_dataset(self, split, **_):
        self.split = split
        return self

    def as_numpy_iterator(self):
        for index, tokens in enumerate(self.documents):
            self.on_document(index)
            yield {"targets": np.array(tokens, np.int32), "targets_pretokenized": b"?" * len(tokens)}


def build_fake(cache_dir, documents=((1, 2, 3), (4,)), on_document=lambda index: None):
    identity = {"format": cache.FORMAT, "task": "fake"}
    return cache_writer.build_task(FakeTask(documents, on_document), pathlib.Path(cache_dir), identity, VOCABULARY)


def register(name, texts=TEXTS, vocabulary=None, features=("targets",), describe=None):
    """Registers a seqio task over texts, once per test session and name."""
    import seqio
    import tensorflow as tf

    if name in seqio.TaskRegistry.names():
        seqio.TaskRegistry.remove(name)

    def open_texts(split, shuffle_files, seed=None):
        return tf.data.Dataset.from_tensor_slices({feature: texts[split] for feature in features})

    if describe:
        open_texts.describe_source = describe
    vocabulary = vocabulary or vocabularies.byte_vocabulary()
    seqio.TaskRegistry.add(
        name,
        source=seqio.FunctionDataSource(open_texts, splits=tuple(texts)),
        preprocessors=[seqio.preprocessors.tokenize, seqio.preprocessors.append_eos],
        output_features={feature: seqio.Feature(vocabulary=vocabulary) for feature in features},
    )


def component_directories(path):
    return [path.parent.parent / c["directory"] for c in json.loads(path.read_text())["components"]]


def test_contents_are_the_tokenised_documents(tmp_path):
    register("cache_contents")
    assert cache.find("cache_contents", tmp_path) is None
    path = cache.build("cache_contents", tmp_path, modules=())
    assert cache.find("cache_contents", tmp_path) == path
    (directory,) = component_directories(path)
    for split, texts in TEXTS.items():
        manifest = cache.check(directory / split, checksums=True)
        tokens = np.fromfile(directory / split / "00000/tokens.bin", manifest["dtype"])
        np.testing.assert_array_equal(tokens, [id for text in texts for id in [*(b + 3 for b in text), 1]])
        assert tokens.dtype == np.uint16
        starts = np.cumsum([0] + [len(text) + 1 for text in texts])
        np.testing.assert_array_equal(np.load(directory / split / "00000/offsets.npy"), starts)
        np.testing.assert_array_equal(np.load(directory / split / "00000/bytes.npy"), [len(text) for text in texts])
        assert manifest["documents"] == len(texts) and manifest["tokens"] == starts[-1]
        assert manifest["bytes"] == sum(map(len, texts)) and manifest["vocabulary"]["size"] == 259


def test_byte_lengths_come_from_decoding_when_the_text_is_not_kept(tmp_path):
    import functools

    import seqio

    register("cache_decoded")
    task = seqio.TaskRegistry.get("cache_decoded").replace(
        preprocessors=[
            functools.partial(seqio.preprocessors.tokenize, copy_pretokenized=False),
            seqio.preprocessors.append_eos,
        ]
    )
    lengths = [byte_length for _, byte_length in cache_writer.documents(task, "train")]
    assert lengths == [len(text) for text in TEXTS["train"]]


def test_mixture_records_rates_and_shares_its_tasks(tmp_path):
    import seqio

    register("cache_one")
    register("cache_two", {"train": [b"two"], "validation": [b"2"]})
    if "cache_mixture" not in seqio.MixtureRegistry.names():
        seqio.MixtureRegistry.add("cache_mixture", [("cache_one", 3), ("cache_two", 0.5)])
    alone = cache.build("cache_one", tmp_path, modules=())
    before = (component_directories(alone)[0] / "train" / "00000/tokens.bin").stat()
    path = cache.build("cache_mixture", tmp_path, modules=())
    components = {c["task"]: c for c in json.loads(path.read_text())["components"]}
    assert {name: c["rate"] for name, c in components.items()} == {"cache_one": 3.0, "cache_two": 0.5}
    shared = tmp_path / components["cache_one"]["directory"] / "train" / "00000/tokens.bin"
    assert (shared.stat().st_ino, shared.stat().st_mtime_ns) == (before.st_ino, before.st_mtime_ns)


def test_smallest_type_that_holds_the_vocabulary(tmp_path):
    directory = build_fake(tmp_path, [(0, 199), ()])
    manifest = cache.check(directory / "train", checksums=True)
    assert manifest["dtype"] == np.dtype(np.uint8).str
    assert (directory / "train" / "00000/tokens.bin").read_bytes() == bytes([0, 199])
    assert (manifest["documents"], manifest["tokens"]) == (2, 2)
    with pytest.raises(ValueError, match=r"Document 1 of 'fake'.* 5 to 200, outside its vocabulary of 200"):
        build_fake(tmp_path / "other", [(1,), (5, 200)])


def test_fingerprint_follows_source_and_vocabulary(tmp_path):
    import seqio

    made_from = {"environment": {"python": cache.version("python")}}
    register("cache_fingerprint", describe=lambda: made_from)
    first = cache.build("cache_fingerprint", tmp_path, modules=())
    assert cache.build("cache_fingerprint", tmp_path, modules=()) == first
    register("cache_fingerprint", vocabulary=seqio.ByteVocabulary(extra_ids=3), describe=lambda: made_from)
    other = cache.build("cache_fingerprint", tmp_path, modules=())
    assert component_directories(other) != component_directories(first)
    assert cache.find("cache_fingerprint", tmp_path) == other
    # A cache made from another environment is not found, though it is the newest.
    made_from = {"environment": {"python": "2.7.18"}}
    assert cache.build("cache_fingerprint", tmp_path, modules=()) != other
    assert cache.find("cache_fingerprint", tmp_path) == other


def test_version_follows_a_module_source():
    own = cache.version("module tasks.cache")
    assert own != cache.version("module tasks.vocabularies") and len(own) == 16
    assert cache.version("module no.such.module") is None and cache.version("no-such-distribution") is None
    assert cache.version("numpy") == np.__version__


def _build_and_die(cache_dir):
    def die(index):
        if index == 1:
            os.kill(os.getpid(), signal.SIGKILL)

    build_fake(cache_dir, on_document=die)


def _build_slowly(cache_dir, started):
    started.wait()
    build_fake(cache_dir, on_document=lambda index: time.sleep(0.02))


def test_killed_midway_leaves_no_cache_and_no_obstacle(tmp_path):
    process = multiprocessing.get_context("spawn").Process(target=_build_and_die, args=(tmp_path,))
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    left, _ = sorted((tmp_path / "fake").iterdir(), reverse=True)
    assert left.name.startswith(".making-")
    cache.check(build_fake(tmp_path) / "train", checksums=True)
    assert [path.name[0] != "." for path in (tmp_path / "fake").iterdir()] == [True]
    # What a killed run of another version left goes when it is a day old; another machine might still be writing.
    other = tmp_path / "fake" / ".making-other"
    other.mkdir()
    cache_writer._remove_stale(tmp_path / "fake")
    assert other.exists()
    os.utime(other, (0, 0))
    cache_writer._remove_stale(tmp_path / "fake")
    assert not other.exists()


def test_two_processes_at_once(tmp_path):
    context = multiprocessing.get_context("spawn")
    started = context.Barrier(2)
    processes = [context.Process(target=_build_slowly, args=(tmp_path, started)) for _ in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0, 0]
    (directory,) = (tmp_path / "fake").iterdir()
    for split in ("train", "validation"):
        cache.check(directory / split, checksums=True)


def test_failure_leaves_nothing(tmp_path):
    def fail(index):
        raise OSError("disk on fire")

    with pytest.raises(OSError, match="disk on fire"):
        build_fake(tmp_path, on_document=fail)
    assert not list((tmp_path / "fake").glob("**/tokens.bin"))


@pytest.mark.parametrize("name", ["tokens.bin", "offsets.npy", "bytes.npy", "manifest.json"])
def test_missing_and_truncated_files_are_named(tmp_path, name):
    directory = build_fake(tmp_path)
    path = directory / "train" / (name if name == "manifest.json" else f"00000/{name}")
    content = path.read_bytes()
    path.write_bytes(content[:-1] if name != "manifest.json" else content[: len(content) // 2])
    for attempt in (lambda: cache.check(directory / "train"), lambda: build_fake(tmp_path)):
        with pytest.raises(ValueError, match=rf"{name} (has|cannot be read).*Remove {directory}"):
            attempt()
    path.unlink()
    with pytest.raises(ValueError, match=rf"{name} (is missing|cannot be read)"):
        cache.check(directory / "train")


def test_removing_what_the_message_names_repairs_a_cache(tmp_path):
    register("cache_repair")
    path = cache.build("cache_repair", tmp_path, modules=())
    (directory,) = component_directories(path)
    for damaged in (directory / "train" / "00000/tokens.bin", path):
        damaged.write_bytes(b"?")
        with pytest.raises(ValueError) as caught:
            cache.find("cache_repair", tmp_path)
            cache.build("cache_repair", tmp_path, modules=())
        removed = pathlib.Path(re.search("Remove (.*) and start again", str(caught.value))[1])
        assert removed in (directory, path)
        shutil.rmtree(removed) if removed.is_dir() else removed.unlink()
        assert cache.find("cache_repair", tmp_path) is None
        assert cache.build("cache_repair", tmp_path, modules=()) == path == cache.find("cache_repair", tmp_path)
        cache.check(directory / "train", checksums=True)


def test_altered_file_is_found_by_its_checksum(tmp_path):
    directory = build_fake(tmp_path)
    path = directory / "train" / "00000/tokens.bin"
    content = bytearray(path.read_bytes())
    content[1] ^= 1
    path.write_bytes(content)
    cache.check(directory / "train")
    with pytest.raises(ValueError, match=r"tokens\.bin does not have its recorded checksum"):
        cache.check(directory / "train", checksums=True)


def test_other_format_is_refused(tmp_path):
    directory = build_fake(tmp_path)
    path = directory / "train" / "manifest.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "format": 99}))
    with pytest.raises(ValueError, match="cache format 99, not 2"):
        cache.check(directory / "train")


def test_cache_dir_follows_the_environment(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    monkeypatch.setenv("T5X_SSM_CACHE_DIR", str(tmp_path / "own"))
    assert cache.default_cache_dir() == tmp_path / "own"
    monkeypatch.delenv("T5X_SSM_CACHE_DIR")
    assert cache.default_cache_dir() == tmp_path / "xdg" / "t5x_ssm"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert cache.default_cache_dir() == tmp_path / "home" / ".cache" / "t5x_ssm"


def test_unusable_tasks_are_refused_by_name(tmp_path):
    import seqio

    register("cache_two_features", features=("answers", "targets"))
    register("cache_bytes")
    register("cache_sentinels", vocabulary=seqio.ByteVocabulary(extra_ids=7))
    for name, rates in {
        "cache_vocabularies": [("cache_bytes", 1), ("cache_sentinels", 1)],
        "cache_zero": [("cache_bytes", 0)],
        "cache_negative": [("cache_bytes", -1)],
    }.items():
        if name not in seqio.MixtureRegistry.names():
            seqio.MixtureRegistry.add(name, rates)
    for name, message in {
        "cache_two_features": r"features \['answers', 'targets'\].*only feature is 'targets', pairs of texts",
        "cache_vocabularies": "'cache_vocabularies' differ in their vocabularies",
        "cache_zero": "rate 0.0 in mixture 'cache_zero'; a rate must be positive",
        "cache_negative": "rate -1.0 in mixture 'cache_negative'",
        "cache_byte": "No task or mixture is named 'cache_byte'. The nearest names: cache_bytes",
    }.items():
        with pytest.raises(ValueError, match=message):
            cache.build(name, tmp_path, modules=())
    with pytest.raises(ValueError, match="Cannot import 'no_such_module'"):
        cache.build("cache_bytes", tmp_path, modules=("no_such_module",))


def test_command_line(tmp_path, capsys):
    register("cache_command", {"train": [b"one", b"two"]})
    cache.main(["--mixture=cache_command", f"--cache_dir={tmp_path}"])
    table, path = capsys.readouterr().out.splitlines()
    assert table.split() == ["cache_command", "train", "rate", "1", "2", "documents", "8", "tokens", "6", "bytes"]
    assert pathlib.Path(path) == cache.find("cache_command", tmp_path)
    with pytest.raises(SystemExit, match=r"^tasks\.cache: No task or mixture is named 'cache_comand'.*cache_command"):
        cache.main(["--mixture=cache_comand", f"--cache_dir={tmp_path}"])
