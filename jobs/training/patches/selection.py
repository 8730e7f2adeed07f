"""Which patches are trained on: slides, corners, one size and one spacing for all. Nothing of a slide is read here."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from udfs.wsi.reading.plausible import MPP_WANTED, plausible_mpp
from udfs.wsi.store import public_uri


@dataclass(frozen=True)
class SlideSource:
    """A slide that patches are read from. What is None is asked of the slide's header, once, before the first epoch."""

    image_id: str
    uri: str = field(repr=False)  # any fsspec URI; may hold secrets
    label: str | None = None
    mpp: float | None = None  # um a level-0 pixel; wins over the header's
    level_downsamples: tuple[float, ...] | None = None  # level-0 pixels a pixel of each level, level 0 first
    index: bytes | None = field(default=None, repr=False)  # where its blocks lie, of table indexes

    def __post_init__(self) -> None:
        if self.mpp is not None and plausible_mpp(self.mpp) is None:
            raise ValueError(f"{self.image_id}: mpp = {self.mpp} must be {MPP_WANTED}")


@dataclass(frozen=True, eq=False)
class PatchSpec:
    """Patches, numbered from 0 in the order given.

    Args:
        slides: that the patches are of.
        slide: int32 [n], which of `slides` each patch is of.
        x_px: int32 [n], left edge of each patch, level-0 pixels.
        y_px: int32 [n], top edge.
        patch_px: edge of a finished patch, pixels.
        mpp: um a pixel of a finished patch, read from the nearest finer level and resampled; None reads `level` as it is.
        level: that is read where `mpp` is None.
        left_out: why, by image_id, of slides that were asked for and can't be read at `mpp` or `level`.

    Raises:
        ValueError: arrays that do not fit together, or a patch that is there twice.
    """

    slides: tuple[SlideSource, ...]
    slide: NDArray[np.int32] = field(repr=False)
    x_px: NDArray[np.int32] = field(repr=False)
    y_px: NDArray[np.int32] = field(repr=False)
    patch_px: int
    mpp: float | None = None
    level: int = 0
    left_out: Mapping[str, str] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        n, columns = len(self.slide), ("slide", "x_px", "y_px")
        for name in columns:
            object.__setattr__(self, name, np.ascontiguousarray(getattr(self, name), np.int32))
            if getattr(self, name).shape != (n,):
                raise ValueError(f"{name} has shape {getattr(self, name).shape}: must be ({n},), as slide")
        if self.patch_px < 1 or self.level < 0:
            raise ValueError(f"patch_px = {self.patch_px} must be above 0, level = {self.level} not below it")
        if self.mpp is not None and plausible_mpp(self.mpp) is None:
            raise ValueError(f"mpp = {self.mpp} must be {MPP_WANTED}")
        if self.mpp is not None and self.level:
            raise ValueError(
                f"mpp = {self.mpp} and level = {self.level} are both given: mpp chooses the level, leave one out"
            )
        if n and not 0 <= self.slide.min() <= self.slide.max() < len(self.slides):
            raise ValueError(
                f"slide numbers from {self.slide.min()} to {self.slide.max()}: there are {len(self.slides)} slides"
            )
        names = [slide.image_id for slide in self.slides]
        if doubled := sorted({name for name in names if names.count(name) > 1} if len(set(names)) < len(names) else ()):
            raise ValueError(f"image_id {doubled[0]} stands for two slides: give each its own")
        order = np.lexsort((self.x_px, self.y_px, self.slide))
        same = np.ones(max(n - 1, 0), bool)
        for name in columns:
            same &= np.diff(getattr(self, name)[order]) == 0
        if same.any():
            twice = order[:-1][same][0]
            raise ValueError(
                f"{names[self.slide[twice]]} has the patch at x {self.x_px[twice]}, y {self.y_px[twice]} twice: "
                "each patch comes once an epoch"
            )

    def __len__(self) -> int:
        return len(self.slide)

    @property
    def patch_bytes(self) -> int:
        """Of the pixels of one patch."""
        return 3 * self.patch_px * self.patch_px

    @cached_property
    def classes(self) -> tuple[str, ...]:
        """The labels that occur, sorted."""
        return tuple(sorted({slide.label for slide in self.slides if slide.label is not None}))

    @cached_property
    def fingerprint(self) -> str:
        """Of what the patches are: two specs of one fingerprint number the same patches alike."""
        # slides as they first appear: those without a patch, and how they are numbered, make no difference
        used, first, numbers = np.unique(self.slide, return_index=True, return_inverse=True)
        order = np.argsort(first)
        slides = [self.slides[number] for number in used[order]]
        head = [self.patch_px, self.mpp, self.level, [(slide.image_id, slide.label) for slide in slides]]
        arrays = (np.argsort(order).astype(np.int32)[numbers], self.x_px, self.y_px)
        parts = [json.dumps(head).encode(), *(array.tobytes() for array in arrays)]
        return hashlib.sha256(b"".join(parts)).hexdigest()[:16]

    def to_table(self) -> pa.Table:
        """The patches as rows: image_id, uri (without secrets), label, x_px, y_px; patch_px, mpp and level as metadata."""
        of_slides = {
            name: pa.array([value(slide) for slide in self.slides], pa.string()).take(pa.array(self.slide))
            for name, value in (
                ("image_id", lambda slide: slide.image_id),
                ("uri", lambda slide: public_uri(slide.uri)),
                ("label", lambda slide: slide.label),
            )
        }
        told = json.dumps({"patch_px": self.patch_px, "mpp": self.mpp, "level": self.level})
        return pa.table(of_slides | {"x_px": self.x_px, "y_px": self.y_px}).replace_schema_metadata({"patches": told})

    @classmethod
    def from_table(cls, table: pa.Table) -> "PatchSpec":
        """Patches from rows (image_id, uri, x_px, y_px and optionally label, mpp: um a level-0 pixel of the slide).

        patch_px, mpp and level of the patches are in the table's metadata, as `to_table` has it.

        Raises:
            ValueError: an image with two URIs or labels, or what the constructor raises.
        """
        told = json.loads((table.schema.metadata or {}).get(b"patches", b"{}"))
        if "patch_px" not in told:
            raise ValueError(
                'the table has no metadata {"patches": \'{"patch_px": ...}\'}: write it with PatchSpec.to_table'
            )
        ids = table["image_id"].combine_chunks().dictionary_encode()  # numbered as they first appear
        which = ids.indices.to_numpy()
        first = pa.array(np.unique(which, return_index=True)[1])
        columns: dict[str, list[Any]] = {"image_id": ids.dictionary.to_pylist()}
        for name in ("uri", "label", "mpp"):
            if name in table.column_names:
                values = table[name].combine_chunks()
                of_first = values.take(first)
                if not values.equals(of_first.take(ids.indices)):
                    raise ValueError(f"column {name} has several values for one image_id: give each slide one")
                columns[name] = of_first.to_pylist()
        slides = tuple(
            SlideSource(**dict(zip(columns, row, strict=True))) for row in zip(*columns.values(), strict=True)
        )
        return cls(slides, which, table["x_px"].to_numpy(), table["y_px"].to_numpy(), **told)
