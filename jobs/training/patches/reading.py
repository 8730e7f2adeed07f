"""A unit's pixels, read by whoever works on it: a thread of the loader or an executor."""

from dataclasses import dataclass, field
from time import perf_counter

import numpy as np
from numpy.typing import NDArray

from jobs.training.patches.units import Unit, named
from udfs.wsi import SlideError, open_slide
from udfs.wsi.spacing import resample
from udfs.wsi.store import StorageOptions
from udfs.wsi.tiff.index import SlideIndex


@dataclass(frozen=True, eq=False)
class UnitPixels:
    """What came of a unit: its pixels, or the error."""

    pixels: NDArray[np.uint8] = field(
        repr=False
    )  # uint8 [m, patch_px, patch_px, 3], in the order of the unit's patches
    seconds: float  # that the worker took
    error: SlideError | None = None


def read_unit(unit: Unit, storage_options: StorageOptions | None) -> UnitPixels:
    """Read a unit. Never raises: a slide that can't be read is an error with its name in the result, and m is 0."""
    begun = perf_counter()
    pixels = np.empty((len(unit.patches), unit.patch_px, unit.patch_px, 3), np.uint8)
    error: SlideError | None = None
    try:
        index = SlideIndex.from_bytes(unit.index) if unit.index else None
        with open_slide(unit.uri, storage_options, index=index) as slide:
            for i, region in slide.read_tiles(unit.xy_px, unit.region_px, unit.level):
                pixels[i] = resample(region, unit.patch_px)
    except Exception as problem:
        error, pixels = named(problem, unit.image_id, unit.uri, storage_options), pixels[:0]
    return UnitPixels(pixels, perf_counter() - begun, error)
