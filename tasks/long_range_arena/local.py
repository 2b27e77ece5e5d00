"""The arena's tasks whose data is read from a folder: IMDb, AAN pairs, CIFAR-10 and Speech Commands.

    $T5X_SSM_LRA_TEXT          the unpacked aclImdb/: train/{neg,pos}/*.txt and test/{neg,pos}/*.txt
    $T5X_SSM_LRA_RETRIEVAL     the arena's tsv_data/: new_aan_pairs.{train,eval,test}.tsv
    $T5X_SSM_LRA_IMAGE         the unpacked cifar-10-batches-py/: data_batch_1 … data_batch_5, test_batch
    $T5X_SSM_SPEECH_COMMANDS   the unpacked speech_commands_v0.02/: a folder of .wav files for each word, validation_list.txt
                               and testing_list.txt

or `<name>/corpora.location.path` in gin. Nothing is read before data is asked for.
"""

import functools
import hashlib
import pathlib
import pickle
import wave
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from tasks.corpora import settings
from tasks.provenance import version
from tasks.vocabularies import EOS_ID, encode_bytes

Example = dict[str, Any]
SAMPLES = 16_000
# fmt: off
WORDS = (
    "backward", "bed", "bird", "cat", "dog", "down", "eight", "five", "follow",
    "forward", "four", "go", "happy", "house", "learn", "left", "marvin", "nine",
    "no", "off", "on", "one", "right", "seven", "sheila", "six", "stop",
    "three", "tree", "two", "up", "visual", "wow", "yes", "zero",
)
# fmt: on
# Luminance of ITU-R 601-2, as image libraries turn colours grey.
_GREY = np.array([0.299, 0.587, 0.114])


def describe(name: str) -> dict[str, Any]:
    """What the token cache records of a folder: where it is, names and sizes of its files, and how they are read."""
    root, digest = settings.location(name), hashlib.sha256()
    for path in sorted(path for path in root.rglob("*") if path.is_file()):
        digest.update(f"{path.relative_to(root)} {path.stat().st_size}\n".encode())
    environment = settings.place_environment(name) | {f"module {__name__}": version(f"module {__name__}")}
    return {"files": digest.hexdigest()[:16], "environment": environment}


def text_shards(split: str) -> list[str]:
    """The arena's Text has no held-out split of its own: 'validation' is the test set, as its published results have it."""
    folder = "train" if split == "train" else "test"
    return [f"{folder}/{_existing('lra_text', f'{folder}/{label}', split).name}" for label in ("neg", "pos")]


def read_text(split: str, shard: str) -> Iterator[Example]:
    """Reviews as bytes, closed by the end of text; 0 is negative."""
    del split
    label = int(shard.endswith("pos"))
    for path in sorted((settings.location("lra_text") / shard).glob("*.txt")):
        yield {"inputs": _text(path.read_bytes()), "targets": [label]}


_RETRIEVAL_FILES = {
    split: f"new_aan_pairs.{word}.tsv"
    for split, word in {"train": "train", "validation": "eval", "test": "test"}.items()
}


def retrieval_shards(split: str) -> list[str]:
    """The split's one file."""
    return [_existing("lra_retrieval", _RETRIEVAL_FILES[split], split).name]


def read_retrieval(split: str, shard: str) -> Iterator[Example]:
    """Pairs of papers' texts as bytes. A line is label, two ids, and the two texts, with tabs between."""
    del split
    path = settings.location("lra_retrieval") / shard
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            fields = line.rstrip(b"\r\n").split(b"\t")
            if len(fields) != 5:
                raise settings.CorpusError(f"{path}, line {number}: {len(fields)} fields instead of 5.")
            label, _, _, first, second = fields
            yield {"inputs": _text(_bytes(first)), "inputs2": _text(_bytes(second)), "targets": [int(float(label))]}


# A tenth of the training images is held out, as the published results have it.
_HELD_OUT_IMAGES = 1000


def image_shards(split: str) -> list[str]:
    """The training files are shared by two splits, see `read_image`."""
    names = ["test_batch"] if split == "test" else [f"data_batch_{i}" for i in range(1, 6)]
    return [_existing("lra_image", name, split).name for name in names]


def read_image(split: str, shard: str) -> Iterator[Example]:
    """Grey pixels 0…255, row by row. Of each training file the last images are the validation split."""
    batch = _cifar(settings.location("lra_image") / shard)
    pixels = batch[b"data"].reshape(-1, 3, 32 * 32)
    first, last = 0, len(pixels)
    if split != "test":
        border = last - _HELD_OUT_IMAGES
        first, last = (0, border) if split == "train" else (border, last)
    for i in range(first, last):
        grey = np.floor(np.tensordot(_GREY, pixels[i], 1) + 0.5)
        yield {"inputs": grey.astype(np.int32), "targets": [batch[b"labels"][i]]}


def speech_shards(split: str) -> list[str]:
    """A shard is a word."""
    _existing("speech_commands", "validation_list.txt", split)
    return [_existing("speech_commands", word, split).name for word in WORDS]


def read_speech(split: str, shard: str) -> Iterator[Example]:
    """A word as 16,000 samples of 16 bits, shifted to 0…65,535; shorter recordings end in silence."""
    root = settings.location("speech_commands")
    held_out = _speech_lists(root)
    for path in sorted((root / shard).glob("*.wav")):
        if held_out.get(f"{shard}/{path.name}", "train") != split:
            continue
        with wave.open(str(path)) as file:
            if file.getsampwidth() != 2 or file.getnchannels() != 1:
                raise settings.CorpusError(f"{path} is no recording of one channel of 16 bits.")
            samples = np.frombuffer(file.readframes(SAMPLES), "<i2").astype(np.int32)
        padded = np.zeros(SAMPLES, np.int32)
        padded[: len(samples)] = samples
        yield {"inputs": padded + 32_768, "targets": [WORDS.index(shard)]}


def _existing(name: str, below: str, split: str) -> pathlib.Path:
    path = settings.location(name) / below
    if not path.exists():
        raise settings.CorpusError(
            f"The split {split!r} of {name!r} needs {path}, which does not exist; ${settings.variable(name)} is to be the "
            "folder described in tasks/long_range_arena/local.py."
        )
    return path


def _text(data: bytes) -> list[int]:
    return [*encode_bytes(data), EOS_ID]


def _bytes(field: bytes) -> bytes:
    """A text that may have been written as Python's repr of bytes, as the arena's files have it."""
    if field[:2] in (b"b'", b'b"') and field[-1:] == field[1:2]:
        return field[2:-1]
    return field


class _ArraysOnly(pickle.Unpickler):
    """Reads a pickle of dicts, lists and arrays, and refuses whatever else one can hold."""

    _ALLOWED = ("numpy.core.multiarray", "numpy._core.multiarray", "numpy", "_codecs")

    def find_class(self, module: str, name: str) -> Any:
        if module in self._ALLOWED and name in ("_reconstruct", "ndarray", "dtype", "encode"):
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"it holds a {module}.{name}")


def _cifar(path: pathlib.Path) -> dict[bytes, Any]:
    try:
        with open(path, "rb") as file:
            batch = _ArraysOnly(file, encoding="bytes").load()
        if batch[b"data"].shape[1:] == (3072,) and len(batch[b"labels"]) == len(batch[b"data"]) > _HELD_OUT_IMAGES:
            return batch
        reason = "it is of another shape"
    except (OSError, pickle.UnpicklingError, EOFError, KeyError, TypeError, AttributeError) as error:
        reason = str(error)
    raise settings.CorpusError(f"{path} is no batch of CIFAR-10's Python version: {reason}.")


@functools.lru_cache(maxsize=2)
def _speech_lists(root: pathlib.Path) -> dict[str, str]:
    """The split of each held-out recording."""
    files = {"validation": "validation_list.txt", "test": "testing_list.txt"}
    return {line: split for split, name in files.items() for line in (root / name).read_text().split()}


READERS: dict[str, tuple[Callable[[str], Sequence[str]], Callable[[str, str], Iterator[Example]]]] = {
    "lra_text": (text_shards, read_text),
    "lra_retrieval": (retrieval_shards, read_retrieval),
    "lra_image": (image_shards, read_image),
    "speech_commands": (speech_shards, read_speech),
}
