"""Bad slides and bad servers over real HTTP: the error that a disk would give, in bounded time, and nothing left behind."""

import asyncio
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, ClassVar

import fsspec.asyn
import pytest

from tests.slides.damage import BAD_SLIDES
from tests.slides.make import Pixels, position_pixels, write_slide
from udfs.wsi import ErrorCode, SlideError, open_slide

SIGNATURE = "SECRETSIGNATURESECRET"
SIDE_PX, TILE_PX = 1024, 128
CORNERS = [(x, y) for y in range(0, SIDE_PX, TILE_PX) for x in range(0, SIDE_PX, TILE_PX)]

Fault = Callable[["Server", bytes], bool]  # given what a right answer holds; whether it answered itself


class Server(BaseHTTPRequestHandler):
    """Files of a folder with byte ranges; what `fault` is set to comes first."""

    protocol_version = "HTTP/1.1"
    folder: ClassVar[Path]
    fault: ClassVar[Fault | None]
    requests: ClassVar[int]
    released: ClassVar[threading.Event]  # what hangs ends with it
    broken: ClassVar[list[BaseException]]  # of its own, beside clients that gave up

    def log_message(self, *_: Any) -> None:
        """Be quiet."""

    def do_GET(self) -> None:
        type(self).requests += 1
        path = self.folder / self.path.partition("?")[0].lstrip("/")
        if not path.is_file():
            self.send_error(404)
            return
        content, wanted = path.read_bytes(), self.headers.get("Range")
        first, last = (int(n) for n in wanted.removeprefix("bytes=").split("-")) if wanted else (0, len(content))
        part = content[first : last + 1]
        fault = type(self).fault
        if fault and fault(self, part):
            return
        if wanted and not part:
            self.send_error(416)
            return
        self.answer(206 if wanted else 200, path, len(part), f"bytes {first}-{first + len(part) - 1}/{len(content)}")
        if self.command == "GET":
            self.wfile.write(part)

    do_HEAD = do_GET

    def answer(self, status: int, path: Path, length: int, content_range: str) -> None:
        self.send_response(status)
        self.send_header("Accept-Ranges", "bytes")
        self.send_header("ETag", f'"{path.stat().st_mtime_ns}"')
        self.send_header("Content-Length", str(length))
        if status == 206:
            self.send_header("Content-Range", content_range)
        self.end_headers()


def status(number: int) -> Fault:
    def answer(server: Server, part: bytes) -> bool:
        server.send_error(number, f"no {SIGNATURE}")
        return True

    return answer


def short_body(server: Server, part: bytes) -> bool:
    """Less than announced, then the connection ends."""
    server.answer(206, Path(__file__), len(part), f"bytes 0-{len(part) - 1}/{len(part)}")
    if server.command == "GET":
        server.wfile.write(part[: len(part) // 2])
    server.close_connection = True
    return True


def short_answer(server: Server, part: bytes) -> bool:
    """A whole answer to a smaller question, to GET only."""
    if server.command == "GET":
        half = part[: len(part) // 2]
        server.answer(206, Path(__file__), len(half), f"bytes 0-{len(half) - 1}/{len(half)}")
        server.wfile.write(half)
    return server.command == "GET"


def reset(server: Server, part: bytes) -> bool:
    server.connection.close()
    server.close_connection = True
    return True


def hang(server: Server, part: bytes) -> bool:
    server.released.wait()
    server.close_connection = True
    return True


BAD_SERVERS: dict[str, tuple[Fault, ErrorCode]] = {
    "404": (status(404), ErrorCode.FILE_MISSING),
    "410": (status(410), ErrorCode.FILE_MISSING),
    "401": (status(401), ErrorCode.ACCESS_DENIED),
    "403": (status(403), ErrorCode.ACCESS_DENIED),
    "400": (status(400), ErrorCode.READ_FAILED),
    "500s": (status(500), ErrorCode.READ_FAILED),
    "503s": (status(503), ErrorCode.READ_FAILED),
    "short bodies": (short_body, ErrorCode.READ_FAILED),
    "short answers": (short_answer, ErrorCode.READ_FAILED),
    "resets": (reset, ErrorCode.READ_FAILED),
    "hangs": (hang, ErrorCode.READ_FAILED),
}


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The URL of a folder `served`; afterwards nothing may be under way in this process."""
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("SLIDELAKE_STAGING", str(tmp_path / "staging"))
    monkeypatch.setattr("udfs.wsi.store.file.FIRST_WAIT_S", 0.0)
    monkeypatch.setattr("udfs.wsi.store.file.DEADLINE_S", 5.0)
    monkeypatch.setattr(ThreadingHTTPServer, "handle_error", note_error)
    Server.folder, Server.fault, Server.requests = tmp_path / "served", None, 0
    Server.released, Server.broken = threading.Event(), []
    Server.folder.mkdir()
    with ThreadingHTTPServer(("127.0.0.1", 0), Server) as listening:
        listening.daemon_threads = True
        thread = threading.Thread(target=listening.serve_forever, args=(0.02,), daemon=True)
        thread.start()
        try:
            yield f"http://127.0.0.1:{listening.server_port}"
            wait_until_idle()
        finally:
            Server.released.set()
            listening.shutdown()
            thread.join()
    assert not Server.broken


def note_error(*_: Any) -> None:
    error = sys.exception()
    if error and not isinstance(error, OSError):
        Server.broken.append(error)


def wait_until_idle() -> None:
    """Nothing of a closed slide goes on: no request, no wait before the next attempt, no decoding thread."""

    async def others() -> list[str]:
        mine = asyncio.current_task()
        return [repr(task) for task in asyncio.all_tasks() if task is not mine]

    loop, left = fsspec.asyn.get_loop(), ["not asked"]
    for _ in range(100):
        left = asyncio.run_coroutine_threadsafe(others(), loop).result()
        if not left:
            break
        time.sleep(0.01)
    assert not left
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("slidelake")]


def uri_of(server: str, path: Path) -> str:
    return f"{server}/{path.name}?sv=1&sig={SIGNATURE}"


def read_all(uri: str) -> None:
    with open_slide(uri, threads=2) as slide:
        slide.downsampled(16)
        corners = [(x, y) for y in range(0, slide.height_px, 448) for x in range(0, slide.width_px, 448)]
        for _ in slide.read_tiles(corners):
            pass


def error_of(call: Callable[[], Any]) -> SlideError:
    with pytest.raises(SlideError) as caught:
        call()
    assert "SECRET" not in str(caught.value)
    assert "\n" not in str(caught.value)
    return caught.value


@pytest.fixture(scope="module")
def good(pixels: Pixels, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_slide(tmp_path_factory.mktemp("good") / "good.tif", pixels[1536:2944, 800:1760], pyramid=True)


@pytest.fixture
def whole() -> Path:
    """In the served folder, too large for the two ranges that come with its header."""
    pixels = position_pixels(SIDE_PX, SIDE_PX)
    return write_slide(Server.folder / "whole.tif", pixels, compression="none", tile_px=TILE_PX)


@pytest.mark.parametrize("kind", [kind for kind in BAD_SLIDES if kind != "no_tissue"])
def test_a_bad_slide_is_told_as_it_is_from_a_disk(server: str, good: Path, kind: str) -> None:
    path = BAD_SLIDES[kind](good, Server.folder, "patient_7")
    local = error_of(lambda: read_all(str(path)))
    remote = error_of(lambda: read_all(uri_of(server, path)))
    assert remote.code is local.code
    assert remote.message == local.message.replace(str(path), f"{server}/{path.name}")


@pytest.mark.parametrize("kind", BAD_SERVERS)
@pytest.mark.parametrize("begin", ["before it is opened", "while its header is read", "while its tiles are read"])
def test_a_server_that_fails_ends_as_one_error(
    server: str, whole: Path, kind: str, begin: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    fault, code = BAD_SERVERS[kind]
    if fault is hang:
        monkeypatch.setattr("udfs.wsi.store.file.DEADLINE_S", 0.1)

    def after(count: int) -> Fault:
        return lambda handler, part: Server.requests > count and fault(handler, part)

    def read() -> None:
        with open_slide(uri_of(server, whole), threads=2) as slide:
            if begin == "while its tiles are read":
                Server.fault = after(Server.requests + 1)
            for _ in slide.read_tiles(CORNERS, TILE_PX):
                pass

    if begin != "while its tiles are read":
        Server.fault = after(0 if begin == "before it is opened" else 1)
    error = error_of(read)
    assert error.code is code
    assert f"{server}/whole.tif" in error.message


def test_a_file_that_shrinks_while_it_is_read_was_changed(server: str, whole: Path) -> None:
    with open_slide(uri_of(server, whole)) as slide:
        os.truncate(whole, whole.stat().st_size // 3)
        error = error_of(lambda: list(slide.read_tiles(CORNERS, TILE_PX)))
    assert error.code is ErrorCode.FILE_CHANGED


def test_a_file_that_is_cut_to_nothing_or_goes_away_says_so(server: str, whole: Path) -> None:
    with open_slide(uri_of(server, whole)) as slide:
        os.truncate(whole, 0)
        assert error_of(lambda: list(slide.read_tiles(CORNERS, TILE_PX))).code is ErrorCode.FILE_EMPTY
    write_slide(whole, position_pixels(SIDE_PX, SIDE_PX), compression="none", tile_px=TILE_PX)
    with open_slide(uri_of(server, whole)) as slide:
        whole.unlink()
        assert error_of(lambda: list(slide.read_tiles(CORNERS, TILE_PX))).code is ErrorCode.FILE_MISSING


def test_a_file_replaced_since_its_index_was_made_is_noticed(server: str, whole: Path) -> None:
    with open_slide(uri_of(server, whole)) as slide:
        index = slide.index
    write_slide(whole, position_pixels(SIDE_PX, SIDE_PX)[::-1], compression="none", tile_px=TILE_PX)
    with open_slide(uri_of(server, whole), index=index) as slide:
        error = error_of(lambda: list(slide.read_tiles(CORNERS, TILE_PX)))
        assert error.code is ErrorCode.FILE_CHANGED
        assert error_of(lambda: slide.downsampled(16)).code is ErrorCode.FILE_CHANGED
    whole.unlink()
    with open_slide(uri_of(server, whole), index=index) as slide:
        assert error_of(lambda: slide.downsampled(16)).code is ErrorCode.FILE_MISSING


@pytest.mark.parametrize("asked_for", ["nothing", "tiles", "a tile of many"])
def test_what_is_closed_is_given_up_at_once(server: str, whole: Path, asked_for: str) -> None:
    """The server hangs, the deadline is far: the fixture finds what is still under way."""
    with open_slide(uri_of(server, whole)) as slide:
        index = slide.index
    with open_slide(uri_of(server, whole), index=index) as slide:
        tiles = slide.read_tiles(CORNERS, TILE_PX) if asked_for == "a tile of many" else None
        if tiles:
            next(tiles)
        Server.fault = hang
        if asked_for == "tiles":
            slide.read_tiles(CORNERS, TILE_PX)
    wait_until_idle()
