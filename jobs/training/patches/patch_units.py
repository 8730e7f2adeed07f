"""Units of neighbouring patches, planned from coordinates and indexes. A slide is opened only for what the spec leaves out."""

import sys
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from jobs.training.patches.selection import PatchSpec, SlideSource
from udfs.wsi import ErrorCode, SlideError, open_slide
from udfs.wsi.reading.blocks_of_tiles import needed_blocks, work_units
from udfs.wsi.reading.spacing import mean_mpp, plan_reading
from udfs.wsi.store import StorageOptions, public_uri, secrets_of
from udfs.wsi.store.faults import slide_error_of
from udfs.wsi.tiff.index import SlideIndex

_OPENERS = 16  # slides whose headers are read at once: they wait for the network

OnBadSlide = Literal["raise", "skip"]


@dataclass(frozen=True, eq=False)
class Unit:
    """Patches that are read together: all that a worker needs of a spec, so that it can travel alone."""

    image_id: str
    uri: str = field(repr=False)
    patches: NDArray[np.int64] = field(repr=False)  # int64 [m], their numbers in the spec
    xy_px: NDArray[np.int64] = field(repr=False)  # int64 [m, 2], corners, level-0 pixels
    patch_px: int
    level: int
    region_px: int  # edge of what is read, pixels of the level; resampled to patch_px where they differ
    index: bytes | None = field(repr=False)  # of just the blocks under these patches; None: the header is read

    def only(self, wanted: NDArray[np.bool_]) -> "Unit":
        """The unit with some of its patches: bool [m]."""
        if wanted.all():
            return self
        left = self.patches[wanted], self.xy_px[wanted]
        return Unit(self.image_id, self.uri, *left, self.patch_px, self.level, self.region_px, self.index)


@dataclass(frozen=True, eq=False)
class UnitPlan:
    """All units of a spec."""

    units: tuple[Unit, ...]
    skipped: Mapping[str, tuple[int, str]]  # by image_id of slides left out: patches, 0 if not known, and why


def plan_units(
    spec: PatchSpec, unit_patches: int, storage_options: StorageOptions | None, on_bad_slide: OnBadSlide
) -> UnitPlan:
    """Cut the patches of each slide into units that share as few blocks as can be.

    Args:
        spec: the patches.
        unit_patches: at most so many a unit.
        storage_options: of the slides, for fsspec.
        on_bad_slide: "raise" ends it at a slide that can't be opened or read at the spec's spacing, "skip" leaves its patches
            out and says so on stderr. Slides whose levels and index the spec has are not opened.

    Raises:
        SlideError: that names the slide.
    """
    order = np.argsort(spec.slide, kind="stable")
    ends = np.cumsum(np.bincount(spec.slide, minlength=len(spec.slides)))
    members = [rows.astype(np.int64) for rows in np.split(order, ends[:-1])] if len(spec.slides) else []
    xy_px = np.stack([spec.x_px, spec.y_px], axis=1).astype(np.int64)
    units: list[Unit] = []
    skipped: dict[str, tuple[int, str]] = {image_id: (0, why) for image_id, why in spec.left_out.items()}

    def work(number: int) -> "list[Unit] | SlideError":
        try:
            return _units_of(spec, spec.slides[number], members[number], xy_px, unit_patches, storage_options)
        except Exception as error:
            return named(error, spec.slides[number].image_id, spec.slides[number].uri, storage_options)

    with ThreadPoolExecutor(_OPENERS, "slidelake-plan") as pool:
        busy = [number for number in range(len(spec.slides)) if len(members[number])]
        for number, found in zip(busy, pool.map(work, busy), strict=True):
            if not isinstance(found, SlideError):
                units += found
            elif on_bad_slide == "raise":
                pool.shutdown(wait=False, cancel_futures=True)
                raise found
            else:
                skipped[spec.slides[number].image_id] = len(members[number]), str(found)
                tell_skipped(spec.slides[number].image_id, len(members[number]), str(found))
    return UnitPlan(tuple(units), skipped)


def named(error: Exception, image_id: str, uri: str, storage_options: StorageOptions | None) -> SlideError:
    """Any error of reading a slide, with its image_id and without a secret."""
    if not isinstance(error, SlideError):
        error = slide_error_of(error, public_uri(uri), secrets_of(uri, storage_options))
    return SlideError(error.code, f"{image_id}: {error.message}")


def tell_skipped(image_id: str, patches: int, why: str) -> None:
    """One line for people on patches that are left out."""
    print(f"slidelake: {image_id}: {patches:,} patches skipped: {why}", file=sys.stderr)


def _units_of(
    spec: PatchSpec,
    source: SlideSource,
    members: NDArray[np.int64],
    xy_px: NDArray[np.int64],
    unit_patches: int,
    storage_options: StorageOptions | None,
) -> list[Unit]:
    index = SlideIndex.from_bytes(source.index) if source.index else None
    downsamples, mpp = source.level_downsamples, source.mpp
    if index is None or downsamples is None or (spec.mpp is not None and mpp is None):
        with open_slide(source.uri, storage_options) as slide:
            index = slide.index
            downsamples = tuple(level.downsample for level in slide.levels)
            if mpp is None:
                mpp = mean_mpp(slide.mpp_x, slide.mpp_y)
    if downsamples is None:
        assert index
        downsamples = tuple(level.downsample for level in index.levels)
    if spec.mpp is None:
        if spec.level >= len(downsamples):
            raise SlideError(
                ErrorCode.UNSUPPORTED_FORMAT,
                f"level {spec.level} is asked for and its last is {len(downsamples) - 1}: take mpp, which reads the nearest "
                "finer level",
            )
        level, region_px = spec.level, spec.patch_px
    else:
        reading = plan_reading(downsamples, spec.patch_px, mpp, spec.mpp, "mpp")
        level, region_px = reading.level, reading.region_px
    blocks = index.levels[level] if index else None
    corners = xy_px[members]

    def cut() -> Iterator[Unit]:
        for rows in work_units(blocks, downsamples[level], corners, region_px, unit_patches):
            part = None
            if index and blocks:
                part = index.only(level, needed_blocks(blocks, corners[rows], region_px)).to_bytes()
            yield Unit(source.image_id, source.uri, members[rows], corners[rows], spec.patch_px, level, region_px, part)

    return list(cut())
