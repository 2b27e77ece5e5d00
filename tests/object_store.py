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
        if self.command in self.store.forbidden:
            return self._answer(403, {"error": {"code": 403, "message": "no access"}})
        match = re.fullmatch(
            r"(/upload|/download)?/storage/v1/b/([^/]+)(?:/o(?:/(.+?))?)?(?:/moveTo/o/(.+))?", url.path
        )
        if match is None:
            return self._answer(404, {})
        kind, bucket, name, target = match.groups()
        if target:
            return self._move(*(f"{bucket}/{urllib.parse.unquote(part)}" for part in (name, target)))
        if kind == "/upload":
            return self._upload(bucket, query, body)
        if "/o" not in url.path:
            return self._answer(200, {"kind": "storage#bucket", "name": bucket, "id": bucket})
        if name is None:
            return self._list(bucket, query)
        return self._object(f"{bucket}/{urllib.parse.unquote(name)}", query, kind == "/download")

    do_GET = do_POST = do_PUT = do_DELETE = _handle

    def _object(self, path: str, query: dict[str, str], download: bool) -> None:
        with self.store.lock:
            content = self.store.objects.get(path)
            if content is None:
                return self._answer(404, {"error": {"code": 404, "message": f"No such object: {path}"}})
            if self.command == "DELETE":
                del self.store.objects[path]
                return self._answer(204, b"")
        generation = str(self.store.generations[path])
        if query.get("ifGenerationNotMatch") == generation:
            return self._answer(304, b"")
        if not download and query.get("alt") != "media":
            return self._answer(200, self.store.described(path))
        headers = {"x-goog-generation": generation, "Content-Type": "application/octet-stream"}
        headers["x-goog-hash"] = f"crc32c={self.store.described(path)['crc32c']}"
        asked = re.fullmatch(r"bytes=(\d*)-(\d*)", self.headers.get("Range", ""))
        if asked is None:
            return self._answer(200, content, headers)
        size = len(content)
        start = int(asked[1]) if asked[1] else max(0, size - int(asked[2]))
        stop = min(size, int(asked[2]) + 1) if asked[1] and asked[2] else size
        if start >= size:
            return self._answer(416, b"", {"Content-Range": f"bytes */{size}"})
        headers["Content-Range"] = f"bytes {start}-{stop - 1}/{size}"
        self._answer(206, content[start:stop], headers)

    def _list(self, bucket: str, query: dict[str, str]) -> None:
        prefix, delimiter = query.get("prefix", ""), query.get("delimiter")
        items, prefixes = [], []
        for path in self.store.names(f"{bucket}/{prefix}"):
            name = path.removeprefix(f"{bucket}/")
            if name < query.get("startOffset", "") or (query.get("endOffset") and name >= query["endOffset"]):
                continue
            rest = name.removeprefix(prefix)
            if delimiter and delimiter in rest:
                prefixes.append(prefix + rest.split(delimiter)[0] + delimiter)
            else:
                items.append(self.store.described(path))
        self._answer(200, {"kind": "storage#objects", "items": items, "prefixes": sorted(set(prefixes))})

    def _move(self, source: str, target: str) -> None:
        with self.store.lock:
            if source not in self.store.objects:
                return self._answer(404, {"error": {"code": 404, "message": f"No such object: {source}"}})
            self.store.write(target, self.store.objects.pop(source))
        self._answer(200, self.store.described(target))

    def _upload(self, bucket: str, query: dict[str, str], body: bytes) -> None:
        kind = query.get("uploadType")
        if kind == "resumable" and "upload_id" not in query:
            name = query.get("name") or json.loads(body)["name"]
            upload = str(len(self.store.uploads))
            self.store.uploads[upload] = name
            place = f"{self.store.environment['STORAGE_EMULATOR_HOST']}/upload/storage/v1/b/{bucket}/o"
            return self._answer(200, {}, {"Location": f"{place}?uploadType=resumable&upload_id={upload}"})
        if kind == "resumable":
            name = self.store.uploads[query["upload_id"]]
        elif kind == "multipart":
            boundary = re.search('boundary="?([^";]+)', self.headers["Content-Type"])[1].encode()
            described, content = body.split(b"--" + boundary)[1:3]
            name = json.loads(re.split(rb"\r?\n\r?\n", described, maxsplit=1)[1])["name"]
            body = re.sub(rb"\r?\n\Z", b"", re.split(rb"\r?\n\r?\n", content, maxsplit=1)[1])
        else:
            name = query["name"]
        path = f"{bucket}/{name}"
        with self.store.lock:
            found = self.store.generations[path] if path in self.store.objects else 0
            if query.get("ifGenerationMatch") not in (None, str(found)):
                return self._answer(412, {"error": {"code": 412, "message": "conditionNotMet"}})
            self.store.write(path, body)
        self._answer(200, self.store.described(path))

    def _answer(self, status: int, content: dict | bytes, headers: dict[str, str] | None = None) -> None:
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in ({"Content-Type": "application/json"} | (headers or {})).items():
            self.send_header(name, value)
        if status not in (204, 304):
            self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if status not in (204, 304):
            self.wfile.write(body)
        # gcsfs asks in two ways at once and hangs up on the slower answer.
        with contextlib.suppress(ConnectionError):
            self.wfile.flush()
