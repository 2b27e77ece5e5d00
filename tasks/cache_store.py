"""Token caches in object stores (`gs://`, `s3://`, whatever `fsspec` reaches).

    URL/TASK/FINGERPRINT/…, URL/NAME/FINGERPRINT.json      the files of `tasks.cache_files`, under the same names

A store renames no folders and maps no files. So a cache is made in a folder of this machine and then copied (`publish`), each
manifest after what it lists and the mixture file last: what can be found is whole. A reader copies manifests and the places and
lengths of documents, 16 bytes a document, to this machine once (`mirror`), and reads of the tokens the ranges that it needs, when
it needs them. In the copy a small file, `tokens.url`, says where they are.
"""

import contextlib
import hashlib
import json
import logging
import os
import pathlib
import shutil
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from tasks.cache_files import MANIFEST, TOKENS, TOKENS_URL, CacheError, read_json

logger = logging.getLogger(__name__)

# Of a shard that is read whole, to compare its checksum.
_CHUNK = 64 * 2**20


def is_url(location: Any) -> bool:
    """Whether a cache's place is in a store, and no folder."""
    return "://" in os.fspath(location)


class Store:
    """What lies under a URL, by paths relative to it.

    Its methods raise CacheError, naming the URL, where the store cannot be reached; a missing file is FileNotFoundError.
    """

    def __init__(self, url: str):
        self._url = url
        with self._explained():
            import fsspec

            try:
                self._files, self._root = fsspec.url_to_fs(url)
            except ValueError as error:
                raise CacheError(f"{url} is of no store that fsspec knows: {error}.") from error

    def listed(self, folder: str, *, deep: bool) -> dict[str, int]:
        """Sizes of the files in a folder, and of all below it if `deep`; empty where there is no such folder."""
        with self._explained():
            try:
                # What other machines have written since the last look must be seen.
                self._files.invalidate_cache()
                top = self._path(folder)
                found = self._files.find(top, maxdepth=None if deep else 1, detail=True)
            except FileNotFoundError:
                return {}
        root = self._root.strip("/")
        return {
            path.strip("/").removeprefix(root).strip("/"): int(entry["size"])
            for path, entry in found.items()
            if entry["type"] == "file"
        }

    def read(self, name: str = "", start: int | None = None, stop: int | None = None) -> bytes:
        """Bytes start…stop of a file, all of it without them."""
        with self._explained():
            return self._files.cat_file(self._path(name), start, stop)

    def modified(self, name: str) -> float:
        """When a file was written, in seconds since 1970; 0 in stores that do not say."""
        with self._explained():
            try:
                return self._files.modified(self._path(name)).timestamp()
            except NotImplementedError:
                return 0.0

    def put(self, files: Sequence[tuple[pathlib.Path, str]]) -> None:
        """Copies files of this machine to the store, several at a time where it can."""
        with self._explained():
            self._files.put([str(path) for path, _ in files], [self._path(name) for _, name in files])

    def _path(self, name: str) -> str:
        return f"{self._root.rstrip('/')}/{name}" if name else self._root

    @contextlib.contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            yield
        except (FileNotFoundError, CacheError):
            raise
        except ImportError as error:
            raise CacheError(
                f"{self._url}: {error}. pip install 't5x_ssm[gcs]' brings what gs:// needs; other stores have packages of "
                "their own, which fsspec names."
            ) from error
        # Every store has errors of its own.
        except Exception as error:
            raise CacheError(
                f"{self._url} cannot be reached ({type(error).__name__}: {error}). For gs:// log in with gcloud auth "
                "application-default login, or give this machine's service account access to the bucket."
            ) from error


def publish(path: pathlib.Path, url: str) -> None:
    """Copies the cache of a mixture file `path` of this machine to a store. Data that is there already is left as it is.

    Raises:
      CacheError: the store cannot be written.
    """
    cache_dir, store = path.parent.parent, Store(url)
    for component in read_json(path)["components"]:
        directory = component["directory"]
        there = store.listed(directory, deep=True)
        # Data first, then the manifests of shards, then those of splits.
        steps: dict[tuple[bool, int], list[tuple[pathlib.Path, str]]] = {}
        for file in sorted(file for file in (cache_dir / directory).rglob("*") if file.is_file()):
            name, is_manifest = file.relative_to(cache_dir).as_posix(), file.name == MANIFEST
            if is_manifest or there.get(name) != file.stat().st_size:
                steps.setdefault((is_manifest, -len(file.parts)), []).append((file, name))
        for _, files in sorted(steps.items()):
            logger.info("Copying %d files of %s to %s", len(files), directory, url)
            store.put(files)
    store.put([(path, path.relative_to(cache_dir).as_posix())])


def mirror(name: str, url: str, folder: pathlib.Path) -> pathlib.Path:
    """Copies what is small of the caches of a mixture in a store to this machine, as far as it is not there.

    Processes of one machine may do so at the same time.

    Args:
      name: the mixture's or task's name.
      url: the store.
      folder: where copies lie, each store's in a folder of its own.

    Returns:
      The folder that then looks like a cache folder, but for the tokens.

    Raises:
      CacheError: the store cannot be reached.
    """
    store = Store(url)
    local = folder / hashlib.sha256(url.rstrip("/").encode()).hexdigest()[:16]
    for mixture in store.listed(name, deep=False):
        if not mixture.endswith(".json"):
            continue
        for component in json.loads(store.read(mixture))["components"]:
            _mirror_task(store, url, component["directory"], local)
        _write(local / mixture, store.read(mixture))
        # The newest is taken.
        modified = store.modified(mixture)
        os.utime(local / mixture, (modified, modified))
    return local


def _mirror_task(store: Store, url: str, directory: str, local: pathlib.Path) -> None:
    files = store.listed(directory, deep=True)
    if not files:
        shutil.rmtree(local / directory, ignore_errors=True)
    for name, size in files.items():
        path = local / name
        if path.name == TOKENS:
            pointer = {"url": f"{url.rstrip('/')}/{name}", "size": size}
            _write(path.with_name(TOKENS_URL), json.dumps(pointer).encode())
        elif path.name == MANIFEST or not path.is_file() or path.stat().st_size != size:
            _write(path, store.read(name))


def _write(path: pathlib.Path, content: bytes) -> None:
    """Writes a file that is there whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_bytes(content)
    temporary.replace(path)


class StoredTokens:
    """The tokens of a shard in a store, as an array that is only read in slices.

    Attributes:
      size: how many there are.
    """

    def __init__(self, pointer: pathlib.Path, dtype: np.dtype):
        """`pointer` is the file that says where they are."""
        there = json.loads(pointer.read_text(encoding="utf-8"))
        self._url, self._dtype = there["url"], dtype
        self._store = Store(self._url)
        self.size: int = there["size"] // dtype.itemsize

    def __getitem__(self, part: slice) -> np.ndarray:
        """Tokens of a slice with a beginning and an end; CacheError, with the URL, if they cannot be read."""
        start, stop, _ = part.indices(self.size)
        wide = self._dtype.itemsize
        content = self._read(start * wide, stop * wide) if stop > start else b""
        if len(content) != max(0, stop - start) * wide:
            raise CacheError(f"The token cache file {self._url} is shorter than its manifest says.")
        return np.frombuffer(content, self._dtype)

    def sha256(self) -> str:
        """The checksum of all of it."""
        digest, size = hashlib.sha256(), self.size * self._dtype.itemsize
        for start in range(0, size, _CHUNK):
            digest.update(self._read(start, min(start + _CHUNK, size)))
        return digest.hexdigest()

    def _read(self, start: int, stop: int) -> bytes:
        try:
            return self._store.read("", start, stop)
        except FileNotFoundError as error:
            raise CacheError(f"The token cache file {self._url} is missing.") from error


def open_tokens(folder: pathlib.Path, dtype: np.dtype) -> np.memmap | StoredTokens:
    """The tokens of a shard: its mapped file, or what its copy of a store points to."""
    pointer = folder / TOKENS_URL
    return StoredTokens(pointer, dtype) if pointer.is_file() else np.memmap(folder / TOKENS, dtype, mode="r")
