"""Colours as numbers, ``r | g << 8 | b << 16``: what tables of colours are looked up by and histograms counted by."""

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

COLOURS = 2**24
STRIP_PX = 2**15  # with what is made of it, a strip stays in a core's second cache


def strips(pixels: NDArray[np.uint8]) -> Iterator[NDArray[np.uint32]]:
    """Yields the colours of an image, uint8 [..., 3], strip by strip: uint32 [at most STRIP_PX], overwritten by the next."""
    flat = np.ascontiguousarray(pixels).reshape(-1)
    length = min(len(flat) // 3, STRIP_PX)
    strip = np.empty(3 * length + 1, np.uint8)
    # Four bytes from where each pixel begins: one unaligned load in place of three loads, shifts and sums.
    quads: NDArray[np.uint32] = np.ndarray((length,), "<u4", strip, strides=(3,))
    colours = np.empty(length, np.uint32)
    for start in range(0, len(flat), 3 * STRIP_PX):
        part = flat[start : start + 3 * STRIP_PX]
        n = len(part) // 3
        strip[: 3 * n] = part
        np.copyto(colours[:n], quads[:n])
        colours[:n] &= COLOURS - 1
        yield colours[:n]


def rgb(first: int, last: int) -> NDArray[np.uint8]:
    """Returns the colours of the numbers from `first` up to `last`, without it: uint8 [last - first, 3]."""
    return np.arange(first, last, dtype="<u4").view(np.uint8).reshape(-1, 4)[:, :3]
