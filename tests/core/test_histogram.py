"""Colour counts are exact: held against numpy.histogramdd, in NumPy and in torch."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from tests.slides.make import Pixels
from udfs.wsi.quality.histogram import color_histograms, color_histograms_on

BINS = [2, 4, 8, 16, 32]


def by_numpy(tile: Pixels, bins: int) -> NDArray[np.int32]:
    counts, _ = np.histogramdd(tile.reshape(-1, 3), bins=bins, range=[(0, 256)] * 3)
    return counts.astype(np.int32).reshape(-1)


@settings(derandomize=True, deadline=None, max_examples=60)
@given(
    seed=st.integers(0, 2**16),
    n=st.integers(0, 3),
    height=st.integers(1, 60),
    width=st.integers(1, 60),
    low=st.integers(0, 254),
    bins=st.sampled_from(BINS),
)
def test_counts_are_histogramdds(seed: int, n: int, height: int, width: int, low: int, bins: int) -> None:
    tiles = np.random.default_rng(seed).integers(low, 256, (n, height, width, 3), np.uint8)
    found = color_histograms(tiles, bins)
    assert found.dtype == np.int32
    assert found.shape == (n, bins**3)
    for tile, counts in zip(tiles, found, strict=True):
        np.testing.assert_array_equal(counts, by_numpy(tile, bins))
    assert torch.equal(color_histograms_on(torch.from_numpy(tiles), bins), torch.from_numpy(found))


@pytest.mark.parametrize("bins", [8, 16, 32])
def test_real_tiles_are_counted_alike_however_they_lie_in_memory(pixels: Pixels, bins: int) -> None:
    window = np.lib.stride_tricks.sliding_window_view(pixels, (448, 448), axis=(0, 1))  # type: ignore[call-overload]
    tiles = window[896::448, 448:1400:448].reshape(-1, 3, 448, 448).transpose(0, 2, 3, 1)
    assert not tiles.flags["C_CONTIGUOUS"]
    found = color_histograms(tiles, bins)
    for tile, counts in zip(tiles, found, strict=True):
        np.testing.assert_array_equal(counts, by_numpy(tile, bins))
    np.testing.assert_array_equal(color_histograms(np.ascontiguousarray(tiles), bins), found)
    assert torch.equal(color_histograms_on(torch.tensor(tiles), bins), torch.from_numpy(found))


@pytest.mark.parametrize("colour", [(0, 0, 0), (255, 255, 255), (16, 0, 0), (15, 16, 255), (200, 100, 50)])
def test_a_colour_is_counted_at_its_documented_code(colour: tuple[int, int, int]) -> None:
    r, g, b = colour
    [found] = color_histograms(np.array([[[colour]]], np.uint8))
    assert np.flatnonzero(found).tolist() == [(r >> 4) << 8 | (g >> 4) << 4 | b >> 4]


def test_every_colour_once_fills_every_bin_alike() -> None:
    every = np.stack(np.meshgrid(*[np.arange(0, 256, 2, dtype=np.uint8)] * 3), axis=-1).reshape(1, 1024, -1, 3)
    for bins in (1, 16, 128):
        assert (color_histograms(every, bins) == (128 // bins) ** 3).all()
        assert (color_histograms_on(torch.from_numpy(every), bins) == (128 // bins) ** 3).all()


def test_the_pixels_are_left_as_they_are() -> None:
    tiles = np.full((2, 4, 4, 3), 200, np.uint8)
    color_histograms(tiles)
    color_histograms_on(torch.from_numpy(tiles))
    assert (tiles == 200).all()


@pytest.mark.parametrize("bins", [0, 3, 17, 512])
def test_bins_that_do_not_divide_256_are_refused(bins: int) -> None:
    with pytest.raises(ValueError, match="power of two"):
        color_histograms(np.zeros((1, 1, 1, 3), np.uint8), bins)
    with pytest.raises(ValueError, match="power of two"):
        color_histograms_on(torch.zeros(1, 1, 1, 3, dtype=torch.uint8), bins)
