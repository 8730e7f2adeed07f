"""Units of neighbouring patches: how a spec is cut into them, and how one is read."""

import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
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
        """Returns the unit with the patches that `wanted`, bool [m], selects."""
        return replace(self, patches=self.patches[wanted], xy_px=self.xy_px[wanted])


@dataclass
class PatchTally:
    """Patches that were read, and those that were skipped."""

    n_patches: int = 0
    seconds: float = 0.0  # of all workers together
    skipped: dict[str, tuple[int, str]] = field(default_factory=dict)  # by image_id: patches, and the reason

    @property
    def n_skipped(self) -> int:
        """Number of skipped patches of all slides."""
        return sum(n_patches for n_patches, _ in self.skipped.values())

    def add(self, other: "PatchTally", *, announce: bool = False) -> None:
        """Counts the patches of another; `announce` prints one line on stderr for each slide that is skipped first."""
        self.n_patches += other.n_patches
        self.seconds += other.seconds
        for image_id, (n_patches, reason) in other.skipped.items():
            before = self.skipped.get(image_id, (0, ""))[0]
            self.skipped[image_id] = before + n_patches, reason
            if announce and not before:
                print(f"slidelake: {image_id}: {n_patches:,} patches skipped: {reason}", file=sys.stderr)


def cut_units(
    spec: PatchSpec, unit_patches: int, storage_options: StorageOptions | None, on_bad_slide: OnBadSlide
) -> tuple[list[Unit], PatchTally]:
    """Cuts the patches of each slide into units of at most `unit_patches` that share as few blocks as possible.

    Only slides whose levels or index the spec does not hold are opened. With on_bad_slide "skip", the second value counts the
    patches of slides that cannot be opened; slides in `spec.left_out` have 0 patches there, because their number is unknown.
    Raises a SlideError that names the slide if it cannot be opened, or read at the spacing of the spec.
    """
    rows = members(spec.slide, len(spec.slides))
    units: list[Unit] = []
    skipped = PatchTally(skipped={image_id: (0, reason) for image_id, reason in spec.left_out.items()})
    with ThreadPoolExecutor(_OPENERS, "slidelake-units") as pool:
        slides = [(slide, of_slide) for slide, of_slide in zip(spec.slides, rows, strict=True) if len(of_slide)]
        futures = [pool.submit(_units_of_slide, spec, *slide, unit_patches, storage_options) for slide in slides]
        for (slide, of_slide), future in zip(slides, futures, strict=True):
            try:
                units += future.result()
            except BaseException as error:
                if not isinstance(error, SlideError) or on_bad_slide == "raise":
                    pool.shutdown(wait=False, cancel_futures=True)
                    raise
                skipped.add(PatchTally(skipped={slide.image_id: (len(of_slide), str(error))}), announce=True)
    return units, skipped


def reading_of(
    patch_px: int, mpp: float | None, level: int, downsamples: Sequence[float], slide_mpp: float | None
) -> Reading:
    """Returns how patches of this size at `mpp`, or of `level` if `mpp` is None, are read from a slide.

    Raises SlideError if the slide has no such level, or cannot be read at `mpp`.
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
    unit: Unit,
    slots: NDArray[np.int64],
    out: NDArray[np.uint8],
    storage_options: StorageOptions | None,
    on_bad_slide: OnBadSlide,
) -> PatchTally | SlideError:
    """Reads each patch of a unit into its place in `out`, because new memory per unit would cost more than reading it.

    `out` is uint8 [k, patch_px, patch_px, 3]; `slots`, int64 [m], has the place of each patch. If the slide cannot be read, all
    patches of the unit are counted as skipped. With on_bad_slide "raise", the result is an error that names the slide: the
    caller raises it, because a DataLoader cannot hand it from process to process.
    """
    begun, n_patches = perf_counter(), 0
    try:
        with _naming_slide(unit.image_id, unit.uri, storage_options):
            index = SlideIndex.from_bytes(unit.index) if unit.index else None
            with open_slide(unit.uri, storage_options, index=index) as slide:
                for i, region in slide.read_tiles(unit.xy_px, unit.region_px, unit.level):
                    out[slots[i]] = resample(region, unit.patch_px)
                    n_patches += 1
    except SlideError as error:
        return error if on_bad_slide == "raise" else PatchTally(skipped={unit.image_id: (len(slots), str(error))})
    if n_patches != len(slots):
        raise RuntimeError(f"{unit.image_id}: {n_patches} patches came instead of {len(slots)}: report it")
    return PatchTally(n_patches, perf_counter() - begun)


@contextmanager
def _naming_slide(image_id: str, uri: str, storage_options: StorageOptions | None) -> Iterator[None]:
    """Makes any error a SlideError with the image_id and without secrets."""
    try:
        yield
    except Exception as error:
        if not isinstance(error, SlideError):
            error = slide_error_of(error, public_uri(uri), secrets_of(uri, storage_options))
        raise SlideError(error.code, f"{image_id}: {error.message}") from None


def _units_of_slide(
    spec: PatchSpec,
    source: SlideSource,
    rows: NDArray[np.int64],
    unit_patches: int,
    storage_options: StorageOptions | None,
) -> list[Unit]:
    with _naming_slide(source.image_id, source.uri, storage_options):
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
