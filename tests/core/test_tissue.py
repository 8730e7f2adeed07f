"""Which tiles are kept: held against an oracle that reads with OpenSlide and counts by brute force."""

import dataclasses
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import openslide
import pytest
import tifffile
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from tests.slides import oracle
from tests.slides.demo import COHORT
from tests.slides.make import Pixels, write_slide
from tests.slides.oracle import area_average, on_white
from udfs.wsi import open_slide
from udfs.wsi.tissue.brightness import Brightness
from udfs.wsi.tissue.grid import mask_fractions, tile_grid
from udfs.wsi.tissue.method import tissue_methods

KEPT_OF_SAMPLE = [[896, 896], [896, 1344], [896, 1792], [896, 2240], [1344, 2240]]
READABLE = [slide.name for slide in COHORT if slide.name != "005_1.tif"]  # that one is cut half-way


def kept(path: Path, tile_px: int = 448, max_background: float = 0.10) -> Any:
    """As the slides job finds them: corners of kept tiles, and of all."""
    with open_slide(str(path)) as slide:
        mask = Brightness().background(slide.downsampled(16))
        grid = tile_grid(slide.width_px, slide.height_px, tile_px)
    return grid[mask_fractions(mask, grid, tile_px) <= max_background].tolist(), grid.tolist()


def kept_at(at_1_16: Pixels, width: int, height: int, tile_px: int = 448) -> list[list[int]]:
    """By a loop over the image at 1/16."""
    edge, found = tile_px // 16, []
    for y in range(0, height - tile_px + 1, tile_px):
        for x in range(0, width - tile_px + 1, tile_px):
            square = at_1_16[y // 16 : y // 16 + edge, x // 16 : x // 16 + edge]
            if (square > 190).all(axis=2).mean() <= 0.10:
                found.append([x, y])
    return found


def opened(path: Path) -> openslide.OpenSlide | None:
    """By OpenSlide; None where it does not read the file, or not all of its levels (those in SubIFDs)."""
    try:
        slide = openslide.OpenSlide(str(path))
    except openslide.OpenSlideError:
        return None
    with tifffile.TiffFile(path) as tiff:
        return slide if slide.level_count == len(tiff.series[0].levels) else None


def averaged_from_nearest_finer(path: Path) -> tuple[Pixels, tuple[int, int]]:
    """(the image at 1/16 from the coarsest finer level, size of level 0), by OpenSlide, else by tifffile."""
    if slide := opened(path):
        level = max(i for i, downsample in enumerate(slide.level_downsamples) if downsample < 15.5)
        downsample, (width, height) = round(slide.level_downsamples[level]), slide.level_dimensions[level]
        bands = []
        for y in range(0, height, 1024):  # a whole slide would be gigabytes here
            read = np.asarray(slide.read_region((0, y * downsample), level, (width, min(1024, height - y))))
            rgb = read[..., :3] if (read[..., 3] == 255).all() else on_white(read)
            bands.append(area_average(rgb, 16 // downsample))
        return np.concatenate(bands), slide.dimensions
    with tifffile.TiffFile(path) as tiff:
        levels = tiff.series[0].levels
        height, width = levels[0].shape[:2]
        nearest = [level for level in levels if width / level.shape[1] < 15.5][-1]
        downsample = round(width / nearest.shape[1])
        return area_average(on_white(nearest.asarray()), 16 // downsample), (width, height)


def test_five_of_twenty_four_tiles_of_the_sample_are_tissue(sample: Path) -> None:
    found, grid = kept(sample)
    assert len(grid) == 24
    assert found == KEPT_OF_SAMPLE
    pixels, size = averaged_from_nearest_finer(sample)
    assert found == kept_at(pixels, *size)


@pytest.mark.parametrize("name", READABLE)
def test_kept_tiles_of_the_demo_are_the_oracles(demo_cohort: Path, name: str) -> None:
    """The oracle reads the nearest finer level, as slidelake does: 1/4 where there is a pyramid, else level 0."""
    path = demo_cohort / "slides" / name
    pixels, size = averaged_from_nearest_finer(path)
    found, _ = kept(path)
    assert found == kept_at(pixels, *size)
    assert bool(found) == (name != "004_2.tif")


def blotches(width: int, height: int, seed: int) -> Pixels:
    """Glass with dark rectangles, and brightness near the threshold, so that tiles fall on both sides."""
    random = np.random.default_rng(seed)
    image = random.integers(186, 200, (height, width, 3), np.uint8)
    for _ in range(int(random.integers(0, 12))):
        x, y = int(random.integers(0, width)), int(random.integers(0, height))
        w, h = int(random.integers(1, width + 1)), int(random.integers(1, height + 1))
        image[y : y + h, x : x + w] = random.integers(0, 256, 3)
    return image


@settings(derandomize=True, deadline=None, max_examples=60)
@given(
    width=st.integers(16, 420),
    height=st.integers(16, 420),
    seed=st.integers(0, 2**16),
    tile_px=st.sampled_from([16, 32, 64, 112]),
    channels=st.sampled_from([1, 3, 4]),
)
def test_kept_tiles_of_generated_slides_are_the_oracles(
    width: int, height: int, seed: int, tile_px: int, channels: int
) -> None:
    image = blotches(width, height, seed)
    image = np.dstack([image, image[..., :1]])[..., :channels]
    with TemporaryDirectory() as folder:
        path = write_slide(Path(folder) / "slide.tif", image, compression="deflate", tile_px=64)
        found, grid = kept(path, tile_px)
    assert len(grid) == (width // tile_px) * (height // tile_px)
    assert found == oracle.kept_tiles(image, tile_px=tile_px).tolist()


@given(
    pixel=st.tuples(*[st.integers(0, 255)] * 3),
    brightness=st.integers(0, 255),
)
@settings(derandomize=True, deadline=None, max_examples=100)
def test_background_is_where_all_three_colours_are_above(pixel: tuple[int, int, int], brightness: int) -> None:
    mask = Brightness(brightness).background(np.array([[pixel]], np.uint8))
    assert mask.tolist() == [[all(value > brightness for value in pixel)]]


def test_no_two_methods_have_a_setting_of_the_same_name() -> None:
    names = [setting.name for method in tissue_methods().values() for setting in dataclasses.fields(method)]
    assert names and len(names) == len({*names, "method"}) - 1


@settings(derandomize=True, deadline=None, max_examples=80)
@given(width=st.integers(1, 5000), height=st.integers(1, 5000), span=st.floats(16, 2000))
def test_the_grid_covers_all_whole_tiles_and_no_part_ones(width: int, height: int, span: float) -> None:
    grid = tile_grid(width, height, span)
    columns, rows = int(width / span), int(height / span)
    assert grid.tolist() == [[int(i * span), int(j * span)] for j in range(rows) for i in range(columns)]
    if len(grid):
        assert (grid >= 0).all()
        assert (grid + span <= (width, height)).all()
        assert (grid.max(axis=0) + 2 * span + 1 > (width, height)).all()


def by_supersampling(
    mask: NDArray[np.bool_], x: float, y: float, span: float, downsample: int, steps: int = 400
) -> float:
    """Points on a fine raster within the tile, those outside the mask left out."""
    at_x, at_y = ((low + (np.arange(steps) + 0.5) / steps * span) / downsample for low in (x, y))
    columns, rows = at_x[at_x < mask.shape[1]].astype(int), at_y[at_y < mask.shape[0]].astype(int)
    return float(mask[np.ix_(rows, columns)].mean())


@settings(derandomize=True, deadline=None, max_examples=40)
@given(
    seed=st.integers(0, 2**16),
    span=st.floats(20, 300),
    downsample=st.sampled_from([1, 4, 16, 32]),
    rest=st.integers(0, 31),
)
def test_fractions_of_tiles_between_mask_pixels_are_areas(seed: int, span: float, downsample: int, rest: int) -> None:
    random = np.random.default_rng(seed)
    mask = random.random((400 // downsample, 600 // downsample)) < random.random()
    width, height = (size * downsample + rest % downsample for size in (mask.shape[1], mask.shape[0]))
    grid = tile_grid(width, height, span)[:6]
    found = mask_fractions(mask, grid, span, downsample)
    for (x, y), fraction in zip(grid.tolist(), found, strict=True):
        assert fraction == pytest.approx(by_supersampling(mask, x, y, span, downsample), abs=0.02)


def test_tiles_on_whole_mask_pixels_are_counted_exactly() -> None:
    mask = np.zeros((28, 56), np.bool_)
    mask[:, :28] = np.arange(784).reshape(28, 28) < 78  # 0.0995, kept; one more is 0.1008
    mask[:, 28:] = np.arange(784).reshape(28, 28) < 79
    fractions = mask_fractions(mask, tile_grid(896, 448, 448), 448)
    assert fractions.tolist() == [78 / 784, 79 / 784]


def test_a_slide_without_a_mask_pixel_is_background() -> None:
    mask = np.zeros((0, 0), np.bool_)
    assert mask_fractions(mask, np.zeros((1, 2), np.int32), 10.0).tolist() == [1.0]


def test_a_tile_wholly_outside_the_mask_is_background() -> None:
    outside = np.array([[128, 0], [0, 128], [128, 128], [127, 127]], np.int32)
    assert mask_fractions(np.zeros((2, 2), bool), outside, 16, 64).tolist() == [1, 1, 1, 0]
