"""A unit's pixels, read by whoever works on it: a process of the loader or an executor."""

from dataclasses import dataclass
from time import perf_counter

import numpy as np
from numpy.typing import NDArray

from jobs.training.patches.patch_units import Unit, named
from udfs.wsi import SlideError, open_slide
from udfs.wsi.reading.spacing import resample
from udfs.wsi.store import StorageOptions
from udfs.wsi.tiff.index import SlideIndex


@dataclass(frozen=True)
class UnitRead:
    """How reading a unit went."""

    n_patches: int  # that were read: all of the unit, or none
    seconds: float  # that the worker took
    error: SlideError | None = None


def read_unit(
    unit: Unit, storage_options: StorageOptions | None, out: NDArray[np.uint8], places: NDArray[np.int64]
) -> UnitRead:
    """Read a unit. Never raises: a slide that can't be read is an error with its name in the result.

    Args:
        unit: the patches.
        storage_options: of the slides, for fsspec.
        out: uint8 [k, patch_px, patch_px, 3], where the pixels go: new memory a unit would cost more than reading it.
        places: int64 [m], the place in `out` of each of the unit's patches.
    """
    begun = perf_counter()
    try:
        index = SlideIndex.from_bytes(unit.index) if unit.index else None
        n_patches = 0
        with open_slide(unit.uri, storage_options, index=index) as slide:
            for i, region in slide.read_tiles(unit.xy_px, unit.region_px, unit.level):
                out[places[i]] = resample(region, unit.patch_px)
                n_patches += 1
    except Exception as error:
        return UnitRead(0, perf_counter() - begun, named(error, unit.image_id, unit.uri, storage_options))
    return UnitRead(n_patches, perf_counter() - begun)
