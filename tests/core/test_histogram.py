"""Colour counts are exact: held against numpy.histogramdd."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from udfs.wsi.histogram import color_histogram

BINS = [2, 4, 8, 16, 32]


@settings(derandomize=True, deadline=None, max_examples=60)
@given(
    seed=st.integers(0, 2**16),
    height=st.integers(1, 60),
    width=st.integers(1, 60),
    low=st.integers(0, 254),
    bins=st.sampled_from(BINS),
)
def test_counts_are_histogramdds(seed: int, height: int, width: int, low: int, bins: int) -> None:
    pixels = np.random.default_rng(seed).integers(low, 256, (height, width, 3), np.uint8)
    expected, _ = np.histogramdd(pixels.reshape(-1, 3), bins=bins, range=[(0, 256)] * 3)
    found = color_histogram(pixels, bins)
    assert found.dtype == np.int64
    np.testing.assert_array_equal(found.reshape(bins, bins, bins), expected.astype(np.int64))
    assert found.sum() == height * width


@pytest.mark.parametrize("colour", [(0, 0, 0), (255, 255, 255), (16, 0, 0), (15, 16, 255), (200, 100, 50)])
def test_a_colour_is_counted_at_its_documented_code(colour: tuple[int, int, int]) -> None:
    r, g, b = colour
    found = color_histogram(np.array([[colour]], np.uint8))
    assert np.flatnonzero(found).tolist() == [(r >> 4) << 8 | (g >> 4) << 4 | b >> 4]
    assert found.shape == (4096,)


def test_every_colour_once_fills_every_bin_alike() -> None:
    every = np.stack(np.meshgrid(*[np.arange(0, 256, 4, dtype=np.uint8)] * 3), axis=-1)
    assert (color_histogram(every, 16) == 64).all()


def test_the_pixels_are_left_as_they_are() -> None:
    pixels = np.full((4, 4, 3), 200, np.uint8)
    color_histogram(pixels)
    assert (pixels == 200).all()


@pytest.mark.parametrize("bins", [0, 3, 17, 512])
def test_bins_that_do_not_divide_256_are_refused(bins: int) -> None:
    with pytest.raises(ValueError, match="power of two"):
        color_histogram(np.zeros((1, 1, 3), np.uint8), bins)
