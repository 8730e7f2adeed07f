"""HTTP servers that lie: what they send is checked, asked for again, then told; credentials stay with their origin."""

import json
import re
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from http.server import ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from jobs.runtime.settings.config import load_config
from tests.slides.make import position_pixels, write_slide
from tests.stores.lying import (
    LIES,
    SLOW,
    Lie,
    Server,
    another_range,
    answer,
    bytes_equals,
    fewer,
    listening,
    other_size,
    other_version,
    other_weak_version,
    whole,
)
from udfs.wsi import ErrorCode, SlideError, open_slide
from udfs.wsi.reading.staging import staged
from udfs.wsi.store import File, StoreOptions, copy_to, read_bytes

SIDE_PX, TILE_PX = 512, 128
PIXELS = position_pixels(SIDE_PX, SIDE_PX)
CORNERS = [(x, y) for y in range(0, SIDE_PX, TILE_PX) for x in range(0, SIDE_PX, TILE_PX)]
TOKEN = "SECRETTOKENSECRET"


@pytest.fixture
def servers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[str, str]]:
    """Two origins that serve the same folder."""
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("SLIDELAKE_STAGING", str(tmp_path / "staging"))
    monkeypatch.setattr("udfs.wsi.store.file.FIRST_WAIT_S", 0.0)
    monkeypatch.setattr(ThreadingHTTPServer, "handle_error", lambda *_: None)  # clients that gave up
    Server.folder, Server.lie, Server.lies = tmp_path / "served", None, 0
    Server.released, Server.seen, Server.redirect = threading.Event(), [], {}
    Server.folder.mkdir()
    with ExitStack() as stack:
        yield stack.enter_context(listening()), stack.enter_context(listening())


@pytest.fixture
def server(servers: tuple[str, str]) -> str:
    return servers[0]


@pytest.fixture
def slide(server: str) -> str:
    write_slide(Server.folder / "a.tif", PIXELS, compression="none", tile_px=TILE_PX)
    return f"{server}/a.tif"


def start_to(lie: Lie, times: int) -> None:
    Server.lie, Server.lies = staticmethod(lie), times


def error_of(call: Callable[[], Any]) -> SlideError:
    with pytest.raises(SlideError) as caught:
        call()
    assert "SECRET" not in str(caught.value)
    return caught.value


@pytest.mark.parametrize("lie", LIES, ids=lambda lie: lie.__name__)
def test_a_lie_is_asked_again_and_the_pixels_are_right(slide: str, lie: Lie) -> None:
    with open_slide(slide) as opened:
        start_to(lie, 2)
        tiles = dict(opened.read_tiles(CORNERS, TILE_PX))
    assert Server.lies == 0
    for i, (x, y) in enumerate(CORNERS):
        np.testing.assert_array_equal(tiles[i], PIXELS[y : y + TILE_PX, x : x + TILE_PX])


@pytest.mark.parametrize("lie", LIES, ids=lambda lie: lie.__name__)
@pytest.mark.parametrize("begin", ["header", "tiles"])
def test_a_server_that_only_lies_is_read_failed(slide: str, lie: Lie, begin: str) -> None:
    def read() -> None:
        if begin == "header":
            start_to(lie, 1000)
        with open_slide(slide) as opened:
            start_to(lie, 1000)
            list(opened.read_tiles(CORNERS, TILE_PX))

    error = error_of(read)
    assert error.code is ErrorCode.READ_FAILED
    assert error.message.startswith(slide)


def requests_of(call: Callable[[], Any]) -> list[dict[str, str]]:
    before = len(Server.seen)
    call()
    return [request for request in Server.seen[before:] if request["method"] == "GET"]


@pytest.mark.parametrize("begin", ["header", "tiles"])
def test_a_server_that_sends_whole_files_only_is_asked_once(slide: str, begin: str) -> None:
    """For a slide, which is not read whole; the weights of a network are, at once."""

    def read() -> None:
        with ExitStack() as stack:
            opened: Any = stack.enter_context(open_slide(slide)) if begin == "tiles" else None
            start_to(whole, 1000)
            file = File(slide)
            error = error_of(lambda: list(opened.read_tiles(CORNERS[:1], TILE_PX)) if opened else file.ranges([8], [8]))
            assert error.code is ErrorCode.READ_FAILED
            assert error.message.endswith("its server ignores byte ranges; put the slide in another store")

    asked = [request["Range"] for request in requests_of(read)]
    assert len(asked) == len(set(asked))


@pytest.mark.parametrize("answer", [bytes_equals, other_weak_version], ids=lambda lie: lie.__name__)
def test_what_is_odd_but_true_is_read_at_once(slide: str, answer: Lie) -> None:
    def read() -> None:
        with open_slide(slide) as opened:
            [(_, tile)] = opened.read_tiles(CORNERS[5:6], TILE_PX)
        x, y = CORNERS[5]
        np.testing.assert_array_equal(tile, PIXELS[y : y + TILE_PX, x : x + TILE_PX])

    honest = len(requests_of(read))
    start_to(answer, 1000)
    assert len(requests_of(read)) == honest


@pytest.mark.parametrize("who", ["ranges", "all answers"])
def test_mirrors_that_disagree_are_told_with_the_remedy(slide: str, who: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with open_slide(slide) as opened:
        begin = Server.begin
        if who == "ranges":
            start_to(other_version, 1000)
        else:
            monkeypatch.setattr(
                Server, "begin", lambda self, *of, **about: begin(self, *of, **about | {"ETag": '"two"'})
            )
        error = error_of(lambda: list(opened.read_tiles(CORNERS, TILE_PX)))
    assert error.code is (ErrorCode.READ_FAILED if who == "ranges" else ErrorCode.FILE_CHANGED)
    assert "run again" in error.message
    assert error.message.endswith("servers behind one address disagree about it: give the address of one of them")


def test_a_file_that_has_another_etag_by_now_was_changed(slide: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with open_slide(slide) as opened:
        begin = Server.begin
        monkeypatch.setattr(Server, "begin", lambda self, *of, **about: begin(self, *of, **about | {"ETag": '"two"'}))
        error = error_of(lambda: list(opened.read_tiles(CORNERS, TILE_PX)))
    assert error.code is ErrorCode.FILE_CHANGED


def test_a_weak_etag_is_the_same_version(slide: str) -> None:
    def weak(self: Server, content: bytes, first: int, last: int) -> None:
        answer(self, content, first, last, content[first : last + 1], ETag='W/"one"')

    with open_slide(slide) as opened:
        start_to(weak, 1000)
        assert len(list(opened.read_tiles(CORNERS, TILE_PX))) == len(CORNERS)


@pytest.mark.parametrize("lie", SLOW, ids=lambda lie: lie.__name__)
@pytest.mark.parametrize("what", ["header", "mask", "tiles", "copy"])
def test_no_slide_waits_longer_than_the_settings_say(slide: str, lie: Lie, what: str) -> None:
    options = StoreOptions({}, None, 0.5)
    opened = open_slide(slide, options) if what in ("mask", "tiles") else None
    start_to(lie, 1000)

    def read() -> None:
        if opened and what == "mask":
            opened.downsampled(16)
        elif opened:
            list(opened.read_tiles(CORNERS, TILE_PX))
        elif what == "copy":
            with staged(slide, options):
                pass
        else:
            open_slide(slide, options)

    begun = time.monotonic()
    error = error_of(read)
    assert 0.4 < time.monotonic() - begun < 5
    assert error.code is ErrorCode.READ_FAILED
    assert "slides.timeout_s is 0.5" in error.message
    assert "--retry-failed" in error.message
    if opened:
        opened.close()


def test_the_bound_holds_for_all_requests_together(slide: str) -> None:
    """Each answer comes in time."""

    def late(self: Server, content: bytes, first: int, last: int) -> None:
        time.sleep(0.2)
        answer(self, content, first, last, content[first : last + 1])

    file = File(slide, StoreOptions({}, None, 0.5))
    start_to(late, 1000)
    begun = time.monotonic()
    error = error_of(lambda: [file.ranges([i], [1]) for i in range(100)])
    assert "slides.timeout_s is 0.5" in error.message
    assert time.monotonic() - begun < 5
    file.close()


def test_what_comes_fast_enough_takes_as_long_as_it_takes(server: str) -> None:
    (Server.folder / "large.bin").write_bytes(bytes(2_000_000))
    file = File(f"{server}/large.bin", StoreOptions({}, None, 0.3))

    def slow(self: Server, content: bytes, first: int, last: int) -> None:
        time.sleep(0.1)
        answer(self, content, first, last, content[first : last + 1])

    start_to(slow, 1000)
    for start in range(0, 2_000_000, 200_000):
        file.ranges([start], [200_000])
    assert file.traffic.waited_s > 0.9
    file.close()


@pytest.mark.parametrize("lie", SLOW, ids=lambda lie: lie.__name__)
def test_a_large_file_that_is_read_whole_is_waited_for_no_longer(server: str, lie: Lie) -> None:
    (Server.folder / "weights.pth").write_bytes(bytes(20_000_000))
    start_to(lie, 1000)
    begun = time.monotonic()
    with pytest.raises(Exception, match=r"slides\.timeout_s is 0\.5"):
        read_bytes(f"{server}/weights.pth", StoreOptions({}, None, 0.5))
    assert time.monotonic() - begun < 5


def test_files_read_whole_are_whole(server: str) -> None:
    content = np.random.default_rng(1).bytes(20_000_000)
    (Server.folder / "weights.pth").write_bytes(content)
    for lie in (another_range, fewer, other_size):
        start_to(lie, 2)
        assert read_bytes(f"{server}/weights.pth") == content
    (Server.folder / "empty.csv").write_bytes(b"")
    assert read_bytes(f"{server}/empty.csv") == b""


def test_a_server_without_ranges_serves_files_that_are_read_whole(server: str) -> None:
    content = np.random.default_rng(1).bytes(10_000_000)
    (Server.folder / "weights.pth").write_bytes(content)

    def all_of_it(self: Server, content: bytes, first: int, last: int) -> None:
        self.begin(200, len(content))
        self.wfile.write(content)

    start_to(all_of_it, 1000)
    weights = f"{server}/weights.pth"
    asked = [request.get("Range") for request in requests_of(lambda: read_bytes(weights))]
    assert read_bytes(weights) == content
    assert len(asked) == len(set(asked)) <= 3  # the parts that were on their way, then the whole file


@pytest.mark.parametrize("first_ignored", [8 * 2**20, 16 * 2**20])
def test_a_server_that_loses_its_ranges_gives_no_file_of_parts_and_all_of_it(
    server: str, tmp_path: Path, first_ignored: int
) -> None:
    (Server.folder / "weights.pth").write_bytes(np.random.default_rng(1).bytes(20_000_000))

    def lose_ranges(self: Server, content: bytes, first: int, last: int) -> None:
        if first < first_ignored:
            answer(self, content, first, last, content[first : last + 1])
        else:
            whole(self, content, first, last)

    start_to(lose_ranges, 1000)
    for read in (read_bytes, lambda uri: copy_to(tmp_path / "copy", uri)):
        with pytest.raises(Exception, match="ignores others: give the address of one server"):
            read(f"{server}/weights.pth")


def test_a_copy_has_the_size_that_its_store_says(server: str, tmp_path: Path) -> None:
    weights, longer = Server.folder / "weights.pth", Server.folder / "longer.pth"
    weights.write_bytes(bytes(10_000_000))
    longer.write_bytes(bytes(10_000_005))

    def grow_and_send_all(self: Server, content: bytes, first: int, last: int) -> None:
        if first == 0:
            longer.replace(weights)
        whole(self, content, first, last)

    start_to(grow_and_send_all, 1000)
    with pytest.raises(Exception, match="10,000,005 bytes arrived, its store says 10,000,000: run again"):
        copy_to(tmp_path / "copy", f"{server}/weights.pth")
    Server.lies = 0
    copy_to(tmp_path / "copy", f"{server}/weights.pth")
    assert (tmp_path / "copy").stat().st_size == 10_000_005


HEADERS = {"X-Token": TOKEN, "Authorization": f"Bearer {TOKEN}", "Cookie": f"a={TOKEN}"}
CREDENTIALS: dict[str, dict[str, Any]] = {
    "headers": {"headers": HEADERS},
    "headers of the client": {"client_kwargs": {"headers": HEADERS}},
    "cookies of the client": {"client_kwargs": {"cookies": {"a": TOKEN}}},
    "cookies": {"cookies": {"a": TOKEN}},
    "parameters": {"params": {"token": TOKEN}},
}


@pytest.mark.parametrize("kind", CREDENTIALS)
@pytest.mark.parametrize("how", ["slide", "whole", "chain"])
def test_credentials_do_not_follow_a_redirect_to_another_origin(
    servers: tuple[str, str], slide: str, kind: str, how: str
) -> None:
    first, second = servers
    options = CREDENTIALS[kind]
    Server.redirect = {first.removeprefix("http://"): second}
    if how == "slide":
        with open_slide(slide, options) as opened:
            assert len(list(opened.read_tiles(CORNERS[:3], TILE_PX))) == 3
    elif how == "whole":
        assert read_bytes(slide, options) == (Server.folder / "a.tif").read_bytes()
    else:
        file = File(f"simplecache::{slide}", {"http": options})
        assert file.ranges([0], [2]) == [b"II"]
    for request in Server.seen:
        if request["Host"] == second.removeprefix("http://"):
            assert TOKEN not in json.dumps(request)
    assert any(request["Host"] in second for request in Server.seen)


def test_credentials_stay_with_a_redirect_of_the_same_origin(server: str, slide: str) -> None:
    (Server.folder / "deep").mkdir()
    moved = Server.folder / "deep/a.tif"
    (Server.folder / "a.tif").rename(moved)
    get = Server.do_GET

    def redirecting(self: Server) -> None:
        if self.path == "/a.tif":
            self.begin(302, 0, Location="/deep/a.tif")
        else:
            get(self)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Server, "do_GET", redirecting)
        patch.setattr(Server, "do_HEAD", redirecting)
        with open_slide(slide, {"headers": {"X-Token": TOKEN}}) as opened:
            assert opened.width_px == SIDE_PX
    assert all(request["X-Token"] == TOKEN for request in Server.seen)


@pytest.mark.parametrize(
    ("userinfo", "options", "cause"),
    [
        (f"user:{TOKEN}@", {"headers": {"Authorization": "Basic x"}}, "AUTHORIZATION"),
        ("", {"client_kwargs": {"no_such_option": 1}}, "no_such_option"),
        ("", {"account_name": "lab"}, "account_name"),
        ("", {"headers": "X-Token: 1"}, "headers|str"),
        ("", {"headers": {"X-Token": "a\nb"}}, "header"),
        ("", {"headers": {"X-Token": 5}}, "5"),
    ],
)
def test_options_that_the_client_refuses_are_told_with_their_cause(
    slide: str, userinfo: str, options: dict[str, Any], cause: str
) -> None:
    error = error_of(lambda: open_slide(slide.replace("http://", f"http://{userinfo}"), options))
    assert error.code is ErrorCode.READ_FAILED
    assert "slides.storage_options" in error.message
    assert re.search(cause, error.message)


def test_the_setting_bounds_what_the_options_carry(tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    path.write_text("{patients: p.csv, output: {root: t}, slides: {root: r}}")
    assert load_config(str(path)).slides.storage_options.timeout_s == 180  # type: ignore[attr-defined]
    assert load_config(str(path), ["slides.timeout_s=7"]).slides.storage_options.timeout_s == 7  # type: ignore[attr-defined]
