"""A corpus on disk as a seqio data source: which files a split has, and their documents one at a time."""

import collections
import fnmatch
import hashlib
import os
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import seqio
import tensorflow as tf

from tasks.cache_files import FEATURE
from tasks.corpora import formats, settings
from tasks.python_source import PythonSource

# A corpus without published held-out documents gives one document in so many to validation.
HELD_OUT_ONE_IN = 200


class CorpusSource(PythonSource):
    """The documents of a corpus, as {'targets': UTF-8 text}.

    Files are taken in the order of their names, so that a corpus is the same on every machine; they are also seqio's
    shards. `counts` says what the reading in this process has met so far, see `formats.clean`.
    """

    def __init__(
        self,
        corpus: str,
        read: formats.Reader,
        patterns: Mapping[str, Sequence[str]],
        *,
        held_out: bool = False,
        published: Mapping[str, Mapping[str, int]] | None = None,
    ):
        """
        Args:
          corpus: the name that its location is set under, see `settings.location`.
          read: from a file to its documents.
          patterns: for every split, patterns of the paths of its files below the corpus's folder, as fnmatch has them:
            `*` also goes over folders. A corpus that is one file is matched by its name.
          held_out: whether a corpus that has files of 'train' only is split in two by a hash of its documents' text,
            so that equal documents stay on one side.
          published: {split: {'documents': …, 'words': …}} of the published corpus, for perplexity per word.
        """
        super().__init__(splits=tuple(patterns))
        self.corpus, self.counts = corpus, collections.Counter()
        self._read, self._patterns, self._held_out = read, dict(patterns), held_out
        self._published = published

    def __repr__(self) -> str:
        return f"CorpusSource({self.corpus})"

    def list_shards(self, split: str) -> list[str]:
        """Paths of the files of a split; CorpusError if there are none."""
        return [str(path) for path in self._files(split)[0]]

    def describe_source(self) -> dict[str, Any]:
        """What the token cache records: names and sizes of all files, and the settings that it was made under."""
        root = settings.location(self.corpus)
        digest = hashlib.sha256()
        for split in self.splits:
            for path in [] if self.missing(split) else self._files(split)[0]:
                digest.update(f"{split} {path.relative_to(root)} {path.stat().st_size}\n".encode())
        return {
            "files": digest.hexdigest()[:16],
            "splits": [split for split in self.splits if not self.missing(split)],
            "environment": {
                f"location {settings.variable(self.corpus)}": str(root),
                f"variable {settings.VOCABULARY_VARIABLE}": os.environ.get(settings.VOCABULARY_VARIABLE),
            },
            **({"published": self._published} if self._published else {}),
        }

    def missing(self, split: str) -> str | None:
        """Why the corpus, which must be there, has no files of a split; None if it has. Train may not be missing."""
        settings.location(self.corpus)
        try:
            self._files(split)
        except settings.CorpusError as error:
            if split == "train":
                raise
            return str(error)
        return None

    def documents(self, split: str, files: Sequence[str] | None = None) -> Iterator[bytes]:
        """The documents of a split, or of some of its files."""
        paths, part = self._files(split)
        for path in paths if files is None else map(pathlib.Path, files):
            try:
                for document in formats.clean(self._read(path, self.counts), self.counts):
                    if part is None or _is_held_out(document) == (part == "validation"):
                        yield document
                    else:
                        # It belongs to the other split, and is counted there.
                        self.counts["documents"] -= 1
                        self.counts["bytes"] -= len(document)
            except formats.damage() as error:
                raise settings.CorpusError(f"{path} of the corpus {self.corpus!r} cannot be read: {error}.") from error

    def get_dataset(
        self,
        split: str,
        shuffle: bool = True,
        seed: int | None = None,
        shard_info: seqio.ShardInfo | None = None,
        **_: Any,
    ) -> tf.data.Dataset:
        files = self.list_shards(split)
        if shard_info is not None and shard_info.num_shards > 1:
            files = files[shard_info.index :: shard_info.num_shards]
        if shuffle:
            files = [
                files[i] for i in np.random.default_rng(None if seed is None else int(seed)).permutation(len(files))
            ]

        def examples() -> Iterator[dict[str, bytes]]:
            return ({FEATURE: document} for document in self.documents(split, files))

        return self.generated(examples, {FEATURE: tf.TensorSpec((), tf.string)})

    def _files(self, split: str) -> tuple[list[pathlib.Path], str | None]:
        """The files of a split, and if they hold another split too, which part of their documents is meant."""
        root = settings.location(self.corpus)
        if root.is_file():
            paths = [root]
        else:
            paths = sorted(path for path in root.rglob("*") if path.is_file() and not path.name.startswith("."))
        matching = {
            name: [p for p in paths if _matches(str(p.relative_to(root)) if p != root else p.name, patterns)]
            for name, patterns in self._patterns.items()
        }
        if self._held_out and matching["train"] and not matching.get("validation"):
            return matching["train"], split
        if not matching[split]:
            raise settings.CorpusError(
                f"{root} has no file for the split {split!r} of the corpus {self.corpus!r}; looked for "
                f"{', '.join(self._patterns[split])}."
            )
        return matching[split], None


def _matches(name: str, patterns: Sequence[str]) -> bool:
    """A pattern that begins with ! takes away."""
    taken = any(fnmatch.fnmatchcase(name, p) for p in patterns if not p.startswith("!"))
    return taken and not any(fnmatch.fnmatchcase(name, p[1:]) for p in patterns if p.startswith("!"))


def _is_held_out(document: bytes) -> bool:
    return int.from_bytes(hashlib.sha256(document).digest()[:8], "little") % HELD_OUT_ONE_IN == 0
