"""Hamamatsu NDPI: one JPEG a level, of which a tile fetches just the restart intervals that it needs; held against OpenSlide."""

from pathlib import Path
from typing import Any

import numpy as np
import openslide
import pytest
import tifffile

from tests.slides.make import Pixels
from tests.slides.ndpi import MACRO, MAP, NdpiImage, write_ndpi
from tests.slides.oracle import area_average, on_white
from udfs.wsi import ErrorCode, SlideError, open_slide
from udfs.wsi.reading.slide import Slide

WIDTH, HEIGHT, LENS = 1280, 1024, 20.0
JPEG_XR = 22610


@pytest.fixture(scope="module")
def tissue(pixels: Pixels) -> Pixels:
    return pixels[1408 : 1408 + HEIGHT, 768 : 768 + WIDTH]


def directories(tissue: Pixels, **level_0: Any) -> list[NdpiImage]:
    """As scanners write them: levels by their lens, the smallest without markers, then macro and map."""
    return [
        NdpiImage(tissue, LENS, **level_0),
        NdpiImage(area_average(tissue, 4), LENS / 4),
        NdpiImage(area_average(tissue, 16), LENS / 16, restart_px=None),
        NdpiImage(tissue[:300, :700], MACRO, restart_px=None),
        NdpiImage(area_average(tissue, 8), MAP, restart_px=None),
    ]


@pytest.fixture(scope="module")
def slide_path(tissue: Pixels, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_ndpi(tmp_path_factory.mktemp("ndpi") / "slide.ndpi", directories(tissue))


def assert_like_openslide(path: Path, downsamples: tuple[int, ...] = (1, 4, 16)) -> None:
    """All of the slide and beyond its borders, in tiles that cross restart intervals."""
    edge = 100
    with open_slide(str(path)) as slide, openslide.OpenSlide(str(path)) as reference:
        assert tuple(level.downsample for level in slide.levels) == downsamples
        for level, downsample in enumerate(downsamples):
            # OpenSlide makes levels of its own between those that are stored
            theirs = reference.level_downsamples.index(downsample)
            span = edge * downsample
            corners = [(x, y) for y in range(0, HEIGHT, span) for x in range(0, WIDTH, span)]
            corners += [(-48, -48), (WIDTH - 16, HEIGHT - 16)]
            tiles = dict(slide.read_tiles(corners, edge, level))
            assert sorted(tiles) == list(range(len(corners)))
            for i, corner in enumerate(corners):
                expected = on_white(np.asarray(reference.read_region(corner, theirs, (edge, edge))))
                np.testing.assert_array_equal(tiles[i], expected, err_msg=f"1/{downsample} at {corner}")


def test_header(slide_path: Path) -> None:
    assert openslide.OpenSlide.detect_format(str(slide_path)) == "hamamatsu"
    with open_slide(str(slide_path)) as slide:
        assert (slide.vendor, slide.width_px, slide.height_px) == ("hamamatsu", WIDTH, HEIGHT)
        assert slide.mpp_x == pytest.approx(0.5)


@pytest.mark.parametrize("subsampling", ["4:4:4", "4:2:2"])  # OpenSlide does not decode intervals of 4:2:0
def test_tiles_of_every_level_are_openslides(tissue: Pixels, tmp_path: Path, subsampling: str) -> None:
    assert_like_openslide(write_ndpi(tmp_path / "slide.ndpi", directories(tissue), subsampling=subsampling))


def test_a_slide_beyond_4_gib(tissue: Pixels, tmp_path: Path) -> None:
    """Every offset then needs its upper half. The file's name does not say what it is."""
    path = write_ndpi(tmp_path / "slide.tif", directories(tissue), hole=2**32)
    assert path.stat().st_size > 2**32
    assert_like_openslide(path)


def test_a_tile_fetches_the_restart_intervals_that_it_needs(slide_path: Path, tissue: Pixels) -> None:
    with open_slide(str(slide_path)) as slide:
        assert isinstance(slide, Slide)
        starts, counts = slide.levels[0].byte_ranges(range(slide.levels[0].columns * slide.levels[0].rows))
        before = slide.traffic.bytes
        list(slide.read_tiles([(WIDTH - 64, HEIGHT - 64)], 64))
        fetched = slide.traffic.bytes - before
    intervals = counts.reshape(HEIGHT // 8, WIDTH // 64)[-8:, -1].sum()
    assert intervals <= fetched <= 1.1 * intervals
    assert fetched < 0.02 * (starts + counts).max()


def test_downsampled_is_the_area_average(slide_path: Path, tissue: Pixels) -> None:
    with open_slide(str(slide_path)) as slide:
        difference = np.abs(slide.downsampled(16).astype(int) - area_average(tissue, 16))
    assert difference.max() <= 8  # of JPEG's quality, at two levels
    assert difference.mean() < 1


@pytest.mark.parametrize("level_0", [{"has_starts": False}, {"restart_px": None}, {"restart_px": 192}], ids=str)
def test_a_level_without_intervals_that_fill_rows_decodes_whole(
    tissue: Pixels, tmp_path: Path, level_0: dict[str, Any]
) -> None:
    """Not listed, not there, or running on over the end of a row, which OpenSlide refuses: so tifffile is the reference."""
    path = write_ndpi(tmp_path / "slide.ndpi", directories(tissue, **level_0))
    with open_slide(str(path)) as slide:
        assert [level.downsample for level in slide.levels] == [1, 4, 16]
        [(_, tile)] = slide.read_tiles([(600, 300)], 300)
    np.testing.assert_array_equal(tile, tifffile.imread(path, key=0)[300:600, 600:900])


def test_other_focal_planes_are_no_levels(tissue: Pixels, tmp_path: Path) -> None:
    planes = [
        NdpiImage(image.pixels if plane == 0 else image.pixels[::-1], image.lens, focal_plane=plane)
        for image in directories(tissue)[:2]
        for plane in (-1000, 0, 1000)
    ]
    assert_like_openslide(write_ndpi(tmp_path / "slide.ndpi", planes), (1, 4))


def test_a_level_too_large_to_decode_whole_says_so(tmp_path: Path) -> None:
    glass = np.full((4500, 21000, 3), 240, np.uint8)
    path = write_ndpi(tmp_path / "slide.ndpi", [NdpiImage(glass, LENS, restart_px=None)])
    with pytest.raises(SlideError) as caught:
        open_slide(str(path))
    assert caught.value.code is ErrorCode.UNSUPPORTED_FORMAT
    for said in (str(path), "hamamatsu", "JPEG", "21000 x 4500", "vips"):
        assert said in caught.value.message


def test_jpeg_xr_is_named(tissue: Pixels, tmp_path: Path) -> None:
    path = write_ndpi(tmp_path / "slide.ndpi", directories(tissue), compression=JPEG_XR)
    with pytest.raises(SlideError) as caught:
        open_slide(str(path))
    assert caught.value.code is ErrorCode.UNSUPPORTED_FORMAT
    for said in ("hamamatsu", "its compression is JPEGXR", "convert"):
        assert said in caught.value.message
