"""Tiles to the size that an encoder sees.

An area average may lie between two grey levels. The other interpolations give whole levels, as in the 8-bit pictures of training.
"""

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn import functional

from udfs.wsi.reading.averaging import MOST_EDGE_EXACT, sums_of_squares


def resize(tiles: NDArray[np.uint8], edge: int, interpolation: str) -> NDArray[np.float32]:
    """uint8 [n, h, w, 3] to float32 [n, edge, edge, 3], 0 to 255.

    Args:
        tiles: the tiles.
        edge: pixels.
        interpolation: `area` for the area average, else one of torch's, antialiased.
    """
    n, height, width, _ = tiles.shape
    factor = height // edge
    if interpolation != "area" or height != width or height % edge or factor > MOST_EDGE_EXACT:
        return resize_tensor(torch.from_numpy(np.ascontiguousarray(tiles)), edge, interpolation).numpy()
    resized = np.empty((n, edge, edge, 3), np.float32)
    for tile, result in zip(tiles, resized, strict=True):  # one after the other: they stay in the processor's cache
        if factor == 1:
            result[:] = tile
        else:
            np.multiply(sums_of_squares(tile, factor), 1 / factor**2, out=result)
    return resized


def resize_tensor(tiles: torch.Tensor, edge: int, interpolation: str) -> torch.Tensor:
    """As `resize`, where the tiles are: uint8 [n, h, w, 3] to contiguous float32 [n, edge, edge, 3]."""
    x = tiles.permute(0, 3, 1, 2)  # a view: channels last
    if x.shape[-2:] == (edge, edge):
        x = x.float()
    elif interpolation == "area":
        x = functional.interpolate(x.float(), size=(edge, edge), mode="area")
    else:
        x = _of_8_bit(x, edge, interpolation).float()
    return x.permute(0, 2, 3, 1).contiguous()


def _of_8_bit(x: torch.Tensor, edge: int, interpolation: str) -> torch.Tensor:
    """As PIL and torchvision resize pictures: uint8 [n, 3, h, w] to whole grey levels, rounded after each direction."""
    if x.device.type == "cpu":
        return functional.interpolate(x, size=(edge, edge), mode=interpolation, antialias=True)
    x = x.float()
    for size in ((x.shape[2], edge), (edge, edge)):
        x = functional.interpolate(x, size=size, mode=interpolation, antialias=True).round_().clamp_(0, 255)
    return x
