"""StainNet by table gives StainNet's pixels: built once a host, whole or not there, and never what a run fails by."""

import os
import resource
import signal
import subprocess
import sys
import textwrap
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch.nn import functional

from tests.slides.make import Pixels
from udfs.wsi.stain.colour_table import StainNormaliser, lookup, map_table
from udfs.wsi.stain.stain_network import StainNet

MANY, FEW = 10_000, 20  # tiles ahead
ROOT = Path(__file__).parents[2]


class Negative(StainNet):
    """Colours inverted: a table of it is built in no time."""

    def normalise(self, pixels: NDArray[np.uint8]) -> NDArray[np.uint8]:
        inverted: NDArray[np.uint8] = np.invert(pixels)
        return inverted


def strong_net() -> StainNet:
    """Weights so large that outputs reach both ends of 0 to 255."""
    generator = torch.Generator().manual_seed(3)
    net = StainNet().eval().requires_grad_(False)
    for parameter in net.parameters():
        parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.35)
    return net


@pytest.fixture(scope="module")
def net() -> StainNet:
    return strong_net()


@pytest.fixture(scope="module")
def folder(net: StainNet, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the table of `net`."""
    folder = tmp_path_factory.mktemp("cache") / "made" / "where needed"
    StainNormaliser(net, MANY, folder).normalise(np.zeros((1, 3), np.uint8))
    return folder


@pytest.fixture
def negative() -> StainNet:
    torch.manual_seed(0)
    return Negative()


def tables(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.table"))


def works(net: StainNet, folder: Path, tiles_ahead: int = MANY) -> bool:
    tile = np.random.default_rng(0).integers(0, 256, (2, 9, 7, 3), np.uint8)
    return np.array_equal(StainNormaliser(net, tiles_ahead, folder).normalise(tile), net.normalise(tile))


def without_net(net: StainNet, monkeypatch: pytest.MonkeyPatch) -> None:
    """From here on only a table can normalise."""

    def refused(_: Pixels) -> Pixels:
        raise AssertionError("StainNet was asked, not the table")

    monkeypatch.setattr(net, "normalise", refused)


def test_all_colours_are_what_torchs_convolutions_make_of_them(
    net: StainNet, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """2^24 of 2^24, beside convolutions on one thread."""
    without_net(net, monkeypatch)
    normaliser = StainNormaliser(net, FEW, folder)
    layers = list(net.parameters())
    values = np.arange(256, dtype=np.uint8)
    seen = set()
    for red in range(0, 256, 4):
        colours = np.stack(np.meshgrid(values[red : red + 4], values, values, indexing="ij"), axis=-1).reshape(
            512, 512, 3
        )
        x = torch.from_numpy(colours).permute(2, 0, 1)[None].float() / 127.5 - 1
        for i in (0, 2, 4):
            x = functional.conv2d(x, layers[i], layers[i + 1])
            x = functional.relu(x) if i < 4 else x
        expected = ((x * 0.5 + 0.5) * 255).round().clamp(0, 255).byte()[0].permute(1, 2, 0).numpy()
        np.testing.assert_array_equal(normaliser.normalise(colours), expected)
        seen |= set(np.unique(expected).tolist())
    assert seen == set(range(256))


def test_real_tiles_become_the_same_by_table_and_without(net: StainNet, folder: Path, pixels: Pixels) -> None:
    normaliser = StainNormaliser(net, FEW, folder)
    for tile in (pixels[896:1344, 896:1344], pixels[::7, ::-5], pixels[:1, :1], pixels[:0], pixels[None, 5:600, 3:400]):
        before = tile.copy()
        np.testing.assert_array_equal(normaliser.normalise(tile), net.normalise(tile))
        np.testing.assert_array_equal(tile, before)


def test_the_table_on_a_device_gives_the_same_pixels(net: StainNet, folder: Path, pixels: Pixels) -> None:
    tiles = np.stack([pixels[y : y + 448, 896:1344] for y in (448, 896)])
    table = StainNormaliser(net, FEW, folder).table_on("cpu")
    assert table.shape == (2**24,)
    np.testing.assert_array_equal(lookup(table, torch.from_numpy(tiles)).numpy(), net.normalise(tiles))


def test_the_table_on_a_device_is_built_where_none_is_and_kept(
    negative: StainNet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    colours = torch.tensor([[0, 1, 2], [255, 100, 7]], dtype=torch.uint8)
    expected = 255 - colours
    assert torch.equal(lookup(StainNormaliser(negative, 0, tmp_path).table_on("cpu"), colours), expected)
    without_net(negative, monkeypatch)
    assert torch.equal(lookup(StainNormaliser(negative, 0, tmp_path).table_on("cpu"), colours), expected)


def test_a_table_is_mapped_to_be_read_only(folder: Path) -> None:
    [path] = tables(folder)
    table = map_table(path)
    assert table is not None
    with pytest.raises(ValueError, match="read-only"):
        table[0] = 1


def test_a_small_run_makes_no_table_but_uses_one(
    negative: StainNet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small = StainNormaliser(negative, FEW, tmp_path)
    tile = np.full((4, 4, 3), 7, np.uint8)
    assert (small.normalise(tile) == 248).all()
    assert not list(tmp_path.iterdir())
    assert works(negative, tmp_path, MANY)
    without_net(negative, monkeypatch)
    assert (small.normalise(tile) == 248).all()  # which looked again


def test_each_checkpoint_has_a_table_of_its_own(tmp_path: Path) -> None:
    for _ in range(2):
        assert works(Negative(), tmp_path)
    assert len(tables(tmp_path)) == 2


def test_the_environment_names_the_folder(negative: StainNet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLIDELAKE_CACHE", str(tmp_path / "cache"))
    StainNormaliser(negative, MANY).normalise(np.zeros((1, 3), np.uint8))
    assert len(tables(tmp_path / "cache")) == 1


def test_a_folder_of_another_user_is_not_trusted(
    negative: StainNet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Anybody may make a folder of this name where all keep their temporary files, and put a table of theirs there."""
    monkeypatch.delenv("SLIDELAKE_CACHE", raising=False)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    uid = os.getuid()
    monkeypatch.setattr("os.getuid", lambda: uid + 1)
    with pytest.warns(RuntimeWarning, match="another user's"):
        assert (StainNormaliser(negative, MANY).normalise(np.zeros((1, 3), np.uint8)) == 255).all()
    assert not list(tmp_path.rglob("*.table"))


@pytest.mark.parametrize("size", [0, 1000, 2**26 - 1, 2**26 + 4])
def test_a_file_that_is_not_whole_is_not_used_and_built_anew(negative: StainNet, tmp_path: Path, size: int) -> None:
    assert works(negative, tmp_path)
    [path] = tables(tmp_path)
    path.write_bytes(bytes(size))
    assert map_table(path) is None
    assert works(negative, tmp_path, FEW)
    assert path.stat().st_size == size
    assert works(negative, tmp_path, MANY)
    assert map_table(path) is not None


@contextmanager
def small_disk(size: int) -> Iterator[None]:
    """Files cannot grow beyond `size`."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)


@pytest.mark.parametrize("fault", ["full", "no folder"])
def test_a_folder_that_takes_no_table_costs_one_warning(negative: StainNet, tmp_path: Path, fault: str) -> None:
    folder = tmp_path / "folder"
    if fault == "no folder":
        folder.write_text("a file")
    normaliser = StainNormaliser(negative, MANY, folder)
    tile = np.arange(48, dtype=np.uint8).reshape(4, 4, 3)
    with warnings.catch_warnings(record=True) as caught, small_disk(2**25):
        warnings.simplefilter("always")
        for _ in range(3):
            np.testing.assert_array_equal(normaliser.normalise(tile), 255 - tile)
    assert [warning.category for warning in caught] == [RuntimeWarning]
    assert "SLIDELAKE_CACHE" in str(caught[0].message)
    assert fault == "no folder" or [path.suffix for path in folder.iterdir()] == [".lock"]


def test_a_device_has_its_table_where_it_can_not_be_kept(negative: StainNet, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.warns(RuntimeWarning, match="cannot be kept"):
        table = StainNormaliser(negative, MANY, tmp_path / "file").table_on("cpu")
    assert lookup(table, torch.tensor([[1, 2, 3]], dtype=torch.uint8)).tolist() == [[254, 253, 252]]


@contextmanager
def script(code: str, folder: Path) -> Iterator[subprocess.Popen[str]]:
    """Run code that has `net`, `folder` and the names below in a process of its own."""
    head = f"""
        import os, sys, time
        from pathlib import Path
        import numpy as np, torch
        from tests.core.test_staintable import strong_net
        from udfs.wsi.stain.stain_network import StainNet
        from udfs.wsi.stain.colour_table import StainNormaliser
        torch.set_num_threads(1)
        net, folder = strong_net(), Path({str(folder)!r})
    """
    command = [sys.executable, "-c", textwrap.dedent(head) + textwrap.dedent(code)]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        try:
            yield process
        finally:
            process.kill()


def test_a_builder_that_is_killed_leaves_nothing_to_use_and_the_next_builds(net: StainNet, tmp_path: Path) -> None:
    half_way = """
        normalise, calls = StainNet.normalise, []
        def slower(self, pixels):
            calls.append(1)
            if len(calls) == 256:
                print("half", flush=True)
                time.sleep(600)
            return normalise(self, pixels)
        StainNet.normalise = slower
        StainNormaliser(net, 10_000, folder).normalise(np.zeros((1, 3), np.uint8))
    """
    with script(half_way, tmp_path) as builder:
        assert builder.stdout
        assert builder.stdout.readline() == "half\n"
        assert works(net, tmp_path)  # while the other builds
        assert not tables(tmp_path)
        builder.send_signal(signal.SIGKILL)
    assert {path.suffix for path in tmp_path.iterdir()} == {".lock", ".unfinished"}
    assert works(net, tmp_path)
    assert {path.suffix for path in tmp_path.iterdir()} == {".lock", ".table"}


def test_eight_processes_at_once_build_one_table(net: StainNet, tmp_path: Path) -> None:
    """Each begins with no table, normalises while one of them builds it, and ends with the table."""
    eight = """
        normalise = StainNet.normalise
        def counted(self, pixels):
            if len(pixels) > 64 and not pixels[0].any():  # the first strip of a table begins with black
                print("built", flush=True)
            return normalise(self, pixels)
        StainNet.normalise = counted
        normaliser = StainNormaliser(net, 10_000, folder)
        tile = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
        expected = net.normalise(tile)
        start, go = os.pipe()
        children = []
        for _ in range(8):
            child = os.fork()
            if not child:
                os.close(go)
                os.read(start, 1)  # until it is closed: all go at once
                try:
                    while True:
                        is_there = bool(list(folder.glob("*.table")))
                        if not np.array_equal(normaliser.normalise(tile), expected):
                            os._exit(1)
                        if is_there:
                            break
                        time.sleep(0.05)
                    def refused(self, pixels):
                        raise AssertionError
                    StainNet.normalise = refused
                    os._exit(0 if np.array_equal(normaliser.normalise(tile), expected) else 1)
                except BaseException:
                    os._exit(2)
            children.append(child)
        os.close(go)
        print("ended", [os.waitpid(child, 0)[1] for child in children])
    """
    with script(eight, tmp_path) as parent:
        said, _ = parent.communicate(timeout=120)
    assert said.splitlines() == ["built", f"ended {[0] * 8}"]
    assert len(tables(tmp_path)) == 1
