"""Which level is read for a target spacing, and how what is read becomes a tile."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from tests.slides.make import Pixels, position_pixels, write_slide
from udfs.wsi import ErrorCode, SlideError, open_slide
from udfs.wsi.reading.spacing import Reading, plan_reading, resample
from udfs.wsi.tissue.grid import tile_grid

LEVELS = [1.0, 4.0, 16.0]


def test_without_a_target_level_0_is_read_as_scanned() -> None:
    assert plan_reading(LEVELS, 448, None, None) == Reading(0, 1.0, 448, 448.0)
    assert plan_reading(LEVELS, 448, 0.25, None) == Reading(0, 1.0, 448, 448.0)


@pytest.mark.parametrize(
    ("slide_mpp", "target", "expected"),
    [
        (0.25, 0.25, Reading(0, 1.0, 448, 448.0)),
        (0.25, 0.5, Reading(0, 2.0, 896, 896.0)),
        (0.25, 1.0, Reading(1, 4.0, 448, 1792.0)),
        (0.25, 0.995, Reading(1, 3.98, 446, 448 * 3.98)),  # a level 0.5 % coarser serves
        (0.25, 0.98, Reading(0, 3.92, 1756, 448 * 3.92)),  # one 2 % coarser does not
        (0.25, 2.0, Reading(1, 8.0, 896, 3584.0)),
        (0.25, 100.0, Reading(2, 400.0, 11200, 179_200.0)),
        (0.52, 0.5, Reading(0, 0.5 / 0.52, 431, 448 * 0.5 / 0.52)),  # a slide 4 % coarser is enlarged
    ],
)
def test_the_coarsest_level_that_is_fine_enough_is_read(slide_mpp: float, target: float, expected: Reading) -> None:
    found = plan_reading(LEVELS, 448, slide_mpp, target)
    assert (found.level, found.region_px) == (expected.level, expected.region_px)
    assert (found.downsample, found.span_px) == pytest.approx((expected.downsample, expected.span_px))


@settings(derandomize=True, deadline=None, max_examples=100)
@given(slide_mpp=st.floats(0.1, 1), factor=st.floats(0.96, 40), tile_px=st.integers(16, 1024))
def test_what_is_read_covers_what_a_tile_spans(slide_mpp: float, factor: float, tile_px: int) -> None:
    found = plan_reading(LEVELS, tile_px, slide_mpp, slide_mpp * factor)
    assert found.span_px == pytest.approx(tile_px * factor)
    assert abs(found.region_px * LEVELS[found.level] - found.span_px) <= LEVELS[found.level] / 2 + 1e-6
    assert found.region_px >= tile_px * min(factor, 0.99) - 1  # no level that lacks detail


def test_a_slide_of_unknown_spacing_is_told_of_the_csv() -> None:
    with pytest.raises(SlideError, match=r"0\.5 um/px .* CSV's mpp column") as caught:
        plan_reading(LEVELS, 448, None, 0.5)
    assert caught.value.code is ErrorCode.MPP_UNKNOWN


def test_a_slide_scanned_too_coarse_is_told_both_numbers_and_the_remedy() -> None:
    with pytest.raises(SlideError, match=r"0\.6 um/px, coarser than tiling\.mpp = 0\.5: raise tiling\.mpp") as caught:
        plan_reading(LEVELS, 448, 0.6, 0.5)
    assert caught.value.code is ErrorCode.MPP_TOO_COARSE


@pytest.mark.parametrize("shrink", [2, 3, 4])
def test_shrinking_by_a_whole_number_is_the_mean_of_squares(shrink: int) -> None:
    image = np.random.default_rng(shrink).integers(0, 256, (48 * shrink, 48 * shrink, 3), np.uint8)
    means = image.reshape(48, shrink, 48, shrink, 3).mean(axis=(1, 3))
    np.testing.assert_allclose(resample(image, 48), means, atol=1)  # Pillow rounds twice: rows, then columns


@pytest.mark.parametrize("edge", [40, 99, 100, 101, 130])
def test_other_sizes_are_pillows_box_and_bilinear(edge: int) -> None:
    image = np.random.default_rng(edge).integers(0, 256, (100, 100, 3), np.uint8)
    method = Image.Resampling.BOX if edge < 100 else Image.Resampling.BILINEAR
    np.testing.assert_array_equal(
        resample(image, edge), np.asarray(Image.fromarray(image).resize((edge, edge), method))
    )


def test_a_tile_at_a_target_spacing_shows_the_place_it_spans(tmp_path: Path) -> None:
    """Tile (1, 1) at three times the spacing is the mean of 3 x 3 pixels there, whichever level it came from."""
    image: Pixels = position_pixels(512, 512) // np.uint8(4)
    path = write_slide(tmp_path / "slide.tif", image, compression="deflate", pyramid=True, levels=(2,), mpp=0.25)
    with open_slide(str(path)) as slide:
        assert slide.mpp_x == pytest.approx(0.25)
        reading = plan_reading([level.downsample for level in slide.levels], 64, slide.mpp_x, 0.75)
        assert (reading.level, reading.region_px) == (1, 96)
        grid = tile_grid(slide.width_px, slide.height_px, reading.span_px)
        assert grid.tolist() == [[0, 0], [192, 0], [0, 192], [192, 192]]
        tiles = dict(slide.read_tiles(grid, reading.region_px, reading.level))
    square = image[192:384, 192:384].reshape(64, 3, 64, 3, 3).mean(axis=(1, 3))
    found = resample(tiles[3], 64)
    inner = (slice(1, 20), slice(1, 20))  # R and G wrap at 256
    np.testing.assert_allclose(found[inner], square[inner], atol=1)
