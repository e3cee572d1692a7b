"""A small Hugging Face Hub on this machine: one model, its revisions, and the ways to refuse."""

import contextlib
import hashlib
import http.server
import json
import re
import threading
from collections.abc import Iterator, Mapping

COMMIT = "a" * 40


class Hub:
    """What the server has and what it saw.

    Attributes:
      files: name -> bytes of org/model.
      refuse: status and X-Error-Code for everything, None to serve.
      break_after: bytes after which a download breaks off; None: never.
      then_down: whether nothing is served from then on.
      ranges: the Range headers of all downloads, by file.
      tokens: the Authorization headers it saw.
    """

    def __init__(self, files: Mapping[str, bytes]):
        self.files = dict(files)
        self.refuse: tuple[int, str | None] | None = None
        self.break_after: int | None = None
        self.then_down = False
        self.ranges: dict[str, list[str | None]] = {}
        self.tokens: set[str | None] = set()
        self.url = ""


@contextlib.contextmanager
def serving(files: Mapping[str, bytes]) -> Iterator[Hub]:
    """Serves a Hub with one model, org/model, of revisions main and v1 (both COMMIT)."""
    hub = Hub(files)

    class Handler(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_HEAD(self):
            self.answer(body=False)

        def do_GET(self):
            self.answer(body=True)

        def answer(self, body: bool) -> None:
            hub.tokens.add(self.headers.get("Authorization"))
            path = self.path.split("?")[0]
            if hub.refuse:
                return self.error(*hub.refuse)
            api = re.fullmatch(r"/api/models/org/model/(revision|tree)/([^/]+)(/.*)?", path)
            file = re.fullmatch(r"/org/model/resolve/([^/]+)/(.+)", path)
            if api is None and file is None:
                return self.error(404, "RepoNotFound")
            if (api[2] if api else file[1]) not in ("main", "v1", COMMIT):
                return self.error(404, "RevisionNotFound")
            if api:
                return self.send(json.dumps(self.listing(api[1])).encode(), {}, body)
            if file[2] not in hub.files:
                return self.error(404, "EntryNotFound")
            self.file(file[2], body)

        def listing(self, what: str) -> object:
            if what == "tree":
                return [
                    {"type": "file", "path": n, "size": len(b), "oid": etag(b)}
                    for n, b in hub.files.items()
                ]
            siblings = [{"rfilename": n, "size": len(b)} for n, b in hub.files.items()]
            return {"id": "org/model", "modelId": "org/model", "sha": COMMIT, "siblings": siblings}

        def file(self, name: str, body: bool) -> None:
            data, asked = hub.files[name], self.headers.get("Range")
            if body:
                hub.ranges.setdefault(name, []).append(asked)
            first = int(asked.removeprefix("bytes=").split("-")[0]) if asked else 0
            headers = {
                "ETag": f'"{etag(data)}"',
                "X-Repo-Commit": COMMIT,
                "Accept-Ranges": "bytes",
            }
            if asked:
                headers["Content-Range"] = f"bytes {first}-{len(data) - 1}/{len(data)}"
            self.send(data[first:], headers, body, 206 if asked else 200)

        def send(self, data: bytes, headers: dict[str, str], body: bool, status: int = 200) -> None:
            self.send_response(status)
            for key, value in headers.items():
                self.send_header(key, value)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            breaks = "ETag" in headers and hub.break_after is not None
            if body and breaks and len(data) > hub.break_after:
                self.wfile.write(data[: hub.break_after])
                self.wfile.flush()
                hub.refuse = (503, None) if hub.then_down else None
                self.close_connection = True
                self.connection.close()
            elif body:
                self.wfile.write(data)

        def error(self, status: int, code: str | None) -> None:
            self.send_response(status)
            if code:
                self.send_header("X-Error-Code", code)
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, *args: object) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    hub.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def etag(data: bytes) -> str:
    """The digest a file is known by."""
    return hashlib.sha256(data).hexdigest()
