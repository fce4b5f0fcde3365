"""Object stores on loopback, for the real clients: the parts of S3 and of GCS's JSON API that we need.

The stores return objects and ranges of them, list keys, and write and delete under conditions.
"""

import contextlib
import http.server
import json
import threading
import urllib.parse
from collections.abc import Iterator


class Store(http.server.ThreadingHTTPServer):
    """One bucket of either kind.

    Attributes:
      objects: key to content; `put` gives it a new generation.
      requests: the key of each object whose content was sent, with the requested range.
      writes: 'PUT KEY', 'POST KEY' or 'DELETE KEY' of every requested write, with its condition.
      denied: whether every request is answered with 403.
      lose_answers: how many writes are carried out but answered with 503, so that the client retries them.
      environment: the variables that point the clients to this store.
    """

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.objects: dict[str, bytes] = {}
        self.generations: dict[str, int] = {}
        self.requests: list[str] = []
        self.writes: list[str] = []
        self.writing = threading.Lock()  # held while a condition is checked and the write is done
        self.denied = False
        self.lose_answers = 0

    @property
    def environment(self) -> dict[str, str]:
        keys = {"AWS_ACCESS_KEY_ID": "x", "AWS_SECRET_ACCESS_KEY": "y", "AWS_EC2_METADATA_DISABLED": "true"}
        return {**keys, "AWS_ENDPOINT_URL": self.url, "TENSORSTORE_GCS_HTTP_URL": self.url}

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def put(self, key: str, content: bytes) -> None:
        self.objects[key] = content
        self.generations[key] = self.generations.get(key, 0) + 1


class Handler(http.server.BaseHTTPRequestHandler):
    server: Store
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # otherwise every answer takes 40 ms

    def log_message(self, *args: object) -> None:
        pass

    def do_GET(self) -> None:
        url = urllib.parse.urlsplit(self.path)
        query = dict(urllib.parse.parse_qsl(url.query))
        path = url.path
        if self.server.denied:
            self.answer(403, b"<Error><Code>AccessDenied</Code></Error>")
        elif path.startswith("/storage/v1/b/"):  # GCS
            _, _, rest = path.removeprefix("/storage/v1/b/").partition("/o")
            if rest:
                self.content(urllib.parse.unquote(rest[1:]), query.get("ifGenerationNotMatch"))
            else:
                items = [{"name": key} for key in self.keys(query)]
                self.answer(200, json.dumps({"items": items}).encode(), {"Content-Type": "application/json"})
        else:  # S3, /BUCKET/KEY
            key = urllib.parse.unquote(path.lstrip("/").partition("/")[2])
            if key:
                self.content(key, (self.headers.get("If-None-Match") or "").strip('"'))
            else:
                entries = "".join(
                    f"<Contents><Key>{k}</Key><Size>{len(self.server.objects[k])}</Size></Contents>"
                    for k in self.keys(query)
                )
                self.answer(
                    200, f"<ListBucketResult>{entries}<IsTruncated>false</IsTruncated></ListBucketResult>".encode()
                )

    do_HEAD = do_GET

    def do_POST(self) -> None:
        """GCS: /upload/storage/v1/b/BUCKET/o?uploadType=media&name=KEY"""
        self.write(dict(urllib.parse.parse_qsl(urllib.parse.urlsplit(self.path).query))["name"])

    def do_PUT(self) -> None:
        """S3: /BUCKET/KEY"""
        self.write(urllib.parse.unquote(urllib.parse.urlsplit(self.path).path.lstrip("/").partition("/")[2]))

    def do_DELETE(self) -> None:
        path = urllib.parse.urlsplit(self.path).path
        gcs = path.startswith("/storage/v1/b/")
        self.write(urllib.parse.unquote(path.partition("/o/")[2] if gcs else path.lstrip("/").partition("/")[2]))

    def write(self, key: str) -> None:
        """Writes or deletes under a condition, in the query (GCS) or the headers (S3); '0' means: if it is absent."""
        content = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        query = dict(urllib.parse.parse_qsl(urllib.parse.urlsplit(self.path).query))
        condition = query.get("ifGenerationMatch") or (self.headers.get("If-Match") or "").strip('"')
        if self.headers.get("If-None-Match") == "*":
            condition = "0"
        self.server.writes.append(f"{self.command} {key} {condition}".strip())
        if self.server.denied:
            return self.answer(403, b"<Error><Code>AccessDenied</Code></Error>")
        with self.server.writing:
            there = key in self.server.objects
            if condition and condition != (str(self.server.generations[key]) if there else "0"):
                return self.answer(412, b"")
            if self.command == "DELETE":
                self.server.objects.pop(key, None)
            else:
                self.server.put(key, content)
            generation = str(self.server.generations.get(key, 0))
            if self.server.lose_answers:
                self.server.lose_answers -= 1
                return self.answer(503, b"")
        if self.command == "DELETE":
            return self.answer(204, b"")
        self.answer(200, json.dumps({"name": key, "generation": generation}).encode(), {"ETag": f'"{generation}"'})

    def keys(self, query: dict[str, str]) -> list[str]:
        first, end = query.get("startOffset", ""), query.get("endOffset", "\U0010ffff")
        return sorted(k for k in self.server.objects if k.startswith(query.get("prefix", "")) and first <= k < end)

    def content(self, key: str, known: str | None) -> None:
        if key not in self.server.objects:
            return self.answer(404, b"")
        raw, generation = self.server.objects[key], str(self.server.generations[key])
        headers = {"x-goog-generation": generation, "ETag": f'"{generation}"'}
        if (self.headers.get("If-Match") or generation).strip('"') != generation:
            return self.answer(412, b"", headers)
        if known == generation:
            return self.answer(304, b"", headers)
        asked = self.headers.get("Range")
        self.server.requests.append(f"{key} {asked or ''}".strip())
        if asked:
            first, _, last = asked.removeprefix("bytes=").partition("-")
            start, stop = int(first), min(int(last) + 1 if last else len(raw), len(raw))
            if start >= len(raw):
                return self.answer(416, b"", headers | {"Content-Range": f"bytes */{len(raw)}"})
            headers["Content-Range"] = f"bytes {start}-{stop - 1}/{len(raw)}"
            return self.answer(206, raw[start:stop], headers)
        return self.answer(200, raw, headers)

    def answer(self, code: int, body: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(code)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)


@contextlib.contextmanager
def running() -> Iterator[Store]:
    store = Store()
    thread = threading.Thread(target=store.serve_forever, args=(0.05,))
    thread.start()
    try:
        yield store
    finally:
        store.shutdown()
        store.server_close()
        thread.join()
