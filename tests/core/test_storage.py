"""Bytes behind a URI: secrets never show, what may pass is tried again, a changed file is another version."""

import os
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, ClassVar
from urllib.parse import quote, unquote

import fsspec
import numpy as np
import pytest
import tenacity.nap
from fsspec.implementations.memory import MemoryFileSystem
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.slides.make import position_pixels, write_slide
from udfs.wsi import ErrorCode, SlideError, open_slide
from udfs.wsi.storage import File, FileInfo, public_uri, redact, secrets_of

ATTEMPTS = 4
SECRET = st.text(st.characters(codec="ascii", categories=["L", "N"]), min_size=12, max_size=24).map("Sx".__add__)


@settings(derandomize=True, deadline=None, max_examples=100)
@given(
    scheme=st.sampled_from(["https", "http", "s3", "abfss", "az", "sftp", "simplecache::https", "zip://a.svs::https"]),
    secret=SECRET,
    user=st.sampled_from(["", "user"]),
)
def test_no_secret_of_a_uri_is_public(scheme: str, secret: str, user: str) -> None:
    uri = f"{scheme}://{user}:{secret}@host.example/folder/slide.svs?sig={secret}&sv=1#{secret}"
    shown = public_uri(uri)
    assert secret not in shown
    assert shown == f"{scheme}://host.example/folder/slide.svs"
    error = f"GET {uri} failed, signature {secret}"
    assert secret not in redact(error, secrets_of(uri, None))


@pytest.mark.parametrize(
    "uri",
    ["/data/slides/a.svs", "a#1?.svs", "s3://bucket/a.svs", "abfss://container@account.dfs/a.svs", "C:\\slides\\a.svs"],
)
def test_a_uri_without_secrets_stays_as_it_is(uri: str) -> None:
    assert public_uri(uri) == uri


@settings(derandomize=True, deadline=None, max_examples=40)
@given(secrets=st.lists(SECRET, min_size=1, max_size=4), noise=st.sampled_from(["", " ", "=", "'", "&x="]), number=st.integers(10**6, 10**12))
def test_no_storage_option_survives_redaction(secrets: list[str], noise: str, number: int) -> None:
    options = {"key": secrets[0], "nested": {"list": [*secrets, {"deep": (secrets[-1],)}]}, "pin": number, "anon": True}
    text = noise.join([*secrets, str(number), "anon=True"])
    shown = redact(text, secrets_of(None, options))
    assert not any(secret in shown for secret in [*secrets, str(number)])
    assert "anon=True" in shown


def test_a_signature_is_redacted_encoded_and_decoded() -> None:
    signature = quote("abc+/def==ghijkl", safe="")
    found = secrets_of(f"https://host/a.svs?sv=2024&sig={signature}", None)
    for form in (signature, unquote(signature)):
        assert redact(f"403 for ...sig={form}", found) == "403 for ...sig=***"
    assert redact("403 for url='https://host/a.svs?sig=abc%2B/def'", found) == "403 for url='https://host/a.svs'"


@pytest.mark.parametrize("key", ["ETag", "etag", "md5Hash", "Content-MD5", "mtime", "LastModified", "Last-Modified", "updated"])
def test_a_version_changes_with_what_the_store_says_of_content(key: str) -> None:
    before = FileInfo.from_fsspec({"size": 5, key: '"one"'})
    assert FileInfo.from_fsspec({"size": 5, key: '"one"'}) == before
    assert FileInfo.from_fsspec({"size": 5, key: '"two"'}).version != before.version
    assert FileInfo.from_fsspec({"size": 6, key: '"one"'}).version != before.version


def test_a_local_file_that_is_replaced_has_another_version(tmp_path: Path) -> None:
    path = tmp_path / "a.svs"
    path.write_bytes(b"12345")
    os.utime(path, ns=(10**18, 10**18))
    before = File(str(path)).info
    path.write_bytes(b"54321")
    os.utime(path, ns=(10**18, 10**18 + 10**6))
    after = File(str(path)).info
    assert (before.size_bytes, after.size_bytes) == (5, 5)
    assert before.version != after.version


class Flaky(MemoryFileSystem):  # type: ignore[misc]
    """A store that fails its first calls of one kind."""

    protocol = "flaky"
    cachable = False
    store: ClassVar[dict[str, Any]] = {}
    pseudo_dirs: ClassVar[list[str]] = [""]
    failures: ClassVar[dict[str, list[Exception]]] = {}
    calls: ClassVar[dict[str, int]] = {}

    @classmethod
    def _strip_protocol(cls, path: str) -> str:
        return "/" + path.removeprefix("flaky://").strip("/")

    def _maybe_fail(self, call: str) -> None:
        self.calls[call] = self.calls.get(call, 0) + 1
        if self.failures.get(call):
            raise self.failures[call].pop()

    def info(self, path: str, **kwargs: Any) -> Any:
        self._maybe_fail("info")
        return super().info(path, **kwargs)

    def cat_ranges(self, *args: Any, **kwargs: Any) -> Any:
        self._maybe_fail("cat_ranges")
        return super().cat_ranges(*args, **kwargs)


@pytest.fixture
def flaky(monkeypatch: pytest.MonkeyPatch) -> Iterator[type[Flaky]]:
    fsspec.register_implementation("flaky", Flaky, clobber=True)
    monkeypatch.setattr(tenacity.nap.time, "sleep", lambda _: None)
    Flaky.failures, Flaky.calls = {}, {}
    Flaky().pipe("/bucket/a.svs", bytes(range(100)))
    Flaky.calls.clear()
    yield Flaky
    Flaky.store.clear()


class DroppedError(Exception):
    """As HTTP clients raise a dropped connection: no OSError."""


@pytest.mark.parametrize("call", ["info", "cat_ranges"])
@pytest.mark.parametrize("error", [OSError("reset"), TimeoutError("slow"), DroppedError("gone")], ids=lambda e: type(e).__name__)
def test_a_store_is_asked_again_up_to_the_limit(flaky: type[Flaky], call: str, error: Exception) -> None:
    flaky.failures = {call: [error] * (ATTEMPTS - 1)}
    assert File("flaky://bucket/a.svs").ranges([3, 90], [4, 10]) == [bytes(range(3, 7)), bytes(range(90, 100))]
    assert flaky.calls[call] == ATTEMPTS


@pytest.mark.parametrize("call", ["info", "cat_ranges"])
def test_one_failure_more_is_a_slide_error_that_tells_how_to_go_on(flaky: type[Flaky], call: str) -> None:
    flaky.failures = {call: [OSError("connection reset by SECRETKEY")] * ATTEMPTS}
    with pytest.raises(SlideError, match="--retry-failed") as caught:
        File("flaky://bucket/a.svs", {"key": "SECRETKEY"}).ranges([0], [1])
    assert caught.value.code is ErrorCode.READ_FAILED
    assert "SECRET" not in str(caught.value)
    assert flaky.calls[call] == ATTEMPTS


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (FileNotFoundError("a"), ErrorCode.FILE_MISSING),
        (PermissionError("denied"), ErrorCode.ACCESS_DENIED),
        (ValueError("no such account"), ErrorCode.READ_FAILED),
    ],
)
def test_a_definite_answer_is_not_asked_for_again(flaky: type[Flaky], error: Exception, code: ErrorCode) -> None:
    flaky.failures = {"info": [error]}
    with pytest.raises(SlideError) as caught:
        File("flaky://bucket/a.svs")
    assert caught.value.code is code
    assert flaky.calls == {"info": 1}


def test_a_range_beyond_the_end_says_truncated(flaky: type[Flaky]) -> None:
    with pytest.raises(SlideError, match="ends 5 bytes into a block at byte 95") as caught:
        File("flaky://bucket/a.svs").ranges([0, 95], [5, 10])
    assert caught.value.code is ErrorCode.FILE_TRUNCATED


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
def test_a_busy_server_is_asked_again(server: str, tmp_path: Path, status: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tenacity.nap.time, "sleep", lambda _: None)
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


def test_a_server_that_ignores_ranges_is_refused(
    server: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
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
    monkeypatch.setattr(tenacity.nap.time, "sleep", lambda _: None)
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
