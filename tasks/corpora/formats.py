"""Reading the documents of a file, one at a time, whatever its format; no more than one document is in memory.

.txt .tex .md and source files      the file is a document
.jsonl .json .ndjson [.gz .zst .xz]  a JSON object a line, whose text is a field
.parquet                            a row is a document, whose text is a column
.tar [.gz .xz]                      every file in the archive is a document
"""

import bz2
import collections
import gzip
import io
import json
import lzma
import pathlib
import sys
import tarfile
import zlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from tasks.corpora.settings import CorpusError

# A text file longer than this becomes several documents, cut at line ends, so that any file fits into memory.
LONGEST_TEXT = 64 * 1024 * 1024
_PARQUET_ROWS = 256

Counts = collections.Counter
# From a file to its raw documents.
Reader = Callable[[pathlib.Path, Counts], Iterator[bytes | str]]


def clean(documents: Iterator[bytes | str], counts: Counts) -> Iterator[bytes]:
    """Documents as valid UTF-8: what is invalid is replaced by U+FFFD and counted, what is empty left out and counted.

    Adds to `counts`: documents, bytes, and where there are any invalid_utf8 and empty.
    """
    for document in documents:
        # JSON can hold half a surrogate pair, which no encoding has.
        data = document.encode("utf-8", "surrogatepass") if isinstance(document, str) else document
        try:
            data.decode("utf-8")
        except UnicodeDecodeError:
            data = replaced(data, counts).encode("utf-8")
        if not data.strip():
            counts["empty"] += 1
            continue
        counts["documents"] += 1
        counts["bytes"] += len(data)
        yield data


def replaced(data: bytes, counts: Counts) -> str:
    """Text of which what is not UTF-8 is replaced by U+FFFD and counted as `invalid_utf8`."""
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError:
        counts["invalid_utf8"] += 1
        return data.decode("utf-8", "replace")


def damage() -> tuple[type[Exception], ...]:
    """What reading a broken file raises."""
    errors = (OSError, EOFError, zlib.error, lzma.LZMAError, tarfile.TarError)
    zstandard = sys.modules.get("zstandard")
    return (*errors, zstandard.ZstdError) if zstandard else errors


def open_binary(path: pathlib.Path) -> io.BufferedIOBase:
    """Opens a file for reading through the decompression that its name asks for."""
    if path.suffix == ".zst":
        try:
            import zstandard
        except ImportError:
            raise CorpusError(f"{path} is compressed by zstandard; install t5x_ssm[data].") from None
        # The Pile's files are several frames, one after the other.
        return io.BufferedReader(zstandard.ZstdDecompressor().stream_reader(open(path, "rb"), read_across_frames=True))
    openers = {".gz": gzip.open, ".xz": lzma.open, ".bz2": bz2.open}
    return openers.get(path.suffix, open)(path, "rb")


def text(path: pathlib.Path, counts: Counts) -> Iterator[bytes]:
    """The whole file as a document; one longer than `LONGEST_TEXT` in pieces (counted as `cut`)."""
    with open_binary(path) as file:
        while piece := file.read(LONGEST_TEXT):
            if len(piece) == LONGEST_TEXT:
                piece += file.readline(LONGEST_TEXT)
                counts["cut"] += 1
            yield piece
        if file.tell() == 0:
            yield b""


def lines(path: pathlib.Path, counts: Counts) -> Iterator[bytes]:
    """Every line is a document, without its end."""
    del counts
    with open_binary(path) as file:
        for line in file:
            yield line.rstrip(b"\r\n")


def json_lines(
    *fields: str, wanted: Callable[[Mapping[str, Any]], bool] = lambda record: True
) -> Callable[[pathlib.Path, Counts], Iterator[str]]:
    """A reader of JSON lines.

    Args:
      *fields: names that the text may have; the first that a record has is taken.
      wanted: which records are read.

    Returns:
      A reader. It raises CorpusError, with the file's name and the line's number, for what is no JSON object with one
      of these fields.
    """

    def read(path: pathlib.Path, counts: Counts) -> Iterator[str]:
        with open_binary(path) as file:
            for number, line in enumerate(file, 1):
                if not line.strip():
                    continue
                try:
                    record = json.loads(replaced(line, counts))
                except ValueError as error:
                    raise CorpusError(f"{path}, line {number}: this is no JSON ({error}).") from error
                if isinstance(record, dict) and not wanted(record):
                    continue
                yield _field(record, fields, f"{path}, line {number}")

    return read


def parquet(*fields: str) -> Callable[[pathlib.Path, Counts], Iterator[bytes]]:
    """A reader of Parquet files; fields as in `json_lines`, but names of columns."""

    def read(path: pathlib.Path, counts: Counts) -> Iterator[bytes]:
        del counts
        try:
            import pyarrow.parquet
        except ImportError:
            raise CorpusError(f"{path} is a Parquet file; install t5x_ssm[data].") from None
        try:
            table = pyarrow.parquet.ParquetFile(path)
        except (pyarrow.ArrowException, OSError) as error:
            raise CorpusError(f"{path} cannot be read as Parquet: {error}.") from error
        with table:
            column = next((field for field in fields if field in table.schema_arrow.names), None)
            if column is None:
                raise CorpusError(f"{path} has the columns {table.schema_arrow.names}, and none of {list(fields)}.")
            kind = table.schema_arrow.field(column).type
            if not (pyarrow.types.is_string(kind) or pyarrow.types.is_large_string(kind)):
                raise CorpusError(f"The column {column!r} of {path} has the type {kind}, and not text.")
            for batch in table.iter_batches(batch_size=_PARQUET_ROWS, columns=[column]):
                # As bytes, because Parquet does not see to it that texts are UTF-8.
                for value in batch.column(0).cast(pyarrow.large_binary()):
                    yield value.as_py() or b""

    return read


def tar(path: pathlib.Path, counts: Counts) -> Iterator[bytes]:
    """Every file of an archive, read as a stream."""
    del counts
    with open_binary(path) as file, tarfile.open(fileobj=file, mode="r|") as archive:
        for member in archive:
            if member.isfile():
                yield archive.extractfile(member).read()


def by_name(*fields: str) -> Reader:
    """A reader that chooses by the file's name, see above; `fields` are those of JSON and Parquet."""
    of_objects = json_lines(*fields)
    of_tables = parquet(*fields)

    def read(path: pathlib.Path, counts: Counts) -> Iterator[bytes | str]:
        inner = path.with_suffix("") if path.suffix in (".gz", ".zst", ".xz", ".bz2") else path
        if inner.suffix in (".jsonl", ".json", ".ndjson"):
            return of_objects(path, counts)
        if inner.suffix == ".parquet":
            return of_tables(path, counts)
        return (tar if inner.suffix == ".tar" or path.name.endswith("_data.xz") else text)(path, counts)

    return read


def _field(record: Any, fields: tuple[str, ...], where: str) -> str:
    if isinstance(record, dict):
        for field in fields:
            if isinstance(record.get(field), str):
                return record[field]
    have = sorted(record) if isinstance(record, dict) else type(record).__name__
    raise CorpusError(f"{where}: there is no text under any of {list(fields)}; the record has {have}.")
