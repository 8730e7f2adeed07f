"""The grid of tiles over a slide, and the share of a mask under each of them."""

import math

import numpy as np
from numpy.typing import NDArray


def tile_grid(width_px: int, height_px: int, span_px: float) -> NDArray[np.int32]:
    """Returns the corners of the tiles that fit whole, side by side from the slide's top-left corner, row by row.

    int32 [n, 2] of (x_px, y_px). All lengths are level-0 pixels; `span_px`, the edge of a tile, may be a fraction.
    """
    columns, rows = int(width_px // span_px), int(height_px // span_px)
    x = np.floor(np.arange(columns) * span_px).astype(np.int32)
    y = np.floor(np.arange(rows) * span_px).astype(np.int32)
    return np.stack([np.tile(x, rows), np.repeat(y, columns)], axis=1)


def mask_fractions(
    mask: NDArray[np.bool_], xy_px: NDArray[np.int32], span_px: float, downsample: int = 16
) -> NDArray[np.float64]:
    """Returns the share of a mask under each tile, mask pixels counted by the area that the tile covers of them.

    The result is float64 [n], 0 to 1. The part of a tile outside the mask does not count; a tile wholly outside has 1.

    Args:
        mask: bool [h, w], such as the background by a tissue method.
        xy_px: int [n, 2] tile corners, level-0 pixels.
        span_px: edge of a tile, level-0 pixels.
        downsample: level-0 pixels per mask pixel.
    """
    height, width = mask.shape
    low = xy_px / downsample
    high = np.minimum(low + span_px / downsample, (width, height))
    area = np.prod(np.maximum(high - low, 0), axis=1)
    covered = np.zeros(len(xy_px))
    order = np.argsort(low[:, 1], kind="stable")
    at_x = np.arange(width + 1)
    # One row of tiles at a time: sums over the whole mask would take 8 bytes per mask pixel.
    for tiles in np.split(order, np.flatnonzero(np.diff(low[order, 1])) + 1) if len(order) else ():
        upper, lower = low[tiles[0], 1], high[tiles[0], 1]
        rows = mask[int(upper) : math.ceil(lower)]
        at_y = int(upper) + np.arange(len(rows))
        heights = np.minimum(at_y + 1, lower) - np.maximum(at_y, upper)  # of the mask pixels that tiles cover in part
        left_of = np.concatenate([[0], np.cumsum(heights @ rows)])  # what is covered left of each mask column
        covered[tiles] = np.interp(high[tiles, 0], at_x, left_of) - np.interp(low[tiles, 0], at_x, left_of)
    return np.divide(covered, area, out=np.ones(len(xy_px)), where=area > 0)
