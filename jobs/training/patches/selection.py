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

from udfs.wsi.plausible import MPP_WANTED, plausible_mpp
from udfs.wsi.store import public_uri

_COLUMNS = ("slide", "x_px", "y_px")


@dataclass(frozen=True)
class SlideSource:
    """A slide that patches are read from. What is None is read from the slide's header once, before the first epoch."""

    image_id: str
    uri: str = field(repr=False)  # any fsspec URI; may hold secrets
    label: str | None = None
    mpp: float | None = None  # um per level-0 pixel; takes precedence over the header
    level_downsamples: tuple[float, ...] | None = None  # level-0 pixels per pixel of each level, level 0 first
    index: bytes | None = field(default=None, repr=False)  # where the blocks of the slide are, from table indexes

    def __post_init__(self) -> None:
        if self.mpp is not None and plausible_mpp(self.mpp) is None:
            raise ValueError(f"{self.image_id}: mpp = {self.mpp} must be {MPP_WANTED}")


@dataclass(frozen=True, eq=False)
class PatchSpec:
    """Patches, numbered from 0 in the order given.

    Args:
        slides: that the patches are of.
        slide: int32 [n], index into `slides` of each patch.
        x_px: int32 [n], left edge of each patch, level-0 pixels.
        y_px: int32 [n], top edge.
        patch_px: edge of a finished patch, pixels.
        mpp: um per pixel of a finished patch, read from the nearest finer level and resampled; None reads `level` as it is.
        level: that is read if `mpp` is None.
        left_out: by image_id, why a requested slide cannot be read at `mpp` or `level`.

    Raises:
        ValueError: arrays of different lengths, a patch given twice, or an impossible size or spacing.
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
        n = len(self.slide)
        for name in _COLUMNS:
            object.__setattr__(self, name, np.ascontiguousarray(getattr(self, name), np.int32))
            if getattr(self, name).shape != (n,):
                raise ValueError(f"{name} has shape {getattr(self, name).shape}: must be ({n},), as slide")
        if self.patch_px < 1 or self.level < 0:
            raise ValueError(f"patch_px = {self.patch_px} must be at least 1, level = {self.level} at least 0")
        if self.mpp is not None and plausible_mpp(self.mpp) is None:
            raise ValueError(f"mpp = {self.mpp} must be {MPP_WANTED}")
        if self.mpp is not None and self.level:
            raise ValueError(f"mpp = {self.mpp} and level = {self.level}: mpp chooses the level, leave one out")
        if n and not 0 <= self.slide.min() <= self.slide.max() < len(self.slides):
            raise ValueError(
                f"slide numbers from {self.slide.min()} to {self.slide.max()}: there are {len(self.slides)} slides"
            )
        names = [slide.image_id for slide in self.slides]
        if len(set(names)) < len(names):
            raise ValueError(f"image_id {max(names, key=names.count)} stands for two slides: give each its own")
        order = np.lexsort((self.x_px, self.y_px, self.slide))
        differs = np.diff([getattr(self, name)[order] for name in _COLUMNS], axis=1).any(axis=0)
        if not differs.all():
            twice = order[differs.argmin()]
            raise ValueError(
                f"{names[self.slide[twice]]} has the patch at x {self.x_px[twice]}, y {self.y_px[twice]} twice: "
                "each patch comes once per epoch"
            )

    def __len__(self) -> int:
        return len(self.slide)

    @property
    def patch_bytes(self) -> int:
        """Number of bytes of the pixels of one patch."""
        return 3 * self.patch_px * self.patch_px

    @cached_property
    def classes(self) -> tuple[str, ...]:
        """The labels of the slides, sorted."""
        return tuple(sorted({slide.label for slide in self.slides if slide.label is not None}))

    @cached_property
    def fingerprint(self) -> str:
        """Hash of the patches: two specs with one fingerprint number the same patches alike."""
        # slides as they first appear: slides without a patch, and how slides are numbered, make no difference
        used, first, numbers = np.unique(self.slide, return_index=True, return_inverse=True)
        order = np.argsort(first)
        slides = [self.slides[number] for number in used[order]]
        head = [self.patch_px, self.mpp, self.level, [(slide.image_id, slide.label) for slide in slides]]
        arrays = (np.argsort(order).astype(np.int32)[numbers], self.x_px, self.y_px)
        parts = [json.dumps(head).encode(), *(array.tobytes() for array in arrays)]
        return hashlib.sha256(b"".join(parts)).hexdigest()[:16]

    def to_table(self) -> pa.Table:
        """Returns the patches as rows: image_id, uri (without secrets), label, x_px, y_px; the rest as metadata."""
        rows = [{"image_id": one.image_id, "uri": public_uri(one.uri), "label": one.label} for one in self.slides]
        schema = pa.schema({"image_id": pa.string(), "uri": pa.string(), "label": pa.string()})
        table = pa.Table.from_pylist(rows, schema).take(pa.array(self.slide))
        size = json.dumps({"patch_px": self.patch_px, "mpp": self.mpp, "level": self.level})
        table = table.append_column("x_px", pa.array(self.x_px)).append_column("y_px", pa.array(self.y_px))
        return table.replace_schema_metadata({"patches": size})

    @classmethod
    def from_table(cls, table: pa.Table) -> "PatchSpec":
        """Returns patches from rows (image_id, uri, x_px, y_px and optionally label, mpp: um per level-0 pixel of the slide).

        patch_px, mpp and level of the patches are in the metadata of the table, as `to_table` writes them. Raises ValueError if
        an image has two URIs or labels, and as the constructor.
        """
        size = json.loads((table.schema.metadata or {}).get(b"patches", b"{}"))
        if "patch_px" not in size:
            raise ValueError(
                'the table has no metadata {"patches": \'{"patch_px": ...}\'}: write it with PatchSpec.to_table'
            )
        ids = table["image_id"].combine_chunks().dictionary_encode()  # numbered as they first appear
        which = ids.indices.to_numpy()
        first = pa.array(np.unique(which, return_index=True)[1])
        columns: dict[str, list[Any]] = {"image_id": ids.dictionary.to_pylist()}
        for name in [name for name in ("uri", "label", "mpp") if name in table.column_names]:
            values = table[name].combine_chunks()
            of_slides = values.take(first)
            if not values.equals(of_slides.take(ids.indices)):
                raise ValueError(f"column {name} has several values for one image_id: give each slide one")
            columns[name] = of_slides.to_pylist()
        slides = (SlideSource(**dict(zip(columns, row, strict=True))) for row in zip(*columns.values(), strict=True))
        return cls(tuple(slides), which, table["x_px"].to_numpy(), table["y_px"].to_numpy(), **size)


def members(groups: NDArray[np.integer[Any]], n_groups: int) -> list[NDArray[np.int64]]:
    """Returns the positions at which each number below `n_groups` stands in `groups`, int [n]: int64 arrays, ascending."""
    order = np.argsort(groups, kind="stable").astype(np.int64)
    ends = np.cumsum(np.bincount(groups, minlength=n_groups))
    return np.split(order, ends[:-1]) if n_groups else []
