"""Slides over real HTTP, on a server of this process: by ranges, with retries, without secrets in errors."""

import os
import socket
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, ClassVar
from urllib.parse import quote

import numpy as np
import pytest

from tests.slides.make import position_pixels, write_slide
from udfs.wsi import ErrorCode, SlideError, open_slide
from udfs.wsi.store import File, read_bytes
from udfs.wsi.store.file import ATTEMPTS


class Server(BaseHTTPRequestHandler):
    """Files of a folder with byte ranges; fails as it is told."""

    folder: ClassVar[Path]
    ranges: ClassVar[bool] = True
    statuses: ClassVar[list[int]] = []
    seen: ClassVar[list[str]] = []

    def log_message(self, *_: Any) -> None:
        """Be quiet."""

    def do_GET(self) -> None:
        self._answer(with_body=True)

    def do_HEAD(self) -> None:
        self._answer(with_body=False)

    def _answer(self, *, with_body: bool) -> None:
        wanted = self.headers.get("Range") if self.ranges else None
        self.seen.append(f"{self.command} {wanted}")
        path = self.folder / self.path.partition("?")[0].lstrip("/")
        if self.statuses or not path.is_file():
            self.send_error(self.statuses.pop() if self.statuses else 404)
            return
        content = path.read_bytes()
        start, end = 0, len(content)
        if wanted:
            first, last = wanted.removeprefix("bytes=").split("-")
            start, end = int(first), min(int(last) + 1, end)
        self.send_response(206 if wanted else 200)
        self.send_header("Accept-Ranges", "bytes")
        self.send_header("Last-Modified", self.date_time_string(int(path.stat().st_mtime)))
        if wanted:
            self.send_header("Content-Range", f"bytes {start}-{end - 1}/{len(content)}")
        self.send_header("Content-Length", str(end - start))
        self.end_headers()
        if with_body:
            self.wfile.write(content[start:end])


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    Server.folder, Server.statuses, Server.seen = tmp_path, [], []
    with ThreadingHTTPServer(("127.0.0.1", 0), Server) as listening:
        thread = threading.Thread(target=listening.serve_forever, args=(0.02,), daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{listening.server_port}"
        listening.shutdown()
        thread.join()


def test_a_slide_is_read_over_http_by_ranges(server: str, tmp_path: Path) -> None:
    image = position_pixels(1024, 1024)
    write_slide(tmp_path / "a.tif", image, compression="none", tile_px=128)
    with open_slide(f"{server}/a.tif?sig=abc") as slide:
        [(_, tile)] = slide.read_tiles([(300, 500)], 200)
    np.testing.assert_array_equal(tile, image[500:700, 300:500])
    got = [range_.removeprefix("GET bytes=").split("-") for range_ in Server.seen if range_.startswith("GET bytes")]
    assert sum(int(last) + 1 - int(first) for first, last in got) < 1_500_000  # of 3.1 MB


@pytest.mark.parametrize("status", [500, 503, 429])
def test_a_busy_server_is_asked_again(
    server: str, tmp_path: Path, status: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("udfs.wsi.store.file.FIRST_WAIT_S", 0.0)
    (tmp_path / "a.svs").write_bytes(bytes(1000))
    file = File(f"{server}/a.svs")
    Server.statuses = [status] * (ATTEMPTS - 1)
    assert file.ranges([10], [20]) == [bytes(20)]


@pytest.mark.parametrize(
    ("status", "code"), [(403, ErrorCode.ACCESS_DENIED), (401, ErrorCode.ACCESS_DENIED), (404, ErrorCode.FILE_MISSING)]
)
def test_a_server_that_refuses_is_told_without_the_signature(
    server: str, tmp_path: Path, status: int, code: ErrorCode
) -> None:
    (tmp_path / "a.svs").write_bytes(bytes(1000))
    uri = f"{server}/a.svs?sv=1&sig={quote('SECRET/SECRET==SECRET', safe='')}"
    file = File(uri)
    Server.statuses = [status]
    with pytest.raises(SlideError) as caught:
        file.ranges([10], [20])
    assert caught.value.code is code
    assert "SECRET" not in str(caught.value)


@pytest.mark.parametrize(
    ("status", "code", "asked"),
    [
        (404, ErrorCode.FILE_MISSING, 2),
        (410, ErrorCode.FILE_MISSING, 2),
        (403, ErrorCode.ACCESS_DENIED, 2),
        (503, ErrorCode.READ_FAILED, 2 * ATTEMPTS),
    ],
)
def test_only_a_server_that_says_so_has_no_such_file(
    server: str, tmp_path: Path, status: int, code: ErrorCode, asked: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of all of them fsspec says FileNotFoundError, after a HEAD and a GET."""
    monkeypatch.setattr("udfs.wsi.store.file.FIRST_WAIT_S", 0.0)
    (tmp_path / "a.svs").write_bytes(bytes(1000))
    Server.statuses = [status] * (2 * ATTEMPTS)
    with pytest.raises(SlideError) as caught:
        File(f"{server}/a.svs")
    assert (caught.value.code, len(Server.seen)) == (code, asked)


def test_a_refused_connection_is_no_missing_file(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("udfs.wsi.store.file.FIRST_WAIT_S", 0.0)
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))  # bound, and nobody listens
        uri = f"http://127.0.0.1:{unused.getsockname()[1]}/a.svs"
        with pytest.raises(SlideError, match="--retry-failed") as caught:
            File(uri)
        with pytest.raises(OSError, match="connect") as whole:
            read_bytes(uri)
    assert caught.value.code is ErrorCode.READ_FAILED
    assert not isinstance(whole.value, FileNotFoundError)


def test_a_server_that_ignores_ranges_is_refused(server: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_slide(tmp_path / "a.tif", position_pixels(1024, 1024), compression="none")
    monkeypatch.setattr(Server, "ranges", False)
    with pytest.raises(SlideError, match="ignores byte ranges") as caught:
        open_slide(f"{server}/a.tif")
    assert caught.value.code is ErrorCode.READ_FAILED


def test_a_file_replaced_on_a_server_has_another_version(server: str, tmp_path: Path) -> None:
    path = tmp_path / "a.svs"
    path.write_bytes(b"12345")
    before = File(f"{server}/a.svs").info
    os.utime(path, (10**9, 10**9))
    assert File(f"{server}/a.svs").info.version != before.version


def test_a_network_that_fails_while_the_header_is_read_is_not_the_slides_fault(
    server: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A user told to upload a good slide again would do so in vain."""
    monkeypatch.setattr("udfs.wsi.store.file.FIRST_WAIT_S", 0.0)
    write_slide(tmp_path / "a.tif", position_pixels(64, 64), compression="none", tile_px=64)
    file = File(f"{server}/a.tif")
    assert file.info.size_bytes > 0
    answer = Server._answer

    def fails_in_ranges(handler: Server, *, with_body: bool) -> None:
        Server.statuses = [503] if handler.headers.get("Range") else []
        answer(handler, with_body=with_body)

    monkeypatch.setattr(Server, "_answer", fails_in_ranges)
    with pytest.raises(SlideError) as caught:
        open_slide(f"{server}/a.tif")
    assert caught.value.code is ErrorCode.READ_FAILED
