"""A bad slide is a SlideError with a code, the file and a remedy: never another exception, wrong pixels or much memory."""

import pickle
import resource
import subprocess
import sys
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile

from tests.slides.damage import BAD_SLIDES
from tests.slides.make import Pixels, write_slide
from tests.slides.oracle import kept_tiles
from udfs.wsi import ErrorCode, SlideError, open_slide

CODES = {
    "missing": ErrorCode.FILE_MISSING,
    "zero_bytes": ErrorCode.FILE_EMPTY,
    "truncated": ErrorCode.FILE_TRUNCATED,
    "truncated_directory": ErrorCode.FILE_TRUNCATED,
    "flipped_header": ErrorCode.NOT_A_SLIDE,
    "flipped_tile_data": ErrorCode.TILE_DATA_CORRUPT,
    "text_as_svs": ErrorCode.NOT_A_SLIDE,
    "jpeg_as_tif": ErrorCode.NOT_A_SLIDE,
    "bad_directory_entry": ErrorCode.HEADER_CORRUPT,
    "sixteen_bit": ErrorCode.UNSUPPORTED_FORMAT,
    "huge_header": ErrorCode.SIZE_IMPLAUSIBLE,
}
REMEDIES = ("upload", "scan", "convert", "check", "export")
LAYOUTS: dict[str, dict[str, Any]] = {
    "jpeg": {"pyramid": True, "levels": (4,)},
    "lzw": {"compression": "lzw", "predictor": True, "pyramid": True, "levels": (4,), "subifds": True},
    "deflate strips": {"compression": "deflate", "tile_px": None},
    "uncompressed": {"compression": "none", "planar": True},
    "jpeg2000": {"compression": "jpeg2000"},
    "bigtiff": {"compression": "none", "tile_px": None, "bigtiff": True},
}
VARIANTS = 40  # of each layout, half with damage in the directories and half in the pixels
MUCH_BYTES = 800e6


def read_all(path: Path, factor: int = 16, tile_px: int = 448) -> tuple[Pixels, list[Pixels]]:
    with open_slide(str(path)) as slide:
        small = slide.downsampled(factor)
        assert small.shape == (slide.height_px // factor, slide.width_px // factor, 3)
        steps = range(0, 5 * tile_px, tile_px)
        corners = [(x, y) for y in steps for x in steps if x < slide.width_px and y < slide.height_px]
        tiles = dict(slide.read_tiles(corners, tile_px))
    assert sorted(tiles) == list(range(len(corners)))
    return small, [tiles[i] for i in range(len(corners))]


@pytest.fixture(scope="module")
def good(pixels: Pixels, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_slide(tmp_path_factory.mktemp("good") / "good.tif", pixels[1536:2944, 800:1760], pyramid=True)


def test_every_kind_of_bad_slide_has_its_code() -> None:
    assert set(CODES) == set(BAD_SLIDES) - {"no_tissue"}


@pytest.mark.parametrize("kind", CODES)
def test_a_bad_slide_says_what_is_wrong_where_and_what_to_do(good: Path, tmp_path: Path, kind: str) -> None:
    path = BAD_SLIDES[kind](good, tmp_path, "patient_7")
    with pytest.raises(SlideError) as caught:
        read_all(path)
    assert caught.value.code is CODES[kind]
    assert str(path) in caught.value.message
    assert any(remedy in caught.value.message for remedy in REMEDIES)
    assert "\n" not in str(caught.value)


def test_damaged_tiles_are_an_error_in_those_tiles_alone(good: Path, tmp_path: Path, pixels: Pixels) -> None:
    path = BAD_SLIDES["flipped_tile_data"](good, tmp_path, "damaged")
    found = {"whole": 0, "damaged": 0}
    with open_slide(str(path)) as slide, open_slide(str(good)) as whole:
        slide.downsampled(16)  # from 1/4, which is whole
        for corner in kept_tiles(pixels[1536:2944, 800:1760]):
            [(_, expected)] = whole.read_tiles([corner])
            try:
                [(_, tile)] = slide.read_tiles([corner])
            except SlideError as error:
                assert "level-0 px" in error.message
                found["damaged"] += 1
            else:
                np.testing.assert_array_equal(tile, expected)
                found["whole"] += 1
    assert found["damaged"] >= 1


def test_a_slide_of_glass_is_no_error(good: Path, tmp_path: Path) -> None:
    small, tiles = read_all(BAD_SLIDES["no_tissue"](good, tmp_path, "glass"))
    assert small.min() > 190
    assert len(tiles) == 20


def test_a_folder_is_no_slide(tmp_path: Path) -> None:
    with pytest.raises(SlideError, match="folder") as caught:
        open_slide(str(tmp_path))
    assert caught.value.code is ErrorCode.NOT_A_SLIDE


def test_an_unknown_protocol_names_it() -> None:
    with pytest.raises(SlideError, match="protocol") as caught:
        open_slide("nosuch://bucket/slide.svs")
    assert caught.value.code is ErrorCode.READ_FAILED


def test_a_slide_error_survives_the_way_back_from_a_worker() -> None:
    error = SlideError(ErrorCode.TILE_DATA_CORRUPT, "a.svs: the block at x=1, y=2")
    again = pickle.loads(pickle.dumps(error))
    assert (type(again), again.code, again.message, str(again)) == (SlideError, error.code, error.message, str(error))


def directory_bytes(path: Path) -> list[int]:
    """Where the header, the directories' entries and what they point at lie."""
    found = set(range(16))
    with tifffile.TiffFile(path) as tiff:
        for page in [*tiff.pages, *(tiff.pages.first.pages or [])]:
            found.update(range(page.offset, page.offset + 8))
            for tag in page.tags:
                found.update(range(tag.offset, tag.offset + (20 if tiff.is_bigtiff else 12)))
                found.update(range(tag.valueoffset, tag.valueoffset + min(tag.valuebytecount, 64)))
    return sorted(place for place in found if place < path.stat().st_size)


def pixel_bytes(path: Path) -> list[int]:
    with tifffile.TiffFile(path) as tiff:
        page = tiff.pages.first
        # the beginnings of blocks too, where codecs keep headers of their own
        starts = [offset + i for offset in page.dataoffsets for i in range(64)]
        anywhere = [o + i for o, c in zip(page.dataoffsets, page.databytecounts, strict=True) for i in range(0, c, 37)]
    return starts + anywhere


@pytest.mark.parametrize("layout", LAYOUTS)
def test_whatever_bytes_are_flipped_nothing_but_a_slide_error_escapes(
    pixels: Pixels, tmp_path: Path, layout: str
) -> None:
    good = write_slide(tmp_path / "good.tif", pixels[1700:1892, 1000:1160], **({"tile_px": 64} | LAYOUTS[layout]))
    content, outcomes = good.read_bytes(), {"error": 0, "read": 0}
    random = np.random.default_rng(len(layout))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    tracemalloc.start()
    try:
        for variant in range(VARIANTS):
            places = (directory_bytes if variant % 2 else pixel_bytes)(good)
            damaged = bytearray(content)
            for place in random.choice(places, random.integers(1, 5)):
                damaged[place] ^= int(random.integers(1, 256))
            path = tmp_path / f"{variant}.tif"
            path.write_bytes(damaged)
            try:
                read_all(path, 4, 64)
                outcomes["read"] += 1
            except SlideError as error:
                assert error.code is not ErrorCode.INTERNAL_ERROR
                assert str(path) in error.message
                outcomes["error"] += 1
            assert tracemalloc.get_traced_memory()[1] < MUCH_BYTES, f"variant {variant}"
    finally:
        tracemalloc.stop()
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < MUCH_BYTES / 1024
    assert outcomes["error"] >= VARIANTS // 8


def test_a_codestream_that_claims_more_than_its_block_is_refused_before_it_is_decoded(
    pixels: Pixels, tmp_path: Path
) -> None:
    good = write_slide(tmp_path / "good.tif", pixels[1700:1956, 1000:1256], compression="jpeg2000")
    content = bytearray(good.read_bytes())
    size = content.index(b"\xff\x4f\xff\x51") + 8
    content[size : size + 8] = (60_000).to_bytes(4, "big") * 2  # 10 GB
    good.write_bytes(content)
    with pytest.raises(SlideError, match="60000 x 60000") as caught:
        read_all(good, 16, 256)
    assert caught.value.code is ErrorCode.TILE_DATA_CORRUPT


@pytest.mark.parametrize("tag", ["ImageWidth", "RowsPerStrip"])
def test_a_negative_size_is_a_damaged_header(pixels: Pixels, tmp_path: Path, tag: str) -> None:
    path = write_slide(tmp_path / "slide.tif", pixels[:64, :96], compression="deflate", tile_px=None)
    with tifffile.TiffFile(path) as tiff:
        at = tiff.pages.first.tags[tag].offset
    content = bytearray(path.read_bytes())
    content[at + 2 : at + 4] = (9).to_bytes(2, "little")  # signed
    content[at + 4 : at + 12] = (1).to_bytes(4, "little") + (-96).to_bytes(4, "little", signed=True)
    path.write_bytes(content)
    with pytest.raises(SlideError) as caught:
        read_all(path)
    assert caught.value.code is ErrorCode.HEADER_CORRUPT


def test_a_damaged_jpeg_is_never_patched_with_grey(pixels: Pixels, tmp_path: Path) -> None:
    """Libjpeg fills what it lacks with grey and a warning: here a cut stream is an error."""
    good = write_slide(tmp_path / "good.tif", pixels[1700:1956, 1000:1256])
    with tifffile.TiffFile(good) as tiff:
        offset, count = tiff.pages.first.dataoffsets[0], tiff.pages.first.databytecounts[0]
    content = bytearray(good.read_bytes())
    content[offset + count // 2 : offset + count] = bytes(count - count // 2)
    good.write_bytes(content)
    with pytest.raises(SlideError) as caught:
        read_all(good, 16, 256)
    assert caught.value.code is ErrorCode.TILE_DATA_CORRUPT


def test_a_damaged_lzw_block_does_not_kill_the_process(tmp_path: Path) -> None:
    """Its third code is far beyond the table. Read in a process of its own, which must end by itself."""
    path = write_slide(tmp_path / "slide.tif", np.zeros((64, 64, 3), np.uint8), compression="lzw", tile_px=64)
    with tifffile.TiffFile(path) as tiff:
        offset = tiff.pages.first.dataoffsets[0]
    content = bytearray(path.read_bytes())
    content[offset : offset + 4] = bytes.fromhex("8057df8f")
    path.write_bytes(content)
    program = "import sys; from udfs.wsi import open_slide; list(open_slide(sys.argv[1]).read_tiles([(0, 0)], 64))"
    root = Path(__file__).parents[2]
    done = subprocess.run(
        [sys.executable, "-c", program, str(path)], cwd=root, capture_output=True, text=True, check=False
    )
    assert done.returncode == 1, f"ended by signal {-done.returncode}"
    assert "SlideError: tile_data_corrupt" in done.stderr
