"""A server on this machine that answers as the Hugging Face hub does, and as a plain one."""

import contextlib
import dataclasses
import hashlib
import http.server
import json
import re
import threading
from pathlib import Path

COMMIT = "0123456789abcdef0123456789abcdef01234567"
_FILE = re.compile(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)")
_FOLDER = re.compile(r"/api/models/([^/]+/[^/]+)(?:/revision/([^/?]+))?")


@dataclasses.dataclass
class Hub:
    """What it has, and what it was asked for.

    Attributes:
        url: of the server.
        files: content by ("owner/name", path); under "" those of a plain server.
        requests: (method, path, Range header or "").
        cut_after: bytes of a body after which a connection breaks; None: never.
        no_head: whether HEAD is refused.
        refuse: status of every answer; 0: as it should be.
        tag: ETag of every file; "": the digest of each.
        hang_up: whether a connection ends, without a word, when a second request comes by it.
        lie: bytes in the place of those that the headers promise.
    """

    url: str = ""
    files: dict[tuple[str, str], bytes] = dataclasses.field(default_factory=dict)
    requests: list[tuple[str, str, str]] = dataclasses.field(default_factory=list)
    cut_after: int | None = None
    no_head: bool = False
    refuse: int = 0
    tag: str = ""
    hang_up: bool = False
    lie: bytes = b""

    def add(self, repository: str, path: str, file: Path) -> None:
        self.files[repository, path] = file.read_bytes()

    @property
    def gets(self) -> list[tuple[str, str]]:
        """(file's name, Range) of the bodies that were asked for."""
        return [
            (path.rpartition("/")[2], r) for method, path, r in self.requests if method == "GET"
        ]


@contextlib.contextmanager
def running():
    """A hub without files; it ends with the block."""
    hub = Hub()

    class Handler(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        answered = False

        def do_HEAD(self):
            self.answer(body=False)

        def do_GET(self):
            self.answer(body=True)

        def log_message(self, *_):
            pass

        def answer(self, *, body):
            if hub.hang_up and self.answered:
                self.close_connection = True
                return None
            self.answered = True
            asked = self.headers.get("Range", "")
            hub.requests.append((self.command, self.path, asked))
            if hub.no_head and not body:
                return self.send(405, b"", {}, body)
            if hub.refuse:
                return self.send(hub.refuse, b"", {}, body)
            if (found := _FOLDER.fullmatch(self.path)) and any(found[1] == r for r, _ in hub.files):
                names = [{"rfilename": path} for r, path in hub.files if r == found[1]]
                about = {"id": found[1], "sha": COMMIT, "siblings": names}
                kind = {"Content-Type": "application/json"}
                return self.send(200, json.dumps(about).encode(), kind, body)
            found = _FILE.fullmatch(self.path)
            key = (found[1], found[3]) if found else ("", self.path.partition("?")[0])
            if key not in hub.files:
                known = any(key[0] == r for r, _ in hub.files)
                code = "EntryNotFound" if known else "RepoNotFound"
                return self.send(404, b"", {"X-Error-Code": code} if found else {}, body)
            content = hub.files[key]
            digest = hashlib.sha256(content).hexdigest()
            heads = {"ETag": f'"{hub.tag or digest}"', "Accept-Ranges": "bytes"}
            if found:
                heads |= {"X-Repo-Commit": COMMIT, "X-Linked-Size": str(len(content))}
            content, status = hub.lie or content, 200
            if asked:
                start = int(re.fullmatch(r"bytes=(\d+)-\d*", asked)[1])
                heads["Content-Range"] = f"bytes {start}-{len(content) - 1}/{len(content)}"
                content, status = content[start:], 206
            return self.send(status, content, heads, body)

        def send(self, status, content, heads, body):
            self.send_response(status)
            for name, value in {"Content-Length": str(len(content)), **heads}.items():
                self.send_header(name, value)
            self.end_headers()
            if body:
                self.wfile.write(content[: hub.cut_after])
                if hub.cut_after is not None and len(content) > hub.cut_after:
                    self.close_connection = True

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    hub.url = f"http://127.0.0.1:{server.server_port}"
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
