"""Reading records, named fields of one example, from JSON lines or from tables with tabs between."""

import json
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from tasks.corpora.formats import Counts, open_binary, replaced
from tasks.corpora.settings import CorpusError

ENDINGS = (".jsonl", ".json", ".tsv", ".jsonl.gz", ".tsv.gz", ".jsonl.zst")

Record = Mapping[str, Any]


def find_file(folder: pathlib.Path, stems: Sequence[str]) -> pathlib.Path | None:
    """The first of folder/STEM.ENDING that exists, by the order of stems, then of `ENDINGS`."""
    paths = (folder / f"{stem}{ending}" for stem in stems for ending in ENDINGS)
    return next((path for path in paths if path.is_file()), None)


def read(path: pathlib.Path, counts: Counts, columns: Sequence[str] | None = None) -> Iterator[tuple[str, Record]]:
    """The records of a file, each with the place where it stands, for messages.

    Args:
      path: a file of JSON objects, one a line; or a table, whose name has .tsv in it.
      counts: lines of a table that have fewer fields than it has columns are left out and counted as `malformed`; what
        is not UTF-8 is replaced and counted as `invalid_utf8`.
      columns: names of a table's columns, if its first line does not have them.

    Raises:
      CorpusError: a line that is no JSON object; the message names file and line.
    """
    is_table = ".tsv" in path.suffixes
    with open_binary(path) as file:
        for number, line in enumerate(file, 1):
            text = replaced(line, counts).rstrip("\r\n")
            where = f"{path}, line {number}"
            if not text.strip():
                continue
            if not is_table:
                yield where, _json_object(text, where)
            elif columns is None:
                columns = text.split("\t")
            elif len(fields := text.split("\t")) < len(columns):
                counts["malformed"] += 1
            else:
                yield where, dict(zip(columns, fields, strict=False))


def _json_object(text: str, where: str) -> Record:
    try:
        record = json.loads(text)
    except ValueError as error:
        raise CorpusError(f"{where}: this is no JSON ({error}).") from error
    if not isinstance(record, dict):
        raise CorpusError(f"{where}: this is a JSON {type(record).__name__}, not an object.")
    return record


def field(record: Record, names: Sequence[str], where: str) -> Any:
    """The first of the named fields that a record has.

    Raises:
      CorpusError: it has none of them.
    """
    for name in names:
        if name in record:
            return record[name]
    raise CorpusError(f"{where}: there is none of {list(names)}; the record has {sorted(record)}.")
