"""A server that answers as the Hugging Face hub does: files of repositories by revision, gated and missing ones, with a count."""

import hashlib
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

COMMIT = "0123456789abcdef0123456789abcdef01234567"
TOKEN = "hf_AbCdEfGhIjKlMnOpQrStUvWxYz0123456789"


@dataclass
class Hub:
    """Its repositories, and what was asked of it."""

    url: str = ""
    files: dict[str, dict[str, bytes]] = field(default_factory=dict)  # by repository and name
    gated: set[str] = field(default_factory=set)  # repositories that want TOKEN
    status: int | None = None  # of every answer
    turns: dict[str, list[int | None]] = field(default_factory=dict)  # statuses of the next answers, by method and name
    left_out: set[str] = field(default_factory=set)  # headers
    signature: str = ""  # of the URLs of a second server, to which this one sends then; its first answer breaks off
    requests: Counter[str] = field(default_factory=Counter)  # by method and name of the file

    def answer(self, method: str, path: str, token: str) -> tuple[int, dict[str, str], bytes]:
        """Status, headers and content."""
        owner, name, _, revision, file = path.partition("?")[0].strip("/").split("/", 4)
        repository = f"{owner}/{name}"
        turns = self.turns.get(f"{method} {file}")
        if turns and (status := turns.pop(0)):
            return status, {}, b""
        if self.status:
            return self.status, {}, b""
        if repository not in self.files:
            return 401, {"X-Error-Code": "RepoNotFound"}, b""
        if repository in self.gated and token != f"Bearer {TOKEN}":
            return 403 if token else 401, {"X-Error-Code": "GatedRepo"}, b""
        if revision not in ("main", COMMIT):
            return 404, {"X-Error-Code": "RevisionNotFound"}, b""
        content = self.files[repository].get(file)
        if content is None:
            return 404, {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": COMMIT}, b""
        etag = f'"{hashlib.sha256(content).hexdigest()}"'
        headers = {"X-Repo-Commit": COMMIT, "ETag": etag}
        if self.signature and "?" not in path:
            signed = f"{self.url.replace('127.0.0.1', 'localhost')}{path}?X-Amz-Signature={self.signature}"
            headers |= {"Location": signed, "X-Linked-Etag": etag, "X-Linked-Size": str(len(content))}
            return 302, headers, b""
        return 200, {key: value for key, value in headers.items() if key not in self.left_out}, content


@contextmanager
def serve_hub(**files: dict[str, bytes]) -> Iterator[Hub]:
    """Serve repositories, named as OWNER__NAME."""
    hub = Hub(files={name.replace("__", "/"): content for name, content in files.items()})

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *_: Any) -> None:
            """Be quiet."""

        def do_HEAD(self) -> None:
            self._answer()

        def do_GET(self) -> None:
            self._answer()

        def _answer(self) -> None:
            request = f"{self.command} {self.path.partition('?')[0].rpartition('/')[2]}"
            hub.requests[request] += 1
            status, headers, content = hub.answer(self.command, self.path, self.headers.get("Authorization", ""))
            first = int(self.headers.get("Range", "bytes=0-").removeprefix("bytes=").partition("-")[0])
            if first:
                headers["Content-Range"] = f"bytes {first}-{len(content) - 1}/{len(content)}"
                status, content = 206, content[first:]
            breaks_off = "?" in self.path and hub.requests[request] == 1
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(content[: len(content) // 2] if breaks_off else content)

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        hub.url = f"http://127.0.0.1:{server.server_address[1]}"
        yield hub
        server.shutdown()
