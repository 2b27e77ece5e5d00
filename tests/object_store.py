"""A store of objects on this machine that speaks as much of Google Cloud Storage's JSON API as a run needs.

Both clients of a run, gcsfs and TensorStore, talk to it over HTTP as they would to the real one. As there, a write is there
whole or not at all, nothing is renamed or appended to, and a folder is a beginning of names.
"""

import base64
import contextlib
import json
import re
import sys
import threading
import urllib.parse
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import google_crc32c


class ObjectStore:
    """Serves buckets, which need not be made, while it is entered.

    Attributes:
      objects: content by 'bucket/name'.
      forbidden: HTTP methods that are refused as if there were no access.
      environment: variables under which a process takes this for Google's store.
    """

    def __init__(self):
        self.objects: dict[str, bytes] = {}
        self.forbidden: tuple[str, ...] = ()
        self.generations: dict[str, int] = {}
        self.uploads: dict[str, str] = {}
        self.lock = threading.RLock()
        self._server = _Server(("127.0.0.1", 0), type("Handler", (_Handler,), {"store": self}))
        url = f"http://127.0.0.1:{self._server.server_port}"
        self.environment = {
            "STORAGE_EMULATOR_HOST": url,
            "TENSORSTORE_GCS_HTTP_URL": url,
            "GOOGLE_AUTH_TOKEN_FOR_TESTING": "none",  # Otherwise TensorStore looks for the machine's account.
            "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false",  # That would ask Google over gRPC what kind a bucket is.
        }

    def __enter__(self) -> "ObjectStore":
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_) -> None:
        self._server.shutdown()
        self._server.server_close()

    def names(self, prefix: str) -> Iterator[str]:
        """Names of the objects that begin so, sorted."""
        with self.lock:
            return iter(sorted(name for name in self.objects if name.startswith(prefix)))

    def write(self, path: str, content: bytes) -> None:
        """Writes an object; `path` is 'bucket/name'."""
        with self.lock:
            self.objects[path] = content
            self.generations[path] = self.generations.get(path, 0) + 1

    def described(self, path: str) -> dict:
        """An object's metadata, as the API has them."""
        with self.lock:
            content, generation = self.objects[path], self.generations[path]
        bucket, name = path.split("/", 1)
        crc = base64.b64encode(google_crc32c.Checksum(content).digest()).decode()
        time = "2026-01-01T00:00:00.000Z"
        return {
            "kind": "storage#object", "bucket": bucket, "name": name, "size": str(len(content)), "crc32c": crc,
            "generation": str(generation), "metageneration": "1", "updated": time, "timeCreated": time,
        }  # fmt: skip


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, *_) -> None:
        """A client that has gone away, killed perhaps, is no error."""
        if not isinstance(sys.exception(), ConnectionError):
            super().handle_error(*_)


Answer = tuple[int, dict | bytes, dict[str, str]]


class _Handler(BaseHTTPRequestHandler):
    """One request."""

    store: ObjectStore
    protocol_version = "HTTP/1.1"
    wbufsize = -1  # An answer goes out as one packet, and not as two of which the second waits for the first.
    disable_nagle_algorithm = True

    def log_message(self, *_) -> None:
        pass

    def _handle(self) -> None:
        url = urllib.parse.urlsplit(self.path)
        query = {name: values[-1] for name, values in urllib.parse.parse_qs(url.query).items()}
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        with self.store.lock:
            status, content, headers = self._answer(url.path, query, body)
        content = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in ({"Content-Type": "application/json"} | headers).items():
            self.send_header(name, value)
        if status not in (204, 304):
            self.send_header("Content-Length", str(len(content)))
        # gcsfs asks in two ways at once and hangs up on the slower answer.
        with contextlib.suppress(ConnectionError):
            self.end_headers()
            self.wfile.write(content)
            self.wfile.flush()

    do_GET = do_POST = do_PUT = do_DELETE = _handle

    def _answer(self, path: str, query: dict[str, str], body: bytes) -> Answer:
        if self.command in self.store.forbidden:
            return _error(403, "no access")
        match = re.fullmatch(r"(/upload|/download)?/storage/v1/b/([^/]+)(?:/o(?:/(.+?))?)?(?:/moveTo/o/(.+))?", path)
        if match is None:
            return _error(404, f"No such service: {path}")
        kind, bucket, name, target = match.groups()
        if kind == "/upload":
            return self._upload(bucket, query, body)
        if "/o" not in path:
            return 200, {"kind": "storage#bucket", "name": bucket, "id": bucket}, {}
        if name is None:
            return self._list(bucket, query)
        found = f"{bucket}/{urllib.parse.unquote(name)}"
        if found not in self.store.objects:
            return _error(404, f"No such object: {found}")
        if target is not None:
            moved = f"{bucket}/{urllib.parse.unquote(target)}"
            self.store.write(moved, self.store.objects.pop(found))
            return 200, self.store.described(moved), {}
        if self.command == "DELETE":
            del self.store.objects[found]
            return 204, b"", {}
        if kind == "/download" or query.get("alt") == "media":
            return self._content(found, query)
        return 200, self.store.described(found), {}

    def _content(self, path: str, query: dict[str, str]) -> Answer:
        content, described = self.store.objects[path], self.store.described(path)
        if query.get("ifGenerationNotMatch") == described["generation"]:
            return 304, b"", {}
        headers = {
            "x-goog-generation": described["generation"],
            "x-goog-hash": f"crc32c={described['crc32c']}",
            "Content-Type": "application/octet-stream",
        }
        asked = re.fullmatch(r"bytes=(\d*)-(\d*)", self.headers.get("Range", ""))
        if asked is None:
            return 200, content, headers
        size = len(content)
        start = int(asked[1]) if asked[1] else max(0, size - int(asked[2]))
        stop = min(size, int(asked[2]) + 1) if asked[1] and asked[2] else size
        if start >= size:
            return 416, b"", {"Content-Range": f"bytes */{size}"}
        return 206, content[start:stop], headers | {"Content-Range": f"bytes {start}-{stop - 1}/{size}"}

    def _list(self, bucket: str, query: dict[str, str]) -> Answer:
        prefix, delimiter = query.get("prefix", ""), query.get("delimiter")
        items, prefixes = [], set()
        for path in self.store.names(f"{bucket}/{prefix}"):
            rest = path.removeprefix(f"{bucket}/{prefix}")
            if delimiter and delimiter in rest:
                prefixes.add(prefix + rest.split(delimiter)[0] + delimiter)
            else:
                items.append(self.store.described(path))
        return 200, {"kind": "storage#objects", "items": items, "prefixes": sorted(prefixes)}, {}

    def _upload(self, bucket: str, query: dict[str, str], body: bytes) -> Answer:
        kind = query["uploadType"]
        if kind == "resumable" and "upload_id" not in query:
            upload = str(len(self.store.uploads))
            self.store.uploads[upload] = query["name"]
            place = f"{self.store.environment['STORAGE_EMULATOR_HOST']}/upload/storage/v1/b/{bucket}/o"
            return 200, {}, {"Location": f"{place}?uploadType=resumable&upload_id={upload}"}
        if kind == "resumable":
            if self.headers.get("Content-Range", "").endswith("/*"):
                return _error(501, "uploads in several parts are not understood here")
            name = self.store.uploads[query["upload_id"]]
        else:
            name = query["name"]
        path = f"{bucket}/{name}"
        found = self.store.generations[path] if path in self.store.objects else 0
        if query.get("ifGenerationMatch") not in (None, str(found)):
            return _error(412, "conditionNotMet")
        self.store.write(path, body)
        return 200, self.store.described(path), {}


def _error(status: int, message: str) -> Answer:
    return status, {"error": {"code": status, "message": message}}, {}
