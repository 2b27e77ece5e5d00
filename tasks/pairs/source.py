"""Records of texts, and of a label or a score where they have one, as a seqio data source: from a folder or from TFDS.

A folder's split is one file, read whole when it is opened: what comes after is TensorFlow's alone, so that a live pipeline
can save where it stands.
"""

import collections
import math
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import seqio
import tensorflow as tf

from tasks.corpora import settings
from tasks.pairs import records
from tasks.python_source import PythonSource

LABEL = "label"
# The stems of a split's file in a folder.
STEMS = {"train": ("train",), "validation": ("validation", "val", "valid", "dev"), "test": ("test",)}


class RecordSource(PythonSource):
    """Records {field: text}, and {'label': index} where there are labels, or {'label': number} where there are scores."""

    def __init__(
        self,
        location: str,
        fields: Mapping[str, Sequence[str]],
        *,
        stems: Mapping[str, Sequence[str]] = STEMS,
        folders: Sequence[str] = ("",),
        labels: Sequence[str] = (),
        scores: tuple[float, float] | None = None,
        label_fields: Sequence[str] = (LABEL,),
        columns: Sequence[str] | None = None,
        tfds_subset: str | None = None,
        tfds_splits: Mapping[str, str] | None = None,
    ):
        """
        Args:
          location: the name that the data's place is set under, see `tasks.corpora.settings`.
          fields: for every field, the names that it may have in a file or in TFDS.
          stems: for every split, the stems that its file may have.
          folders: names that the data's folder may have below its place.
          labels: the labels' names by index; a file has either.
          scores: the least and the greatest, where a label is a number between them.
          label_fields: names that the field of the label or score may have.
          columns: names of a table's columns, if its first line does not have them.
          tfds_subset: the part of the TFDS data set, as in glue/sst2.
          tfds_splits: TFDS's names of the splits, where they are others.
        """
        super().__init__(splits=tuple(stems))
        self._left_out: dict[str, collections.Counter] = {}
        self._location, self._fields, self._stems = location, dict(fields), dict(stems)
        self._folders, self._columns = tuple(folders), columns
        self._labels, self._scores, self._label_fields = tuple(labels), scores, tuple(label_fields)
        self._tfds_subset, self._tfds_splits = tfds_subset, dict(tfds_splits or {})

    def __repr__(self) -> str:
        return f"RecordSource({self._location}, {sorted(self._fields)})"

    def describe_source(self) -> dict[str, Any]:
        """What the token cache records: names and sizes of the files, or the TFDS data set, and the settings that it was made
        under."""
        name = settings.tfds_name(self._location, self._tfds_subset)
        found = (self._find(split) for split in self._stems) if name is None else ()
        files = [f"{path.name} {path.stat().st_size}" for path in found if path] if name is None else [name]
        return {"files": files, "environment": settings.environment(self._location)}

    def missing(self, split: str) -> str | None:
        """Why the folder has no file of a split; None if it has. Train may not be missing, and of TFDS none."""
        if settings.tfds_name(self._location) is None and split != "train" and not self._find(split):
            return self._absence(split)
        return None

    def get_dataset(
        self,
        split: str,
        shuffle: bool = True,
        seed: int | None = None,
        shard_info: seqio.ShardInfo | None = None,
        **_: Any,
    ) -> tf.data.Dataset:
        """The records of a split.

        Raises:
          CorpusError: they cannot be found or read.
        """
        del shard_info  # Of one shard.
        name = settings.tfds_name(self._location, self._tfds_subset)
        if name is not None:
            return self._from_tfds(name, split, shuffle, seed)
        found = list(self.read(split))
        columns = {field: [record[field] for record in found] for field in found[0]}
        tensors = {field: tf.constant(column) for field, column in columns.items()}
        order = tf.data.Dataset.range(len(found))
        if shuffle:
            # Numbers are shuffled, not texts: the shuffle buffer is part of a saved iterator state.
            order = order.shuffle(len(found), seed=seed)
        return order.map(lambda i: {field: tf.gather(column, i) for field, column in tensors.items()})

    def left_out(self, split: str) -> dict[str, int]:
        """What the last reading of a split left out: `malformed` lines of a table, and records with an `empty` text; and how many
        records had `invalid_utf8`, which was replaced."""
        return dict(self._left_out.get(split, {}))

    def read(self, split: str) -> Iterator[dict[str, str | int | float]]:
        """The records of a split of a folder, in the order of its file.

        Raises:
          CorpusError: there is no file, nothing in it, or a record without a field.
        """
        path, none = self._file(split), True
        counts = self._left_out[split] = collections.Counter()
        for where, record in records.read(path, counts, self._columns):
            found: dict[str, Any] = {
                name: str(records.field(record, names, where)) for name, names in self._fields.items()
            }
            if not all(text.strip() for text in found.values()):
                counts["empty"] += 1
                continue
            if self._labels or self._scores:
                check = self._label if self._labels else self._score
                found[LABEL] = check(records.field(record, self._label_fields, where), where)
            none = False
            yield found
        if none:
            raise settings.CorpusError(f"{path} has no records.")

    def _file(self, split: str) -> pathlib.Path:
        if path := self._find(split):
            return path
        raise settings.CorpusError(self._absence(split))

    def _find(self, split: str) -> pathlib.Path | None:
        root = settings.location(self._location)
        paths = (records.find_file(root / folder, self._stems[split]) for folder in self._folders)
        return next((path for path in paths if path), None)

    def _absence(self, split: str) -> str:
        below = " or ".join(str(settings.location(self._location) / folder) for folder in self._folders)
        return (
            f"There is no file of the split {split!r} in {below}; looked for {' and '.join(self._stems[split])} with "
            f"{', '.join(records.ENDINGS)}."
        )

    def _label(self, value: Any, where: str) -> int:
        if value in self._labels:
            return self._labels.index(value)
        if str(value).isdigit() and int(value) < len(self._labels):
            return int(value)
        raise settings.CorpusError(f"{where}: {value!r} is no label; there are {', '.join(self._labels)}.")

    def _score(self, value: Any, where: str) -> float:
        least, greatest = self._scores
        try:
            score = float(value)
        except (TypeError, ValueError):
            score = math.nan
        if not least <= score <= greatest:
            raise settings.CorpusError(f"{where}: {value!r} is no score from {least:g} to {greatest:g}.")
        return score

    def _from_tfds(self, name: str, split: str, shuffle: bool, seed: int | None) -> tf.data.Dataset:
        split_names = {own: self._tfds_splits.get(own, own) for own in self._stems}
        source = seqio.TfdsDataSource(name, splits=split_names)
        try:
            dataset = source.get_dataset(split, shuffle=shuffle, seed=seed)
        except Exception as error:  # TFDS has no errors of its own for what it neither has nor can fetch.
            raise settings.CorpusError(
                f"The TFDS data set {name} ({settings.variable(self._location)}) is not in TFDS's folder and could not be "
                f"fetched: {type(error).__name__}: {error}"
            ) from error
        wanted = {**self._fields, **({LABEL: self._label_fields} if self._labels or self._scores else {})}
        chosen = {field: next((n for n in names if n in dataset.element_spec), None) for field, names in wanted.items()}
        for field, found in chosen.items():
            if found is None:
                raise settings.CorpusError(
                    f"The TFDS data set {name} has none of {list(wanted[field])}, but {sorted(dataset.element_spec)}."
                )
        return dataset.map(lambda record: {field: record[found] for field, found in chosen.items()})
