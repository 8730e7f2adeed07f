"""Which level is read for a target spacing (mpp), how many of its pixels per tile, and their resampling to a tile."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from udfs.wsi.errors import ErrorCode, SlideError

_LEVEL_TOLERANCE = 1.01  # a level up to 1 % coarser than wanted serves as it is: mpp is seldom known better
_COARSEST = 0.95  # a slide up to 5 % coarser than the target is enlarged (0.2528 for 0.25); more would invent detail


@dataclass(frozen=True)
class Reading:
    """How the tiles of one slide are read."""

    level: int  # index of the level that is read
    downsample: float  # level-0 pixels per pixel of the finished tile
    region_px: int  # edge of the square that is read, pixels of `level`; resampled to tile_px if they differ
    span_px: float  # edge of a tile, level-0 pixels


def mean_mpp(mpp_x: float | None, mpp_y: float | None) -> float | None:
    """Returns the spacing of a slide as tiles use it, um/px of level 0: the mean of both axes; None if one is unknown."""
    return (mpp_x + mpp_y) / 2 if mpp_x and mpp_y else None


def plan_reading(
    level_downsamples: Sequence[float],
    tile_px: int,
    slide_mpp: float | None,
    target_mpp: float | None,
    setting: str = "tiling.mpp",
) -> Reading:
    """Chooses the level for a target spacing; raises SlideError `mpp_unknown` or `mpp_too_coarse`.

    Args:
        level_downsamples: of each level, level 0 first.
        tile_px: edge of a finished tile.
        slide_mpp: um/px of level 0; None if unknown.
        target_mpp: um/px of a finished tile; None for level 0 as scanned.
        setting: name of the setting that holds the target, for messages.
    """
    if target_mpp is None:
        return Reading(0, 1.0, tile_px, float(tile_px))
    if slide_mpp is None:
        raise SlideError(
            ErrorCode.MPP_UNKNOWN,
            f"{setting} is {target_mpp} um/px and the slide's own is in neither its header nor the CSV: add it to the "
            "CSV's mpp column",
        )
    downsample = target_mpp / slide_mpp
    if downsample < _COARSEST:
        raise SlideError(
            ErrorCode.MPP_TOO_COARSE,
            f"scanned at {slide_mpp:g} um/px, coarser than {setting} = {target_mpp:g}: raise {setting} to "
            f"{slide_mpp:g} or leave the slide out; if the header is wrong, put the true value in the CSV's mpp column",
        )
    finer = [i for i, d in enumerate(level_downsamples) if d <= downsample * _LEVEL_TOLERANCE]
    level = max(finer, default=0, key=lambda i: level_downsamples[i])
    span = tile_px * downsample
    return Reading(level, downsample, region_edge(span, level_downsamples[level]), span)


def region_edge(span_px: float, level_downsample: float) -> int:
    """Returns the edge of the square to read for a tile that spans `span_px` level-0 pixels, in pixels of the level."""
    return max(1, round(span_px / level_downsample))


def resample(pixels: NDArray[np.uint8], edge_px: int) -> NDArray[np.uint8]:
    """Resamples a square tile by Pillow: the area average if it shrinks, bilinear if it grows.

    uint8 [n, n, 3] to uint8 [edge_px, edge_px, 3]; the input itself if it has that size.
    """
    if pixels.shape[0] == edge_px:
        return pixels
    method = Image.Resampling.BOX if pixels.shape[0] > edge_px else Image.Resampling.BILINEAR
    return np.asarray(Image.fromarray(pixels).resize((edge_px, edge_px), method))
