"""The grid of tiles over a slide, and the share of a mask under each of them."""

import math

import numpy as np
from numpy.typing import NDArray


def tile_grid(width_px: int, height_px: int, span_px: float) -> NDArray[np.int32]:
    """Top-left corners of the tiles that fit whole, side by side from the slide's top-left corner.

    Args:
        width_px: width of the slide, level-0 pixels.
        height_px: height of the slide, level-0 pixels.
        span_px: edge of a tile in level-0 pixels; not a whole number if tiles are read at a target mpp.

    Returns:
        int32 [n, 2] of (x_px, y_px), level-0 pixels, row by row.
    """
    columns, rows = int(width_px // span_px), int(height_px // span_px)
    x = np.floor(np.arange(columns) * span_px).astype(np.int32)
    y = np.floor(np.arange(rows) * span_px).astype(np.int32)
    return np.stack([np.tile(x, rows), np.repeat(y, columns)], axis=1)


def mask_fractions(
    mask: NDArray[np.bool_], xy_px: NDArray[np.int32], span_px: float, downsample: int = 16
) -> NDArray[np.float64]:
    """The share of a mask under each tile, mask pixels counted by the area that the tile covers of them.

    Args:
        mask: bool [h, w], such as the background by a tissue method.
        xy_px: int [n, 2] tile corners, level-0 pixels.
        span_px: edge of a tile, level-0 pixels.
        downsample: level-0 pixels per mask pixel.

    Returns:
        float64 [n], 0 to 1. The part of a tile outside the mask does not count; a tile wholly outside has 1.
    """
    height, width = mask.shape
    low = xy_px / downsample
    high = np.minimum(low + span_px / downsample, (width, height))
    area = np.prod(high - low, axis=1)
    covered = np.zeros(len(xy_px))
    order = np.argsort(low[:, 1], kind="stable")
    # One row of tiles at a time: a table of the whole mask would take 24 bytes per mask pixel.
    for tiles in np.split(order, np.flatnonzero(np.diff(low[order, 1])) + 1) if len(order) else ():
        top = min(int(low[tiles[0], 1]), height)
        rows = mask[top : math.ceil(high[tiles[0], 1])]
        # A summed-area table, read between its corners: linear there because the mask is constant within a pixel.
        table = np.zeros((len(rows) + 1, width + 1), np.int32)
        inside = table[1:, 1:]
        rows.cumsum(axis=0, out=inside).cumsum(axis=1, out=inside)
        (left, upper), (right, lower) = (low[tiles] - (0, top)).T, (high[tiles] - (0, top)).T
        covered[tiles] = (
            _interpolated(table, right, lower)
            - _interpolated(table, left, lower)
            - _interpolated(table, right, upper)
            + _interpolated(table, left, upper)
        )
    return np.divide(covered, area, out=np.ones(len(xy_px)), where=area > 0)


def _interpolated(table: NDArray[np.int32], x: NDArray[np.float64], y: NDArray[np.float64]) -> NDArray[np.float64]:
    """The table at positions between its corners, bilinear."""
    x0 = np.minimum(np.floor(x).astype(np.int64), table.shape[1] - 1)
    y0 = np.minimum(np.floor(y).astype(np.int64), table.shape[0] - 1)
    x1, y1 = np.minimum(x0 + 1, table.shape[1] - 1), np.minimum(y0 + 1, table.shape[0] - 1)
    fx, fy = x - x0, y - y0
    upper = table[y0, x0] * (1 - fx) + table[y0, x1] * fx
    lower = table[y1, x0] * (1 - fx) + table[y1, x1] * fx
    result: NDArray[np.float64] = upper * (1 - fy) + lower * fy
    return result
