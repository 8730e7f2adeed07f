"""The slide at 1/factor: an area average, held against libvips and NumPy, and against OpenSlide on pyramids."""

import tracemalloc
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import openslide
import pytest
import pyvips
import tifffile
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.slides.make import Pixels, position_pixels, write_mosaic, write_slide
from tests.slides.oracle import area_average, on_white
from udfs.wsi import open_slide
from udfs.wsi.reading.averaging import AreaAverage


def downsampled(path: Path, factor: int = 16) -> Pixels:
    with open_slide(str(path)) as slide:
        return slide.downsampled(factor)


def mean_of_squares(image: Pixels, factor: int) -> Any:
    """By NumPy alone, unrounded."""
    height, width = image.shape[0] // factor, image.shape[1] // factor
    squares = image[: height * factor, : width * factor].reshape(height, factor, width, factor, 3)
    return squares.mean(axis=(1, 3))


def vips_shrink(image: Pixels, factor: int) -> Pixels:
    height, width = (size // factor * factor for size in image.shape[:2])
    shrunk = pyvips.Image.new_from_array(image[:height, :width]).shrink(factor, factor)
    pixels: Pixels = shrunk.numpy()
    return pixels


def noise(width: int, height: int) -> Pixels:
    return np.random.default_rng(width * 1000 + height).integers(0, 256, (height, width, 3), np.uint8)


@settings(derandomize=True, deadline=None, max_examples=60)
@given(
    width=st.integers(16, 300),
    height=st.integers(16, 300),
    tile_px=st.sampled_from([None, 16, 48, 64, 256]),
    rows_per_strip=st.integers(1, 70),
    compression=st.sampled_from(["none", "deflate"]),
    factor=st.integers(1, 40),
)
def test_flat_slides_of_any_size_and_block_are_averaged_exactly(
    width: int, height: int, tile_px: int | None, rows_per_strip: int, compression: str, factor: int
) -> None:
    image = noise(width, height)
    with TemporaryDirectory() as folder:
        path = Path(folder) / "slide.tif"
        write_slide(path, image, tile_px=tile_px, rows_per_strip=rows_per_strip, compression=compression)
        found = downsampled(path, factor)
    assert found.shape == (height // factor, width // factor, 3)
    np.testing.assert_array_equal(found, np.floor(mean_of_squares(image, factor) + 0.5))


@pytest.mark.parametrize(("width", "height"), [(16, 16), (449, 447), (1000, 17), (255, 771)])
@pytest.mark.parametrize("tile_px", [None, 64, 256])
def test_flat_slides_agree_with_libvips(tmp_path: Path, width: int, height: int, tile_px: int | None) -> None:
    image = noise(width, height)
    path = write_slide(tmp_path / "slide.tif", image, compression="lzw", tile_px=tile_px)
    difference = downsampled(path).astype(int) - vips_shrink(image, 16)
    assert np.abs(difference).max() <= 1


@pytest.mark.parametrize(
    ("levels", "factor", "read"),
    [((4, 16), 16, 1), ((2, 4, 8), 16, 3), ((4, 16, 32), 32, 2), ((16,), 16, 0), ((3,), 16, 0), ((4, 16), 2, 0)],
)
@pytest.mark.parametrize("compression", ["jpeg", "deflate"])
def test_pyramids_are_averaged_from_the_nearest_finer_level_that_fits(
    pixels: Pixels, tmp_path: Path, levels: tuple[int, ...], factor: int, read: int, compression: str
) -> None:
    image = pixels[1500:2309, 801:1408]
    path = write_slide(tmp_path / "slide.tif", image, compression=compression, pyramid=True, levels=levels)
    with openslide.OpenSlide(str(path)) as slide:
        stored = on_white(np.asarray(slide.read_region((0, 0), read, slide.level_dimensions[read])))
    edge = factor // (1, *levels)[read]
    assert_averages(downsampled(path, factor), stored, edge, exact=compression != "jpeg" or edge % 8 > 0)


def assert_averages(found: Pixels, stored: Pixels, edge: int, *, exact: bool) -> None:
    """Where whole JPEG units are averaged their means are taken as stored: within a grey level in the mean, else equal."""
    expected = area_average(stored, edge)[: found.shape[0], : found.shape[1]]
    difference = np.abs(found.astype(int) - expected)
    if exact:
        assert not difference.any()
    assert difference.mean() < 0.5
    assert difference.max() <= 3


def test_the_sample_agrees_with_libvips_and_openslide(sample: Path) -> None:
    with openslide.OpenSlide(str(sample)) as slide:
        image = on_white(np.asarray(slide.read_region((0, 0), 0, slide.dimensions)))
    found = downsampled(sample)
    assert found.shape == (185, 138, 3)
    assert_averages(found, image, 16, exact=False)
    assert np.abs(found.astype(int) - vips_shrink(image, 16)).mean() < 0.5


def test_each_place_stays_in_its_place(tmp_path: Path) -> None:
    image = position_pixels(1040, 720)
    path = write_slide(tmp_path / "slide.tif", image, compression="deflate", tile_px=None, rows_per_strip=50)
    np.testing.assert_allclose(downsampled(path, 8), mean_of_squares(image, 8), atol=0.5)


def test_alpha_is_on_white_before_it_is_averaged(tmp_path: Path) -> None:
    image = np.random.default_rng(3).integers(0, 256, (96, 80, 4), np.uint8)
    path = write_slide(tmp_path / "slide.tif", image, compression="deflate")
    np.testing.assert_array_equal(downsampled(path), area_average(on_white(image), 16))


def test_a_slide_smaller_than_a_pixel_of_the_result_gives_none(tmp_path: Path) -> None:
    path = write_slide(tmp_path / "slide.tif", noise(15, 40), compression="none")
    assert downsampled(path).shape == (2, 0, 3)


def test_memory_does_not_grow_with_the_slide(pixels: Pixels, tmp_path: Path) -> None:
    """A row of 24,000 px in 256 px blocks is 18 MB, the slide 290 MB."""
    path = write_mosaic(tmp_path / "slide.tif", pixels[1408:1920, 768:1280], width=24_000, height=4_032, pyramid=False)
    tracemalloc.start()
    found = downsampled(path)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert found.shape == (252, 1500, 3)
    assert peak < 60e6


def test_a_level_that_was_cut_short_does_not_darken_the_edge(tmp_path: Path) -> None:
    image = np.full((640, 1600, 3), 240, np.uint8)
    path = tmp_path / "slide.tif"
    with tifffile.TiffWriter(path) as writer:
        kind: dict[str, Any] = {"photometric": "rgb", "tile": (64, 64), "metadata": None}
        writer.write(image, **kind)
        writer.write(image[:160, :399], subfiletype=1, **kind)
    with open_slide(str(path)) as slide:
        assert [level.downsample for level in slide.levels] == [1, 4]
        assert (slide.downsampled(16) == 240).all()


@pytest.mark.parametrize("edge", [4100, 4101, 4104, 4105])
def test_sums_of_the_largest_squares_are_rounded_without_overflow(edge: int) -> None:
    """255 x edge^2 fits 32 bits up to edge 4104; with half of edge^2 up to edge 4100."""
    result = np.zeros((1, 2, 3), np.uint8)
    average = AreaAverage(result, edge)
    rows = np.full((edge, 300, 3), 254, np.uint8)
    average.add(rows, 0, edge)
    average.flush(edge)
    grey = (255 * (edge - 300) + 254 * 300) / edge
    assert result[0, :, 0].tolist() == [255, int(grey + 0.5)]
