"""The tissue mask and the tile grid, in a few lines of numpy: slow, whole image in memory, easy to believe."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

TILE_PX = 448


def area_average(pixels: NDArray[np.uint8], downsample: int) -> NDArray[np.uint8]:
    """Mean of each downsample x downsample square, halves rounded up.

    uint8 [h, w, c] -> uint8 [h // downsample, w // downsample, c]; rows and columns that fill no square are dropped.
    """
    height, width = pixels.shape[0] // downsample, pixels.shape[1] // downsample
    whole = pixels[: height * downsample, : width * downsample]
    area = downsample * downsample
    # Whole-array additions, rows first: ten times as fast as a sum over two axes of a 5-d view, and smaller.
    dtype: type[np.unsignedinteger[Any]] = np.uint16 if area * 256 <= 2**16 else np.uint32
    rows: NDArray[Any] = whole[::downsample].astype(dtype)
    for i in range(1, downsample):
        rows += whole[i::downsample]
    total: NDArray[Any] = rows[:, ::downsample].copy()
    for i in range(1, downsample):
        total += rows[:, i::downsample]
    mean: NDArray[np.uint8] = ((total + dtype(area // 2)) // dtype(area)).astype(np.uint8)
    return mean


def on_white(pixels: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """uint8 [h, w, 4] composited on white, or [h, w, 1] repeated -> uint8 [h, w, 3]; [h, w, 3] is returned as it is."""
    if pixels.shape[2] == 1:
        return np.repeat(pixels, 3, axis=2)
    if pixels.shape[2] == 3:
        return pixels
    alpha = pixels[..., 3:].astype(np.uint32)
    return ((pixels[..., :3] * alpha + 255 * (255 - alpha) + 127) // 255).astype(np.uint8)


def background_fractions(
    pixels: NDArray[np.uint8], *, tile_px: int = TILE_PX, mask_downsample: int = 16, brightness: int = 190
) -> NDArray[np.float64]:
    """Background fraction of every whole tile of the grid: float [rows, columns].

    A mask pixel (one of the uint8 area average at 1 / mask_downsample) is background where R, G and B are all above
    `brightness`. tile_px must be a multiple of mask_downsample.
    """
    mask = (area_average(on_white(pixels), mask_downsample) > brightness).all(axis=2)
    edge = tile_px // mask_downsample
    rows, columns = pixels.shape[0] // tile_px, pixels.shape[1] // tile_px
    tiles = mask[: rows * edge, : columns * edge].reshape(rows, edge, columns, edge)
    fractions: NDArray[np.float64] = tiles.mean(axis=(1, 3))
    return fractions


def kept_tiles(pixels: NDArray[np.uint8], *, tile_px: int = TILE_PX, max_background: float = 0.10) -> NDArray[np.int64]:
    """Top-left corners of the kept tiles, level-0 pixels: int [n, 2] of (x_px, y_px), ordered by y_px, then x_px."""
    rows, columns = np.nonzero(background_fractions(pixels, tile_px=tile_px) <= max_background)
    return np.stack([columns, rows], axis=1) * tile_px
