"""Slides that are no TIFFs: their pixels are OpenSlide's, what they are is told by looking, and what is wrong by name."""

import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import openslide
import pytest
from PIL import Image

from tests.slides.foreign import (
    CZI_BGRA,
    CZI_GREY,
    CZI_GREY16,
    CZI_JPEG,
    CZI_JPEG_XR,
    MIRAX_IMAGE_PX,
    write_czi,
    write_dicom,
    write_mirax,
    write_vms,
)
from tests.slides.make import Pixels, position_pixels, write_slide
from tests.slides.oracle import area_average, on_white
from udfs.wsi import ErrorCode, SlideError
from udfs.wsi.reading.foreign import ForeignSlide, sniff
from udfs.wsi.store import File

WIDTH, HEIGHT = 2048, 1024
HOLE = 3  # a MIRAX image that the scanner left out
MAKERS: dict[str, Callable[[Path], Path]] = {
    "MIRAX": lambda folder: write_mirax(folder / "a.mrxs", position_pixels(WIDTH, HEIGHT), missing=(HOLE,)),
    "Hamamatsu VMS": lambda folder: write_vms(folder / "b.vms", position_pixels(WIDTH, HEIGHT)),
    # edges that are no multiples of a frame
    "DICOM": lambda folder: write_dicom(folder / "c", position_pixels(WIDTH - 100, HEIGHT - 60), levels=(1, 4)),
}


@pytest.fixture(scope="module")
def slides(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One slide of each kind; read them, do not write to them."""
    folder = tmp_path_factory.mktemp("foreign")
    return {kind: make(folder) for kind, make in MAKERS.items()}


@pytest.fixture(autouse=True)
def staging(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("SLIDELAKE_STAGING", str(tmp_path / "staging"))
    return tmp_path / "staging"


def opened(path: Path | str) -> ForeignSlide:
    """As `open_slide` does it."""
    file = File(str(path))
    [head] = file.ranges([0], [min(512, file.info.size_bytes)])
    kind = sniff(head)
    assert kind
    return ForeignSlide(str(path), None, file.info, kind)


def refused(path: Path | str) -> SlideError:
    with pytest.raises(SlideError) as caught:
        opened(path)
    return caught.value


def whole(path: Path, level: int = 0) -> Pixels:
    """A level by OpenSlide itself, on white."""
    with openslide.OpenSlide(path) as slide:
        return on_white(np.asarray(slide.read_region((0, 0), level, slide.level_dimensions[level])))


@pytest.mark.parametrize("kind", MAKERS)
def test_header(slides: dict[str, Path], kind: str) -> None:
    with opened(slides[kind]) as slide, openslide.OpenSlide(slides[kind]) as peer:
        assert (slide.width_px, slide.height_px) == peer.dimensions
        assert [(level.width_px, level.height_px) for level in slide.levels] == list(peer.level_dimensions)
        assert [level.downsample for level in slide.levels] == [round(scale) for scale in peer.level_downsamples]
        assert slide.mpp_x == slide.mpp_y == {"MIRAX": 0.25}.get(kind, 0.5)
        assert slide.vendor == kind.partition(" ")[0].lower()
        assert slide.file.size_bytes == slides[kind].stat().st_size


@pytest.mark.parametrize("kind", MAKERS)
@pytest.mark.parametrize("level", [0, 1])
def test_tiles_are_the_pixels_that_openslide_reads(slides: dict[str, Path], kind: str, level: int) -> None:
    expected, edge = whole(slides[kind], level), 100
    with opened(slides[kind]) as slide:
        scale = int(slide.levels[level].downsample)
        corners = np.random.default_rng(5).integers(0, 900, (12, 2)) // scale
        # over each edge, and outside
        corners = np.vstack(
            [corners, [(-30, 40), (50, -99)], np.array(expected.shape[1::-1]) - 30, [(9999, 0), (0, -100)]]
        )
        tiles = dict(slide.read_tiles(corners * scale, edge, level))
    assert sorted(tiles) == list(range(len(corners)))
    framed = np.pad(expected, ((edge, edge), (edge, edge), (0, 0)), constant_values=255)
    for i, (x, y) in enumerate(corners):
        square = framed[y + edge : y + 2 * edge, x + edge : x + 2 * edge]
        wanted = square if square.shape == tiles[i].shape else np.full_like(tiles[i], 255)
        np.testing.assert_array_equal(tiles[i], wanted)


def test_what_the_scanner_left_out_is_white(slides: dict[str, Path]) -> None:
    with opened(slides["MIRAX"]) as slide:
        [(_, tile)] = slide.read_tiles([(HOLE * MIRAX_IMAGE_PX - 10, 0)], MIRAX_IMAGE_PX)
    expected = position_pixels(WIDTH, HEIGHT)[:MIRAX_IMAGE_PX, HOLE * MIRAX_IMAGE_PX - 10 :][:, :MIRAX_IMAGE_PX].copy()
    expected[:, 10:] = 255
    np.testing.assert_array_equal(tile, expected)


@pytest.mark.parametrize("kind", MAKERS)
@pytest.mark.parametrize("factor", [1, 3, 16])
def test_downsampled_is_the_area_average_of_the_nearest_level(slides: dict[str, Path], kind: str, factor: int) -> None:
    with opened(slides[kind]) as slide:
        result = slide.downsampled(factor)
        finer = [i for i, lv in enumerate(slide.levels) if lv.downsample < factor and not factor % lv.downsample]
        level = max(finer, default=0)
        edge = factor // int(slide.levels[level].downsample)
        shape = (slide.height_px // factor, slide.width_px // factor, 3)
    assert result.shape == shape
    np.testing.assert_array_equal(result, area_average(whole(slides[kind], level), edge)[: shape[0], : shape[1]])


def test_levels_of_rounded_sizes_are_used_like_those_of_whole_ones(tmp_path: Path) -> None:
    x, y = np.meshgrid(np.arange(3003), np.arange(1501))
    waves = np.stack([127 + 120 * np.sin(x / 60), 127 + 120 * np.sin(y / 60), 127 + 120 * np.sin((x + y) / 90)], axis=2)
    pixels = np.rint(waves).astype(np.uint8)
    path = write_dicom(tmp_path / "odd", pixels, levels=(1, 2))
    with openslide.OpenSlide(path) as peer:
        assert peer.level_downsamples[1] % 1
    with opened(path) as slide:
        assert slide.levels[1].downsample == 2
        result = slide.downsampled(8)
    average = area_average(whole(path, 1), 4)[: result.shape[0], : result.shape[1]]
    assert (
        np.abs(result.astype(int) - average).max() <= 2
    )  # OpenSlide interpolates by half a pixel, at 2 grey values each


def test_the_content_says_what_a_file_is(slides: dict[str, Path], tmp_path: Path) -> None:
    shutil.copytree(slides["Hamamatsu VMS"].parent, tmp_path / "copy")
    path = (tmp_path / "copy" / "b.vms").rename(tmp_path / "copy" / "b.tif")
    with opened(path) as slide:
        assert slide.vendor == "hamamatsu"
        assert (slide.width_px, slide.height_px) == (WIDTH, HEIGHT)


@pytest.mark.parametrize(
    ("head", "kind"),
    [
        (b"ZISRAWFILE\0\0\0\0\0\0", "Zeiss CZI"),
        (bytes.fromhex("d0cf11e0a1b11ae1"), "Zeiss ZVI"),
        (b"SQLite format 3\0\x10\0", "Sakura SVSLIDE"),
        (bytes(128) + b"DICM\2\0", "DICOM"),
        (b"[Virtual Microscope Specimen]\r\nNoLayers=1", "Hamamatsu VMS"),
        (b"\xef\xbb\xbf[Virtual Microscope Specimen]\n", "Hamamatsu VMS"),
        (b"; made by x\n[Uncompressed Virtual Microscope Specimen]\n", "Hamamatsu VMU"),
        (b"\xff\xd8\xff\xe0", "MIRAX"),
        (b"II*\0" + bytes(124) + b"DICM", None),
        (b"MM\0+", None),
        (b"\x89PNG\r\n", None),
        (b"a note on [Virtual Microscope Specimen]", None),
        (b"", None),
    ],
)
def test_sniff(head: bytes, kind: str | None) -> None:
    assert sniff(head) == kind


def test_a_tiff_is_not_foreign(tmp_path: Path) -> None:
    path = write_slide(tmp_path / "a.tif", position_pixels(64, 64))
    assert sniff(path.read_bytes()[:512]) is None


@pytest.mark.parametrize("name", ["a.mrxs", "a.jpg"])
def test_a_jpeg_without_a_mirax_folder_is_no_slide(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setitem(sys.modules, "openslide", None)  # nobody is to install something for a JPEG
    Image.fromarray(position_pixels(64, 64)).save(tmp_path / name, "JPEG")
    error = refused(tmp_path / name)
    assert error.code == ErrorCode.NOT_A_SLIDE
    assert f"{tmp_path / name} is a JPEG image" in error.message
    assert "folder a with Slidedat.ini" in error.message


@pytest.mark.parametrize("kind", MAKERS)
def test_without_openslide_the_message_names_the_extra(
    slides: dict[str, Path], monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    monkeypatch.setitem(sys.modules, "openslide", None)
    error = refused(slides[kind])
    assert error.code == ErrorCode.UNSUPPORTED_FORMAT
    assert str(slides[kind]) in error.message
    assert kind in error.message
    assert "pip install 'slidelake[openslide]'" in error.message


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.czi", b"ZISRAWFILE" + bytes(600)),
        ("a.zvi", bytes.fromhex("d0cf11e0a1b11ae1") + bytes(600)),
        ("a.svslide", b"SQLite format 3\0" + bytes(600)),
        ("a.dcm", bytes(128) + b"DICM" + bytes(600)),
    ],
)
def test_what_openslide_does_not_take_says_so(tmp_path: Path, name: str, content: bytes) -> None:
    (tmp_path / name).write_bytes(content)
    error = refused(tmp_path / name)
    assert error.code in (ErrorCode.UNSUPPORTED_FORMAT, ErrorCode.HEADER_CORRUPT)
    assert str(tmp_path / name) in error.message
    assert "convert it" in error.message or "upload it again" in error.message


CZI_UNREAD: dict[str, tuple[dict[str, Any], str]] = {
    "focal planes": ({"planes": (("Z", 0), ("Z", 1))}, "focal planes (dimension Z)"),
    "a focal plane": ({"planes": (("Z", 0),)}, "focal planes (dimension Z)"),
    "channels": ({"planes": (("C", 0), ("C", 1))}, "channels (dimension C)"),
    "time points": ({"planes": (("T", 0),)}, "time points (dimension T)"),
    "another dimension": ({"planes": (("H", 0),)}, "pictures (dimension H)"),
    "grey": ({"kind": CZI_GREY}, "grey pixels"),
    "16 bit": ({"kind": CZI_GREY16}, "16-bit grey pixels"),
    "alpha": ({"kind": CZI_BGRA}, "RGBA pixels"),
    "JPEG": ({"compression": CZI_JPEG}, "JPEG compression"),
    "JPEG XR": ({"compression": CZI_JPEG_XR}, "JPEG XR compression"),
    "some compression": ({"compression": 77}, "type 77 compression"),
}
DICOM_UNREAD: dict[str, tuple[bytes, bytes, str]] = {
    "JPEG-LS": (b"1.2.840.10008.1.2.4.50", b"1.2.840.10008.1.2.4.80", "transfer syntax 1.2.840.10008.1.2.4.80"),
    "16 bit": (b"\x28\0\0\x01US\2\0\x08", b"\x28\0\0\x01US\2\0\x10", "16 bits allocated per sample"),
    "12 of 16 bit": (b"\x28\0\1\x01US\2\0\x08", b"\x28\0\1\x01US\2\0\x0c", "12 bits stored per sample"),
    "grey": (b"\x28\0\2\0US\2\0\3", b"\x28\0\2\0US\2\0\1", "1 samples per pixel"),
    "planes": (b"\x28\0\6\0US\2\0\0", b"\x28\0\6\0US\2\0\1", "1 planar configuration"),
    "palette": (b"YBR_FULL_422", b"PALETTE COLO", "PALETTE pixels"),
}


def test_a_czi_of_one_plane_is_read(tmp_path: Path) -> None:
    """So that the refusals below are of what differs from it."""
    image = position_pixels(200, 100)
    with opened(write_czi(tmp_path / "a.czi", image)) as slide:
        assert slide.vendor == "zeiss" and (slide.mpp_x, slide.mpp_y) == pytest.approx((0.25, 0.25))
        [(_, tile)] = slide.read_tiles([(0, 0)], 100)
    np.testing.assert_array_equal(tile, image[:, :100])


@pytest.mark.parametrize("name", CZI_UNREAD)
def test_a_czi_that_openslide_does_not_read_is_unsupported(tmp_path: Path, name: str) -> None:
    how, said = CZI_UNREAD[name]
    error = refused(write_czi(tmp_path / "a.czi", position_pixels(200, 100), **how))
    assert error.code == ErrorCode.UNSUPPORTED_FORMAT, error
    assert f"does not read Zeiss CZI slides with {said} (" in error.message and "convert it" in error.message


@pytest.mark.parametrize("name", DICOM_UNREAD)
@pytest.mark.parametrize("level", [1, 4], ids=["its own file", "another of the series"])
def test_a_dicom_that_openslide_does_not_read_is_unsupported(tmp_path: Path, name: str, level: int) -> None:
    old, new, said = DICOM_UNREAD[name]
    path = write_dicom(tmp_path / "a", position_pixels(256, 256), levels=(1, 4))
    write_dicom(tmp_path / "a", position_pixels(256, 256), levels=(1,), series=2)
    changed = path.with_name(f"series1-level{level}.dcm")
    content = changed.read_bytes()
    assert content.count(old) == 1
    changed.write_bytes(content.replace(old, new))
    error = refused(path)
    assert error.code == ErrorCode.UNSUPPORTED_FORMAT, error
    assert f"does not read DICOM slides with {said} (" in error.message and "convert it" in error.message


def test_a_mirax_of_images_that_openslide_does_not_read_is_unsupported(tmp_path: Path) -> None:
    path = write_mirax(tmp_path / "a.mrxs", position_pixels(512, 512))
    ini = tmp_path / "a" / "Slidedat.ini"
    ini.write_text(ini.read_text().replace("IMAGE_FORMAT = PNG", "IMAGE_FORMAT = JPEGXR"))
    error = refused(path)
    assert error.code == ErrorCode.UNSUPPORTED_FORMAT
    assert "with IMAGE_FORMAT = JPEGXR" in error.message and "convert it" in error.message


CUT: dict[str, tuple[Callable[[Path], Path], str, int]] = {  # writer, which file is cut, bytes that stay
    "MIRAX": (lambda folder: write_mirax(folder / "support.mrxs", position_pixels(512, 512)), "support/Index.dat", 20),
    "Hamamatsu VMS": (
        lambda folder: write_vms(folder / "support.vms", position_pixels(WIDTH, HEIGHT)),
        "support-0.jpg",
        150,
    ),
    "DICOM": (
        lambda folder: write_dicom(folder / "support", position_pixels(256, 256)),
        "support/series1-level1.dcm",
        400,
    ),
    "Zeiss CZI": (lambda folder: write_czi(folder / "support.czi", position_pixels(200, 100)), "support.czi", 900),
}


def test_a_czi_whose_directory_is_overwritten_is_damaged(tmp_path: Path) -> None:
    path = write_czi(tmp_path / "a.czi", position_pixels(200, 100))
    content = path.read_bytes()
    at = content.index(b"ZISRAWDIRECTORY") + 160
    path.write_bytes(content[:at] + b"\x55" * 40 + content[at + 40 :])
    assert refused(path).code == ErrorCode.HEADER_CORRUPT


@pytest.mark.parametrize("kind", CUT)
def test_a_slide_that_is_cut_short_is_damaged_whatever_word_openslide_uses(tmp_path: Path, kind: str) -> None:
    """Its message has the file's name, in which any word may stand."""
    write, name, rest = CUT[kind]
    path = write(tmp_path)
    (tmp_path / name).write_bytes((tmp_path / name).read_bytes()[:rest])
    error = refused(path)
    assert error.code == ErrorCode.HEADER_CORRUPT, error
    assert "upload it again, with all of its files; if it is whole, convert it" in error.message


def test_a_missing_companion_is_named(slides: dict[str, Path], tmp_path: Path) -> None:
    shutil.copytree(slides["Hamamatsu VMS"].parent, tmp_path / "copy")
    (tmp_path / "copy" / "b-1.jpg").unlink()
    error = refused(tmp_path / "copy" / "b.vms")
    assert error.code == ErrorCode.HEADER_CORRUPT
    assert "b-1.jpg" in error.message
    assert "with all of its files" in error.message


def test_a_message_names_the_slide_and_not_its_copy(slides: dict[str, Path], memory: Any, staging: Path) -> None:
    memory.put(str(slides["Hamamatsu VMS"].parent) + "/", "/bucket/", recursive=True)
    memory.rm("/bucket/b-1.jpg")
    error = refused("memory://bucket/b.vms")
    assert error.message.startswith("memory://bucket/b.vms: ")
    assert "b-1.jpg" in error.message
    assert str(staging) not in error.message


def test_damage_in_one_place_spoils_no_other(tmp_path: Path) -> None:
    path = write_mirax(tmp_path / "a.mrxs", position_pixels(512, 512))
    data = tmp_path / "a" / "Data0000.dat"
    content = bytearray(data.read_bytes())
    content[64:200] = bytes(136)  # in the first image
    data.write_bytes(content)
    with opened(path) as slide:
        with pytest.raises(SlideError) as caught:
            list(slide.read_tiles([(0, 0)], 64))
        assert caught.value.code == ErrorCode.TILE_DATA_CORRUPT
        assert f"{path}: the region at x=0, y=0" in caught.value.message
        [(_, tile)] = slide.read_tiles([(256, 256)], 64)
    np.testing.assert_array_equal(tile, position_pixels(512, 512)[256:320, 256:320])


def test_a_size_that_no_scanner_makes_is_refused(tmp_path: Path) -> None:
    path = write_mirax(tmp_path / "a.mrxs", position_pixels(512, 512))
    ini = tmp_path / "a" / "Slidedat.ini"
    ini.write_text(ini.read_text().replace("IMAGENUMBER_X = 4", "IMAGENUMBER_X = 40000"))
    assert refused(path).code == ErrorCode.SIZE_IMPLAUSIBLE


@pytest.mark.parametrize(("mpp", "expected"), [(0.25, 0.25), (352.8, None), (0.0, None)])
def test_an_implausible_spacing_is_unknown(tmp_path: Path, mpp: float, expected: float | None) -> None:
    path = write_mirax(tmp_path / "a.mrxs", position_pixels(512, 512), mpp=mpp)
    with opened(path) as slide:
        assert (slide.mpp_x, slide.mpp_y) == (expected, expected)


@pytest.mark.parametrize("kind", MAKERS)
def test_a_remote_slide_reads_as_the_local_one(slides: dict[str, Path], memory: Any, kind: str) -> None:
    memory.put(str(slides["MIRAX"].parent) + "/", "/bucket/slides/", recursive=True)
    path = slides[kind]
    uri = f"memory://bucket/slides/{path.relative_to(slides['MIRAX'].parent)}"
    with opened(uri) as remote, opened(path) as local:
        assert remote.levels == local.levels
        np.testing.assert_array_equal(remote.downsampled(16), local.downsampled(16))
        assert remote.traffic.bytes >= path.stat().st_size
        assert local.traffic.bytes == 0


def test_a_jpeg_in_a_store_without_a_mirax_folder_is_no_slide(memory: Any, slides: dict[str, Path]) -> None:
    memory.pipe("/bucket/a.mrxs", slides["MIRAX"].read_bytes())
    error = refused("memory://bucket/a.mrxs")
    assert error.code == ErrorCode.NOT_A_SLIDE
    assert "memory://bucket/a.mrxs is a JPEG image" in error.message
