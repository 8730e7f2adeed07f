"""Colours of a tile, counted exactly in a cube of equal bins."""

import numpy as np
from numpy.typing import NDArray


def color_histogram(pixels: NDArray[np.uint8], bins: int = 16) -> NDArray[np.int64]:
    """Count colours.

    Args:
        pixels: uint8 [..., 3], RGB.
        bins: bins a channel, a power of two up to 256.

    Returns:
        int64 [bins ** 3]; with 16 bins, colour (r, g, b) is counted at ``(r >> 4) << 8 | (g >> 4) << 4 | b >> 4``.
    """
    bits = bins.bit_length() - 1
    if not 0 <= bits <= 8 or 1 << bits != bins:
        raise ValueError(f"bins must be a power of two up to 256, not {bins}")
    binned = (pixels >> (8 - bits)).reshape(-1, 3).astype(np.int32)
    codes = binned[:, 0] << (2 * bits) | binned[:, 1] << bits | binned[:, 2]
    return np.bincount(codes, minlength=bins**3)
