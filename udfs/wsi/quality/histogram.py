"""Colours of tiles, counted exactly in a cube of equal bins."""

import numpy as np
import torch
from numpy.typing import NDArray

from udfs.wsi.quality.colours import STRIP_PX, strips


def color_histograms(tiles: NDArray[np.uint8], bins: int = 16) -> NDArray[np.int32]:
    """Counts the colours of each tile: uint8 [n, h, w, 3], RGB, to int32 [n, bins ** 3].

    `bins`, of each channel, is a power of two up to 256. With 16 bins, colour (r, g, b) is counted at
    ``(r >> 4) << 8 | (g >> 4) << 4 | b >> 4``.
    """
    bits = _bits(bins)
    counts = torch.zeros(len(tiles), bins**3, dtype=torch.int32)
    ones = torch.ones(STRIP_PX, dtype=torch.int32)
    for tile, row in zip(tiles, counts, strict=True):
        for colours in strips(tile):
            codes = (colours >> 8 - bits & bins - 1) << 2 * bits
            codes |= colours >> 16 - 2 * bits & bins - 1 << bits
            codes |= colours >> 24 - bits
            # half the time of numpy.bincount, which first looks for the least and the greatest
            row.scatter_add_(0, torch.from_numpy(codes.astype(np.int64)), ones[: len(codes)])
    result: NDArray[np.int32] = counts.numpy()
    return result


def color_histograms_on(tiles: torch.Tensor, bins: int = 16) -> torch.Tensor:
    """Counts what `color_histograms` counts, on the device that the tiles are on."""
    bits = _bits(bins)
    r, g, b = (tiles >> 8 - bits).flatten(1, 2).int().unbind(-1)
    codes = (r << 2 * bits | g << bits | b).long()
    counts = torch.zeros(len(tiles), bins**3, dtype=torch.int32, device=tiles.device)
    return counts.scatter_add_(1, codes, counts.new_ones(()).expand_as(codes))


def _bits(bins: int) -> int:
    bits = bins.bit_length() - 1
    if not 0 <= bits <= 8 or 1 << bits != bins:
        raise ValueError(f"bins must be a power of two up to 256, not {bins}")
    return bits
