"""Where the documents of a corpus come from: the files below a folder, or a TFDS data set that has been prepared.

Both have splits of named shards, and give the raw documents of a shard, one at a time.
"""

import fnmatch
import functools
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Protocol

import tensorflow_datasets as tfds
from tensorflow_datasets.core import read_only_builder
from tensorflow_datasets.core.utils import file_utils

from tasks.corpora import formats
from tasks.corpora.settings import CorpusError


class Place(Protocol):
    """What `Folder` and `DataSet` have in common."""

    def shards(self, split: str) -> list[str]:
        """Names of the shards of a split, in the order of the corpus; none where it has no such split."""

    def read(self, split: str, shard: str, counts: formats.Counts) -> Iterator[bytes | str]:
        """The documents of a shard.

        Raises:
          CorpusError: they cannot be read; the message names the file.
        """

    def describe(self, split: str) -> Iterator[str]:
        """What identifies the contents of a split without reading them, a line for each part."""

    def absence(self, split: str) -> str:
        """Why there are no shards of a split."""


class Folder:
    """The files below a folder, or one file. Their paths are the shards, in the order of names, as on every machine."""

    def __init__(self, root: pathlib.Path, read: formats.Reader, patterns: Mapping[str, Sequence[str]]):
        """
        Args:
          root: the folder or file.
          read: from a file to its documents.
          patterns: see `tasks.corpora.source.CorpusSource`.
        """
        self._root, self._read, self._patterns = root, read, patterns
        if root.is_file():
            self._paths = {root.name: root}
        else:
            files = (path for path in root.rglob("*") if path.is_file() and not path.name.startswith("."))
            self._paths = {str(path.relative_to(root)): path for path in sorted(files)}

    def shards(self, split: str) -> list[str]:
        return [str(path) for name, path in self._paths.items() if _matches(name, self._patterns[split])]

    def read(self, split: str, shard: str, counts: formats.Counts) -> Iterator[bytes | str]:
        try:
            yield from self._read(pathlib.Path(shard), counts)
        except formats.damage() as error:
            raise CorpusError(f"{shard} cannot be read: {error}.") from error

    def describe(self, split: str) -> Iterator[str]:
        for name, path in self._paths.items():
            if _matches(name, self._patterns[split]):
                yield f"{name} {path.stat().st_size}"

    def absence(self, split: str) -> str:
        return f"{self._root} has no file for the split {split!r}; looked for {', '.join(self._patterns[split])}."


class DataSet:
    """A TFDS data set; the files of a split are its shards. Only what has been prepared is read: nothing is fetched."""

    def __init__(self, name: str, fields: Sequence[str], splits: Mapping[str, str]):
        """
        Args:
          name: with its version, as 'lm1b:1.1.0'.
          fields: names that the text may have; the first that the data set has is taken.
          splits: TFDS's names of the splits that it has others for.

        Raises:
          CorpusError: it is in none of TFDS's folders, or has none of the fields.
        """
        self._name, self._splits = name, splits
        self._builder = _prepared(name, tuple(map(str, file_utils.list_data_dirs(given_data_dir=None))))
        field = next((field for field in fields if field in self._builder.info.features), None)
        if field is None:
            have = sorted(self._builder.info.features)
            raise CorpusError(f"The TFDS data set {name} has the fields {have}, and none of {list(fields)}.")
        self._field: str = field

    def shards(self, split: str) -> list[str]:
        return list(self._builder.info.splits[own].filenames) if (own := self._own(split)) else []

    def read(self, split: str, shard: str, counts: formats.Counts) -> Iterator[bytes]:
        del counts
        index = self.shards(split).index(shard)
        dataset = self._builder.as_dataset(
            split=tfds.core.ReadInstruction(self._own(split), from_=index, to=index + 1, unit="shard"),
            shuffle_files=False,
            decoders=tfds.decode.PartialDecoding({self._field: True}),
            read_config=tfds.ReadConfig(try_autocache=False),  # It would hold a small data set in memory.
        )
        try:
            for record in dataset.as_numpy_iterator():
                yield record[self._field]
        except Exception as error:  # TensorFlow's, of which there are many.
            raise CorpusError(f"{shard} of the TFDS data set {self._name} cannot be read: {error}.") from error

    def describe(self, split: str) -> Iterator[str]:
        if own := self._own(split):
            info = self._builder.info.splits[own]
            lengths = zip(info.filenames, info.shard_lengths, strict=True)
            yield from (f"{self._name} {name} {examples}" for name, examples in lengths)

    def absence(self, split: str) -> str:
        have = ", ".join(sorted(self._builder.info.splits))
        return f"The TFDS data set {self._name} has no split {self._splits.get(split, split)!r}; it has {have}."

    def _own(self, split: str) -> str | None:
        own = self._splits.get(split, split)
        return own if own in self._builder.info.splits else None


@functools.cache
def _prepared(name: str, folders: tuple[str, ...]) -> tfds.core.DatasetBuilder:
    """Opens a data set by what its folder says of it, so that no code of TFDS looks for it elsewhere."""
    try:
        return read_only_builder.builder_from_files(name)
    except tfds.core.DatasetNotFoundError:
        raise CorpusError(
            f"The TFDS data set {name} has not been prepared in {' or '.join(folders)}: set TFDS_DATA_DIR to the folder that "
            f"has it, or prepare it with `tfds build {name.partition(':')[0]}`, which may fetch a lot."
        ) from None
    except ValueError as error:
        raise CorpusError(f"The TFDS data set {name} cannot be opened: {error}") from error


def _matches(name: str, patterns: Sequence[str]) -> bool:
    """A pattern that begins with ! takes away."""
    taken = any(fnmatch.fnmatchcase(name, p) for p in patterns if not p.startswith("!"))
    return taken and not any(fnmatch.fnmatchcase(name, p[1:]) for p in patterns if p.startswith("!"))
