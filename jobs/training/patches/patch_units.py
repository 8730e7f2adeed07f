"""Units of neighbouring patches: how a spec is cut into them, and how one is read."""

import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from time import perf_counter
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from jobs.training.patches.selection import PatchSpec, SlideSource, members
from udfs.wsi import ErrorCode, SlideError, open_slide
from udfs.wsi.reading.blocks_of_tiles import needed_blocks, work_units
from udfs.wsi.reading.spacing import Reading, mean_mpp, plan_reading, resample
from udfs.wsi.store import StorageOptions, public_uri, secrets_of
from udfs.wsi.store.faults import slide_error_of
from udfs.wsi.tiff.index import SlideIndex

_OPENERS = 16  # slides whose headers are read at once: opening a slide waits for the network

OnBadSlide = Literal["raise", "skip"]


@dataclass(frozen=True, eq=False)
class Unit:
    """Patches that are read together. A unit holds all that a worker needs, so it travels without the spec."""

    image_id: str
    uri: str = field(repr=False)
    patches: NDArray[np.int64] = field(repr=False)  # int64 [m], their numbers in the spec
    xy_px: NDArray[np.int64] = field(repr=False)  # int64 [m, 2], corners, level-0 pixels
    patch_px: int
    level: int
    region_px: int  # edge of the square that is read, pixels of the level; resampled to patch_px if they differ
    index: bytes | None = field(repr=False)  # index of the blocks under these patches; None: the header is read

    def only(self, wanted: NDArray[np.bool_]) -> "Unit":
        """The unit with the patches that `wanted`, bool [m], selects."""
        return replace(self, patches=self.patches[wanted], xy_px=self.xy_px[wanted])


@dataclass(frozen=True)
class UnitRead:
    """The result of reading a unit."""

    seconds: float  # that the worker took
    error: SlideError | None = None


class Skipped(dict[str, tuple[int, str]]):
    """Number of patches that were left out and the reason, by image_id."""

    def add(self, image_id: str, n_patches: int, reason: str, *, announce: bool = False) -> None:
        """Count patches of a slide; `announce` prints one line on stderr for the first ones."""
        before = self.get(image_id, (0, ""))[0]
        self[image_id] = before + n_patches, reason
        if announce and not before:
            print(f"slidelake: {image_id}: {n_patches:,} patches skipped: {reason}", file=sys.stderr)

    def add_all(self, others: Mapping[str, tuple[int, str]], times: int = 1, *, announce: bool = False) -> None:
        """Count the patches of several slides, each `times` over."""
        for image_id, (n_patches, reason) in others.items():
            self.add(image_id, times * n_patches, reason, announce=announce)

    @property
    def n_patches(self) -> int:
        """Patches of all slides."""
        return sum(patches for patches, _ in self.values())


def cut_units(
    spec: PatchSpec, unit_patches: int, storage_options: StorageOptions | None, on_bad_slide: OnBadSlide
) -> tuple[list[Unit], Skipped]:
    """Cut the patches of each slide into units that share as few blocks as possible.

    Args:
        spec: the patches. Only slides whose levels or index the spec does not hold are opened.
        unit_patches: most patches per unit.
        storage_options: of the slides, for fsspec.
        on_bad_slide: what happens at a slide that cannot be opened or read at the spacing of the spec. "raise" raises its
            error; "skip" leaves its patches out and says so on stderr.

    Returns:
        The units, and the slides without units; of a slide in `spec.left_out` the number of patches is 0: it is not known.

    Raises:
        SlideError: names the slide.
    """
    rows = members(spec.slide, len(spec.slides))
    busy = [number for number in range(len(spec.slides)) if len(rows[number])]
    units: list[Unit] = []
    skipped = Skipped({image_id: (0, reason) for image_id, reason in spec.left_out.items()})

    def cut(number: int) -> list[Unit] | SlideError:
        source = spec.slides[number]
        try:
            return _units_of_slide(spec, source, rows[number], unit_patches, storage_options)
        except Exception as error:
            return _naming_slide(error, source.image_id, source.uri, storage_options)

    with ThreadPoolExecutor(_OPENERS, "slidelake-units") as pool:
        for number, found in zip(busy, pool.map(cut, busy), strict=True):
            if not isinstance(found, SlideError):
                units += found
            elif on_bad_slide == "raise":
                pool.shutdown(wait=False, cancel_futures=True)
                raise found
            else:
                skipped.add(spec.slides[number].image_id, len(rows[number]), str(found), announce=True)
    return units, skipped


def reading_of(
    patch_px: int, mpp: float | None, level: int, downsamples: Sequence[float], slide_mpp: float | None
) -> Reading:
    """How patches of this size at `mpp`, or of `level` if `mpp` is None, are read from a slide.

    Raises:
        SlideError: the slide has no such level, or cannot be read at `mpp`.
    """
    if mpp is not None:
        return plan_reading(downsamples, patch_px, slide_mpp, mpp, "mpp")
    if level >= len(downsamples):
        raise SlideError(
            ErrorCode.UNSUPPORTED_FORMAT,
            f"no level {level}, the last one is {len(downsamples) - 1}: set mpp, which reads the nearest finer level",
        )
    return Reading(level, float(downsamples[level]), patch_px, patch_px * float(downsamples[level]))


def read_unit(
    unit: Unit, storage_options: StorageOptions | None, out: NDArray[np.uint8], slots: NDArray[np.int64]
) -> UnitRead:
    """Read a unit. The error of a slide that cannot be read is in the result and names the slide.

    Args:
        unit: the patches.
        storage_options: of the slides, for fsspec.
        out: uint8 [k, patch_px, patch_px, 3], where the pixels go. New memory per unit would cost more than reading it.
        slots: int64 [m], the place in `out` of each patch of the unit.

    Raises:
        RuntimeError: fewer patches came than the unit has, which is a fault of slidelake.
    """
    begun, n_patches = perf_counter(), 0
    try:
        index = SlideIndex.from_bytes(unit.index) if unit.index else None
        with open_slide(unit.uri, storage_options, index=index) as slide:
            for i, region in slide.read_tiles(unit.xy_px, unit.region_px, unit.level):
                out[slots[i]] = resample(region, unit.patch_px)
                n_patches += 1
    except Exception as error:
        return UnitRead(perf_counter() - begun, _naming_slide(error, unit.image_id, unit.uri, storage_options))
    if n_patches != len(slots):
        raise RuntimeError(f"{unit.image_id}: {n_patches} patches came instead of {len(slots)}: report it")
    return UnitRead(perf_counter() - begun)


def _naming_slide(error: Exception, image_id: str, uri: str, storage_options: StorageOptions | None) -> SlideError:
    """Any error of reading a slide, with its image_id and without secrets."""
    if not isinstance(error, SlideError):
        error = slide_error_of(error, public_uri(uri), secrets_of(uri, storage_options))
    return SlideError(error.code, f"{image_id}: {error.message}")


def _units_of_slide(
    spec: PatchSpec,
    source: SlideSource,
    rows: NDArray[np.int64],
    unit_patches: int,
    storage_options: StorageOptions | None,
) -> list[Unit]:
    index = SlideIndex.from_bytes(source.index) if source.index else None
    downsamples, mpp = source.level_downsamples, source.mpp
    if index is None or downsamples is None or (spec.mpp is not None and mpp is None):
        with open_slide(source.uri, storage_options) as slide:
            index, downsamples = slide.index, tuple(level.downsample for level in slide.levels)
            mpp = mean_mpp(slide.mpp_x, slide.mpp_y) if mpp is None else mpp
    reading = reading_of(spec.patch_px, spec.mpp, spec.level, downsamples, mpp)
    level, region_px = reading.level, reading.region_px
    blocks = index.levels[level] if index else None
    corners = np.stack([spec.x_px[rows], spec.y_px[rows]], axis=1).astype(np.int64)
    units = []
    for of_unit in work_units(blocks, downsamples[level], corners, region_px, unit_patches):
        xy_px, part = corners[of_unit], None
        if index and blocks:
            part = index.only(level, needed_blocks(blocks, xy_px, region_px)).to_bytes()
        units.append(Unit(source.image_id, source.uri, rows[of_unit], xy_px, spec.patch_px, level, region_px, part))
    return units
