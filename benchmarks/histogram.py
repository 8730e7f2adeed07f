"""histogram: the colours of real tissue tiles counted in 16^3 bins, beside numpy.histogramdd and numpy.bincount.

All counts are compared first.
"""

from collections.abc import Callable, Iterator

import numpy as np
import torch
from numpy.typing import NDArray

from benchmarks import inputs
from benchmarks.measure import Line, median_seconds
from udfs.wsi.quality.histogram import color_histograms

_TILES, _BATCH, _BINS = 48, 8, 16


def run() -> Iterator[Line]:
    """One line."""
    torch.set_num_threads(1)
    tiles = inputs.kept_pixels(inputs.pyramid(), _TILES)
    ways: dict[str, Callable[[], NDArray[np.generic]]] = {
        "slidelake": lambda: np.concatenate(
            [color_histograms(tiles[i : i + _BATCH], _BINS) for i in range(0, _TILES, _BATCH)]
        ),
        "bincount": lambda: np.stack([_bincount(tile) for tile in tiles]),
        "histogramdd": lambda: np.stack([_histogramdd(tile) for tile in tiles[:_BATCH]]),  # slow: fewer of them
    }
    counts = {name: way() for name, way in ways.items()}
    np.testing.assert_array_equal(counts["slidelake"], counts["bincount"])
    np.testing.assert_array_equal(counts["slidelake"][:_BATCH], counts["histogramdd"])
    ms = {name: 1000 * spent / len(counts[name]) for name, spent in median_seconds(ways).items()}
    yield {
        "tiles": _TILES,
        "ms_per_tile": ms["slidelake"],
        "bincount_ms": ms["bincount"],
        "histogramdd_ms": ms["histogramdd"],
        "vs_bincount": ms["bincount"] / ms["slidelake"],
        "vs_histogramdd": ms["histogramdd"] / ms["slidelake"],
    }


def _bincount(tile: NDArray[np.uint8]) -> NDArray[np.int64]:
    r, g, b = (tile >> 4).reshape(-1, 3).astype(np.int32).T
    return np.bincount(r << 8 | g << 4 | b, minlength=_BINS**3)


def _histogramdd(tile: NDArray[np.uint8]) -> NDArray[np.float64]:
    counts, _ = np.histogramdd(tile.reshape(-1, 3), bins=_BINS, range=[(0, 256)] * 3)
    return counts.reshape(-1)
