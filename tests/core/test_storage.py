"""Bytes behind a URI: secrets never show, what may pass is tried again, a changed file is another version."""

import asyncio
import os
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar
from urllib.parse import quote, unquote

import fsspec
import pytest
from fsspec.implementations.memory import MemoryFileSystem
from hypothesis import given, settings
from hypothesis import strategies as st

from udfs.wsi import ErrorCode, SlideError
from udfs.wsi.store import File, FileInfo, StoreOptions, options_for, public_uri, redact, secrets_of
from udfs.wsi.store.about import has_etag
from udfs.wsi.store.file import ATTEMPTS

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
    [
        "/data/slides/a.svs",
        "a#1?.svs",
        "s3://bucket/a.svs",
        "abfss://container@account.dfs/a.svs",
        "hdfs:///a.svs",
        "C:\\slides\\a.svs",
    ],
)
def test_a_uri_without_secrets_stays_as_it_is(uri: str) -> None:
    assert public_uri(uri) == uri


@settings(derandomize=True, deadline=None, max_examples=40)
@given(
    secrets=st.lists(SECRET, min_size=1, max_size=4),
    noise=st.sampled_from(["", " ", "=", "'", "&x="]),
    number=st.integers(10**6, 10**12),
)
def test_no_storage_option_survives_redaction(secrets: list[str], noise: str, number: int) -> None:
    options = {"key": secrets[0], "nested": {"list": [*secrets, {"deep": (secrets[-1],)}]}, "pin": number, "anon": True}
    text = noise.join([*secrets, str(number), "anon=True"])
    shown = redact(text, secrets_of(None, options))
    assert not any(secret in shown for secret in [*secrets, str(number)])
    assert "anon=True" in shown


def test_a_password_of_a_uri_in_storage_options_is_no_text_to_show() -> None:
    options = {
        "client_kwargs": {"endpoint_url": "https://admin:hunter2222@minio:9000"},
        "proxies": ["http://u:pass1234@p"],
    }
    assert redact("401 for hunter2222 by pass1234", secrets_of(None, options)) == "401 for *** by ***"


def test_a_uri_that_is_none_is_shown_without_what_may_be_a_secret() -> None:
    uri = "https://[SECRETSECRET@host/a.svs"  # no IPv6 address
    assert public_uri(uri) == "https://***"
    assert redact(f"no {uri}", secrets_of(uri, None)) == "no https://***"


def test_a_token_in_place_of_a_user_is_redacted() -> None:
    for uri in ("https://ghp_SECRETSECRET@host/a.svs", "sftp://ghp_SECRETSECRET:x@host/a.svs"):
        assert redact("401 for ghp_SECRETSECRET", secrets_of(uri, None)) == "401 for ***"
    assert secrets_of("abfss://container@account.dfs/a.svs", None) == ()


def test_a_signature_is_redacted_encoded_and_decoded() -> None:
    signature = quote("abc+/def==ghijkl", safe="")
    found = secrets_of(f"https://host/a.svs?sv=2024&sig={signature}", None)
    for form in (signature, unquote(signature)):
        assert redact(f"403 for ...sig={form}", found) == "403 for ...sig=***"
    assert redact("403 for url='https://host/a.svs?sig=abc%2B/def'", found) == "403 for url='https://host/a.svs'"


@pytest.mark.parametrize(
    "key", ["ETag", "etag", "md5Hash", "Content-MD5", "mtime", "LastModified", "Last-Modified", "updated"]
)
def test_a_version_changes_with_what_the_store_says_of_content(key: str) -> None:
    before = FileInfo.from_fsspec({"size": 5, key: '"one"'})
    assert FileInfo.from_fsspec({"size": 5, key: '"one"'}) == before
    assert FileInfo.from_fsspec({"size": 5, key: '"two"'}).version != before.version
    assert FileInfo.from_fsspec({"size": 6, key: '"one"'}).version != before.version


@pytest.mark.parametrize(
    ("described", "is_of_content"),
    [
        ({"ETag": '"one"'}, True),
        ({"md5Hash": "one", "updated": "now"}, True),
        ({"ETag": 'W/"one"', "Last-Modified": "now"}, False),
        ({"etag": None, "mtime": 5.0}, False),
        ({}, False),
    ],
)
def test_only_a_strong_etag_or_a_hash_names_a_content(described: dict[str, Any], is_of_content: bool) -> None:
    assert has_etag({"size": 5} | described) == is_of_content


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

    def cat_file(self, *args: Any, **kwargs: Any) -> Any:
        self._maybe_fail("cat_file")
        return super().cat_file(*args, **kwargs)


@pytest.fixture
def flaky(monkeypatch: pytest.MonkeyPatch) -> Iterator[type[Flaky]]:
    fsspec.register_implementation("flaky", Flaky, clobber=True)
    monkeypatch.setattr("udfs.wsi.store.file.FIRST_WAIT_S", 0.0)
    Flaky.failures, Flaky.calls = {}, {}
    Flaky().pipe("/bucket/a.svs", bytes(range(100)))
    Flaky.calls.clear()
    yield Flaky
    Flaky.store.clear()


class DroppedError(Exception):
    """As HTTP clients raise a dropped connection: no OSError."""


@pytest.mark.parametrize("call", ["info", "cat_file"])
@pytest.mark.parametrize(
    "error", [OSError("reset"), TimeoutError("slow"), DroppedError("gone")], ids=lambda e: type(e).__name__
)
def test_a_store_is_asked_again_up_to_the_limit(flaky: type[Flaky], call: str, error: Exception) -> None:
    flaky.failures = {call: [error] * (ATTEMPTS - 1)}
    assert File("flaky://bucket/a.svs").ranges([3, 90], [4, 10]) == [bytes(range(3, 7)), bytes(range(90, 100))]
    assert flaky.calls[call] == ATTEMPTS + (
        call == "cat_file"
    )  # of two ranges only the one that failed is asked for again


@pytest.mark.parametrize("call", ["info", "cat_file"])
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


def test_options_go_to_the_store_of_the_slides_and_to_no_other() -> None:
    given = {"account_key": "SECRETKEY"}
    options = pickle.loads(pickle.dumps(StoreOptions(given, "az://slides")))  # as workers get them
    for uri in ("az://c/net.pth", "abfss://c@account/a.svs", "simplecache::az://c/a.svs"):
        assert options_for(uri, options) == given
    for uri in ("s3://models/net.pth", "https://host/net.pth", "/models/net.pth", "file:///net.pth"):
        assert options_for(uri, options) == {}
    for root in (None, "/slides"):  # slides by the CSV's uri, then
        assert options_for("s3://bucket/a.svs", StoreOptions(given, root)) == given


def test_a_file_is_read_inside_a_running_event_loop_too(flaky: type[Flaky], tmp_path: Path) -> None:
    """As in a notebook."""
    (tmp_path / "a.svs").write_bytes(bytes(range(100)))

    async def read() -> list[bytes]:
        uris = ("flaky://bucket/a.svs", str(tmp_path / "a.svs"))
        return [File(uri).ranges([5], [3])[0] for uri in uris]

    assert asyncio.run(read()) == [bytes(range(5, 8))] * 2


def test_a_range_beyond_the_end_says_truncated(flaky: type[Flaky]) -> None:
    with pytest.raises(SlideError, match="ends 5 bytes into a block at byte 95") as caught:
        File("flaky://bucket/a.svs").ranges([0, 95], [5, 10])
    assert caught.value.code is ErrorCode.FILE_TRUNCATED
