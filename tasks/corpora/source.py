"""A corpus as a seqio data source: its splits, and their documents one at a time, wherever it lies."""

import collections
import hashlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import seqio
import tensorflow as tf

from tasks.cache_files import FEATURE
from tasks.corpora import formats, places, settings
from tasks.python_source import PythonSource

# A corpus without published held-out documents gives one document in so many to validation.
HELD_OUT_ONE_IN = 200


class CorpusSource(PythonSource):
    """The documents of a corpus, as {'targets': UTF-8 text}.

    A folder's files, or those of a TFDS data set, are seqio's shards. `counts` says what the reading in this process has met
    so far, see `formats.clean`.
    """

    def __init__(
        self,
        corpus: str,
        read: formats.Reader,
        patterns: Mapping[str, Sequence[str]],
        *,
        held_out: bool = False,
        published: Mapping[str, Mapping[str, int]] | None = None,
        tfds_fields: Sequence[str] = (),
        tfds_splits: Mapping[str, str] | None = None,
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
          tfds_fields: names that the text has in a TFDS data set; none if the corpus is a folder only.
          tfds_splits: TFDS's names of the splits, where they are others.
        """
        super().__init__(splits=tuple(patterns))
        self.corpus, self.counts = corpus, collections.Counter()
        self._read, self._patterns, self._held_out = read, dict(patterns), held_out
        self._published = published
        self._tfds_fields, self._tfds_splits = tuple(tfds_fields), dict(tfds_splits or {})

    def __repr__(self) -> str:
        return f"CorpusSource({self.corpus})"

    def list_shards(self, split: str) -> list[str]:
        """Names of the files of a split; CorpusError if there are none."""
        return self._shards(split, self._place())[0]

    def describe_source(self) -> dict[str, Any]:
        """What the token cache records: names and sizes of all files, and the settings that it was made under."""
        place, digest = self._place(), hashlib.sha256()
        present = [split for split in self.splits if not self.missing(split)]
        for split in present:
            # One that is held out has train's files.
            for line in place.describe(split if place.shards(split) else "train"):
                digest.update(f"{split} {line}\n".encode())
        return {
            "files": digest.hexdigest()[:16],
            "splits": present,
            "environment": settings.environment(self.corpus),
            **({"published": self._published} if self._published else {}),
        }

    def missing(self, split: str) -> str | None:
        """Why the corpus, which must be there, has no files of a split; None if it has. Train may not be missing."""
        place = self._place()
        try:
            self._shards(split, place)
        except settings.CorpusError as error:
            if split == "train":
                raise
            return str(error)
        return None

    def documents(self, split: str, shards: Sequence[str] | None = None) -> Iterator[bytes]:
        """The documents of a split, or of some of its shards."""
        place = self._place()
        every, part = self._shards(split, place)
        # A split that is held out is read where train's documents are.
        files_of = split if part is None else "train"
        for shard in every if shards is None else shards:
            try:
                for document in formats.clean(place.read(files_of, shard, self.counts), self.counts):
                    if part is None or _is_held_out(document) == (part == "validation"):
                        yield document
                    else:
                        # It belongs to the other split, and is counted there.
                        self.counts["documents"] -= 1
                        self.counts["bytes"] -= len(document)
            except settings.CorpusError as error:
                raise settings.CorpusError(f"The corpus {self.corpus!r}: {error}") from error

    def get_dataset(
        self,
        split: str,
        shuffle: bool = True,
        seed: int | None = None,
        shard_info: seqio.ShardInfo | None = None,
        **_: Any,
    ) -> tf.data.Dataset:
        shards = self.list_shards(split)
        if shard_info is not None and shard_info.num_shards > 1:
            shards = shards[shard_info.index :: shard_info.num_shards]
        if shuffle:
            random = np.random.default_rng(None if seed is None else int(seed))
            shards = [shards[i] for i in random.permutation(len(shards))]

        def examples() -> Iterator[dict[str, bytes]]:
            return ({FEATURE: document} for document in self.documents(split, shards))

        return self.generated(examples, {FEATURE: tf.TensorSpec((), tf.string)})

    def _place(self) -> places.Place:
        """Where the corpus lies now, as it is set."""
        name = settings.tfds_name(self.corpus)
        if name is None:
            return places.Folder(settings.location(self.corpus), self._read, self._patterns)
        if not self._tfds_fields:
            raise settings.CorpusError(
                f"The corpus {self.corpus!r} is read from its files; TFDS does not have it ({name})."
            )
        return places.DataSet(name, self._tfds_fields, self._tfds_splits)

    def _shards(self, split: str, place: places.Place) -> tuple[list[str], str | None]:
        """The shards of a split, and if they hold another split too, which part of their documents is meant."""
        if self._held_out and (shards := place.shards("train")) and not place.shards("validation"):
            return shards, split
        if not (shards := place.shards(split)):
            raise settings.CorpusError(f"The corpus {self.corpus!r}: {place.absence(split)}")
        return shards, None


def _is_held_out(document: bytes) -> bool:
    return int.from_bytes(hashlib.sha256(document).digest()[:8], "little") % HELD_OUT_ONE_IN == 0
