"""The same slide on a disk, over HTTP, in Azure's and in Amazon's store: real servers, real clients, real faults."""

import os
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
from azure.identity.aio import DefaultAzureCredential
from fsspec.core import url_to_fs

from tests.slides.huge import write_huge_svs
from tests.slides.make import Pixels, write_slide
from tests.stores.azurite import Azurite, azurite
from tests.stores.faulty import KINDS, faulty
from tests.stores.http import serve
from tests.stores.moto import moto
from udfs.wsi import ErrorCode, SlideError, open_slide
from udfs.wsi.store import File, options_for
from udfs.wsi.store import file as file_module


@dataclass(frozen=True)
class Store:
    """Where the files of `folder` are, too."""

    root: str
    url: str
    options: Callable[[str | None], dict[str, Any]]  # given the URL of a proxy, or None

    def uri(self, name: str) -> str:
        return f"{self.root}/{name}"


@pytest.fixture(scope="module", autouse=True)
def _no_proxy() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        for name in ("http_proxy", "HTTP_PROXY", "https_proxy", "HTTPS_PROXY", "all_proxy", "ALL_PROXY"):
            patch.delenv(name, raising=False)
        yield


@pytest.fixture(scope="module")
def folder(pixels: Pixels, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("stores")
    write_slide(folder / "a.tif", pixels[1000:2400, 700:2100], pyramid=True)
    write_slide(folder / "flat.tif", pixels[1000:2000, 700:1900], tile_px=None, compression="deflate")
    return folder


@pytest.fixture(scope="module")
def server(folder: Path) -> Iterator[Azurite]:
    with azurite() as running:
        running.upload(folder, "slides")
        yield running


@pytest.fixture(scope="module")
def stores(folder: Path, server: Azurite) -> Iterator[dict[str, Store]]:
    with ExitStack() as opened:
        files, s3 = opened.enter_context(serve(folder)), opened.enter_context(moto())
        s3.upload(folder)
        yield {
            "http": Store(files.url, files.url, lambda url: {}),
            "azure": Store("az://slides", server.url, server.storage_options),
            "s3": Store(f"s3://{s3.bucket}", s3.url, s3.storage_options),
        }


@pytest.fixture(params=["http", "azure", "s3"])
def store(request: pytest.FixtureRequest, stores: dict[str, Store]) -> Store:
    return stores[request.param]


@pytest.mark.parametrize("name", ["a.tif", "flat.tif"])
def test_a_slide_reads_as_it_does_from_a_disk(store: Store, folder: Path, name: str) -> None:
    corners = [(x, y) for x in range(0, 1200, 224) for y in range(0, 1000, 224)]
    with open_slide(str(folder / name)) as slide:
        expected, small = dict(slide.read_tiles(corners, 224)), slide.downsampled()
    with open_slide(store.uri(name), store.options(None)) as slide:
        tiles = dict(slide.read_tiles(corners, 224))
        np.testing.assert_array_equal(slide.downsampled(), small)
        assert slide.file.size_bytes == (folder / name).stat().st_size
        assert slide.traffic.requests < 40
    for i, tile in tiles.items():
        np.testing.assert_array_equal(tile, expected[i])


def test_nothing_there_is_an_answer(store: Store) -> None:
    with pytest.raises(SlideError) as caught:
        open_slide(store.uri("b.tif"), store.options(None))
    assert caught.value.code is ErrorCode.FILE_MISSING


def test_every_byte_comes_through_a_store_that_fails(
    store: Store, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(file_module, "FIRST_WAIT_S", 0.01)
    content = (folder / "flat.tif").read_bytes()
    starts = np.random.default_rng(3).integers(0, len(content) - 5000, 100).tolist()
    with faulty(store.url, share=0.2, seed=4, stall_s=0.3) as proxy:
        uri = store.uri("flat.tif").replace(store.url, proxy.url)
        parts = File(uri, store.options(proxy.url)).ranges(starts, [5000] * len(starts))
        injected = proxy.injected()
    assert parts == [content[start : start + 5000] for start in starts]
    assert all(injected[kind] > 0 for kind in KINDS)


def test_a_hung_connection_ends_at_the_deadline(stores: dict[str, Store], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(file_module, "FIRST_WAIT_S", 0.0)
    monkeypatch.setattr(file_module, "ATTEMPTS", 2)
    store = stores["http"]
    with faulty(store.url, share=1.0, kinds=("stall",), stall_s=60.0) as proxy:
        file = File(f"{proxy.url}/a.tif")  # asked by HEAD, which does not fail
        monkeypatch.setattr(file_module, "DEADLINE_S", 0.2)
        begun = time.monotonic()
        with pytest.raises(SlideError, match=r"no answer in time.*--retry-failed") as caught:
            file.request(0, 10).result()
    assert caught.value.code is ErrorCode.READ_FAILED
    assert file.traffic.requests == 1 + 2
    assert time.monotonic() - begun < 30


def test_a_refusal_is_not_asked_for_again(stores: dict[str, Store], server: Azurite) -> None:
    """To find out a size over HTTP, fsspec asks by HEAD, then by GET; S3 and Azure are also asked for a folder."""
    wrong = "d3Jvbmcgd3Jvbmcgd3Jvbmcgd3Jvbmcgd3Jvbmc="
    valid, expired = (server.signed("slides", "a.tif", timedelta(hours=hours)) for hours in (1, -1))
    forged = valid.partition("sig=")[0] + "sig=" + wrong
    denied, missing = ErrorCode.ACCESS_DENIED, ErrorCode.FILE_MISSING
    refused: list[tuple[str, str, Callable[[str | None], dict[str, Any]], ErrorCode]] = [
        (server.url, "az://slides/a.tif", lambda url: server.storage_options(url, wrong), denied),
        (server.url, forged, stores["http"].options, denied),
        (server.url, expired, stores["http"].options, denied),
        *((store.url, store.uri("b.tif"), store.options, missing) for store in stores.values()),
    ]
    for url, uri, options, code in refused:
        with faulty(url, share=0.0) as proxy:
            with pytest.raises(SlideError) as caught:
                File(uri.replace(url, proxy.url), options(proxy.url))
            assert caught.value.code is code
            assert proxy.injected()["requests"] <= 2
        assert wrong not in str(caught.value)
        assert "sig=" not in str(caught.value)


def test_a_wrong_key_is_refused_at_once_and_not_shown(server: Azurite) -> None:
    wrong = "d3Jvbmcgd3Jvbmcgd3Jvbmcgd3Jvbmcgd3Jvbmc="
    with pytest.raises(SlideError, match="storage_options") as caught:
        open_slide("az://slides/a.tif", server.storage_options(key=wrong))
    assert caught.value.code is ErrorCode.ACCESS_DENIED
    assert wrong not in str(caught.value)


def test_without_a_key_azure_is_asked_as_who_runs_the_job(monkeypatch: pytest.MonkeyPatch) -> None:
    """A managed identity, `az login`, a service principal in the environment: what the README says of `anon: false`."""
    for name in list(os.environ):
        if name.startswith("AZURE_STORAGE"):
            monkeypatch.delenv(name)
    store, _ = url_to_fs(
        "az://slides/a.tif", **options_for("az://slides/a.tif", {"account_name": "lab", "anon": False})
    )
    assert isinstance(store.credential, DefaultAzureCredential)


def test_an_expired_token_is_told_and_not_shown(server: Azurite) -> None:
    with open_slide(server.signed("slides", "a.tif", timedelta(hours=1))) as slide:
        assert slide.width_px == 1400
    expired = server.signed("slides", "a.tif", -timedelta(hours=1))
    with pytest.raises(SlideError, match="expired") as caught:
        open_slide(expired)
    assert caught.value.code is ErrorCode.ACCESS_DENIED
    assert expired.split("sig=")[1][:20] not in str(caught.value)


def test_a_file_replaced_in_the_store_is_another_version(server: Azurite, folder: Path) -> None:
    content = (folder / "a.tif").read_bytes()
    server.replace("slides", "again.tif", content)
    with open_slide("az://slides/again.tif", server.storage_options()) as slide:
        index = slide.index
    server.replace("slides", "again.tif", content)
    with (
        open_slide("az://slides/again.tif", server.storage_options(), index=index) as slide,
        pytest.raises(SlideError) as caught,
    ):
        next(slide.read_tiles([(0, 0)]))
    assert caught.value.code is ErrorCode.FILE_CHANGED


@pytest.mark.parametrize("layout", ["libtiff", "tifffile"])
def test_a_slide_of_two_gigabytes_is_open_after_six_requests(
    tmp_path: Path, layout: Literal["libtiff", "tifffile"]
) -> None:
    write_huge_svs(tmp_path / "huge.svs", layout=layout)
    with serve(tmp_path) as files, open_slide(f"{files.url}/huge.svs") as slide:
        requests, sent = files.traffic()
        assert [level.downsample for level in slide.levels] == [2**i for i in range(8)]
        assert (slide.traffic.requests, slide.traffic.bytes) == (requests, sent)
    assert slide.file.size_bytes > 1.9e9
    assert requests <= 6
    assert sent < slide.file.size_bytes / 60
