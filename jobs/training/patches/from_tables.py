"""Patches from the tables `slides`, `tiles` and `indexes`, at pinned versions, without Spark: a grid over the tissue."""

import sys
from collections.abc import Collection, Mapping
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from jobs.training.patches.patch_units import OnBadSlide
from jobs.training.patches.selection import PatchSpec, SlideSource
from jobs.training.refusals import NoTableError
from jobs.training.table_versions import read_columns
from udfs.wording import some
from udfs.wsi import SlideError
from udfs.wsi.reading.spacing import mean_mpp, plan_reading
from udfs.wsi.store import StorageOptions, public_uri

_SLIDES = (
    *("image_id", "patient_id", "label", "uri", "width_px", "height_px", "mpp_x", "mpp_y"),
    *("level_downsamples", "file_version"),
)


def patches_of_tables(
    root: str,
    patch_px: int,
    *,
    mpp: float | None = None,
    level: int = 0,
    patients: Collection[str] | None = None,
    split: str | Collection[str] | None = None,
    versions: Mapping[str, int] | None = None,
    uris: Mapping[str, str] | None = None,
    on_bad_slide: OnBadSlide = "raise",
    storage_options: StorageOptions | None = None,
) -> PatchSpec:
    """A grid of patches over the tissue of every good slide.

    Patches lie side by side from the slide's top-left corner, whatever the size of the tiles; a patch is kept where its
    centre lies in a row of `tiles` and it fits on the slide whole. So patches of the tiles' own size and spacing are the
    tiles; of half their edge, the four quarters of each; and larger ones are those that are centred on tissue. Another
    patch_px or mpp asks for no table to be made again.

    Args:
        root: of the tables, as `output.root`.
        patch_px: edge of a finished patch, pixels.
        mpp: um a pixel of a finished patch; None reads `level` as it is.
        level: that is read where `mpp` is None.
        patients: only theirs; None takes all.
        split: only patients of this value (or one of these) of column `split` of table patients; None takes all.
        versions: Delta version of each table, by its name; the newest of those that are not named.
        uris: where a slide is now, by image_id, where the table's URI does not serve (it is without secrets).
        on_bad_slide: "raise" ends it at a slide that can't be read at `mpp` or `level`; "skip" leaves such slides out, names
            them on stderr, and keeps them in `PatchSpec.left_out`, so that `PatchLoader.skipped` counts them.
        storage_options: of the tables, for fsspec.

    Raises:
        FeedError: a table or version that can't be read.
        ValueError: no such table, no patch, or with on_bad_slide="raise" a slide that can't be read at `mpp` or `level`: named,
            with the remedy.
    """
    slides = _read(root, "slides", _SLIDES, versions, storage_options, ("status", ["ok"]))
    wanted = None if patients is None else set(patients)
    if split is not None:
        names = [split] if isinstance(split, str) else sorted(split)
        rows = _read(root, "patients", ("patient_id",), versions, storage_options, ("split", names))
        of_split = set(rows["patient_id"].to_pylist())
        if not of_split:
            raise ValueError(
                f"no patient of split {' or '.join(names)} in {public_uri(root)}: correct the name, or run the splits job where "
                "no patient has a split yet"
            )
        wanted = of_split if wanted is None else wanted & of_split
    good = [row for row in slides.to_pylist() if wanted is None or row["patient_id"] in wanted]
    good.sort(key=lambda row: str(row["image_id"]))
    ids = [row["image_id"] for row in good]
    tiles = _read(
        root,
        "tiles",
        ("image_id", "x_px", "y_px", "tile_px", "downsample"),
        versions,
        storage_options,
        ("image_id", ids),
    )
    indexes = {
        (row["image_id"], row["file_version"]): row["index"]
        for row in _read(
            root, "indexes", ("image_id", "file_version", "index"), versions, storage_options, ("image_id", ids)
        ).to_pylist()
    }
    of_image = _by_image(tiles)
    sources: list[SlideSource] = []
    numbers, corners = [], []
    left_out: dict[str, str] = {}
    for row in good:
        if row["image_id"] not in of_image:
            continue
        try:
            span = _span(row, patch_px, mpp, level)
        except ValueError as error:
            if on_bad_slide == "raise":
                raise
            left_out[row["image_id"]] = str(error)
            continue
        grid = grid_on_tissue(*of_image[row["image_id"]], row["width_px"], row["height_px"], span)
        if len(grid):
            numbers.append(np.full(len(grid), len(sources), np.int32))
            corners.append(grid)
            sources.append(
                SlideSource(
                    row["image_id"],
                    (uris or {}).get(row["image_id"], row["uri"]),
                    row["label"],
                    mean_mpp(row["mpp_x"], row["mpp_y"]),
                    tuple(row["level_downsamples"]),
                    indexes.get((row["image_id"], row["file_version"])),
                )
            )
    if left_out:
        print(f"slidelake: {len(left_out)} slides left out: {some(list(left_out.values()), 3, '; ')}", file=sys.stderr)
    if not sources:
        which = f"split {split}" if split is not None else "these patients" if patients is not None else "any patient"
        raise ValueError(
            f"no patch of {patch_px} px has its centre on tissue of {which} in {public_uri(root)}: take a smaller patch_px, or "
            "run the slides job with a larger tiling.max_background"
        )
    xy_px = np.concatenate(corners)
    return PatchSpec(tuple(sources), np.concatenate(numbers), xy_px[:, 0], xy_px[:, 1], patch_px, mpp, level, left_out)


def grid_on_tissue(
    tiles: NDArray[np.int64], tile_span_px: float, width_px: int, height_px: int, span_px: float
) -> NDArray[np.int32]:
    """The corners of patches that lie side by side and have their centres in a tile.

    Args:
        tiles: int64 [n, 2] of (x, y), corners of the tiles, level-0 pixels; tiles lie side by side from (0, 0), as job slides
            lays them.
        tile_span_px: edge of a tile, level-0 pixels.
        width_px: of the slide.
        height_px: of the slide.
        span_px: edge of a patch, level-0 pixels.

    Returns:
        int32 [m, 2] of (x, y), level-0 pixels, row by row.
    """
    columns, rows = int(width_px / span_px), int(height_px / span_px)  # those that fit whole
    kept = np.rint(tiles / tile_span_px).astype(np.int64)
    if not columns or not rows or not len(kept):
        return np.zeros((0, 2), np.int32)
    # a mask of the tiles, looked up at the patches' centres
    at_x = ((np.arange(columns) + 0.5) * span_px / tile_span_px).astype(np.int64)
    at_y = ((np.arange(rows) + 0.5) * span_px / tile_span_px).astype(np.int64)
    mask = np.zeros((max(at_y[-1], kept[:, 1].max()) + 1, max(at_x[-1], kept[:, 0].max()) + 1), bool)
    mask[kept[:, 1], kept[:, 0]] = True
    row, column = np.nonzero(mask[np.ix_(at_y, at_x)])
    corners: NDArray[np.int32] = np.rint(np.stack([column, row], axis=1) * span_px).astype(np.int32)
    return corners


def _span(row: Mapping[str, Any], patch_px: int, mpp: float | None, level: int) -> float:
    """Edge of a patch, level-0 pixels."""
    downsamples = row["level_downsamples"]
    if mpp is None:
        if level >= len(downsamples):
            raise ValueError(
                f"{row['image_id']} has no level {level}, its last is {len(downsamples) - 1}: take mpp instead, which reads the "
                "nearest finer level and resamples"
            )
        return patch_px * float(downsamples[level])
    try:
        return plan_reading(downsamples, patch_px, mean_mpp(row["mpp_x"], row["mpp_y"]), mpp, "mpp").span_px
    except SlideError as error:
        raise ValueError(f"{row['image_id']}: {error}") from None


def _by_image(tiles: pa.Table) -> dict[str, tuple[NDArray[np.int64], float]]:
    """By image_id: corners of the tiles, int64 [n, 2], and the edge of one in level-0 pixels."""
    if not len(tiles):
        return {}
    ids = tiles["image_id"].combine_chunks().dictionary_encode()
    codes = ids.indices.to_numpy()
    xy_px = np.stack([tiles["x_px"].to_numpy(), tiles["y_px"].to_numpy()], axis=1).astype(np.int64)
    spans = tiles["tile_px"].to_numpy() * tiles["downsample"].to_numpy()
    order = np.argsort(codes, kind="stable")
    ends = np.cumsum(np.bincount(codes, minlength=len(ids.dictionary)))
    members = np.split(order, ends[:-1])
    return {
        image_id: (xy_px[rows], float(spans[rows[0]]))
        for image_id, rows in zip(ids.dictionary.to_pylist(), members, strict=True)
    }


def _read(
    root: str,
    name: str,
    columns: tuple[str, ...],
    versions: Mapping[str, int] | None,
    storage_options: StorageOptions | None,
    only: tuple[str, list[str]],
) -> pa.Table:
    """Columns of the rows of one version of a table that have one of some values in a column."""
    try:
        _, rows = read_columns(f"{root.rstrip('/')}/{name}", columns, (versions or {}).get(name), storage_options, only)
    except NoTableError:
        raise ValueError(
            f"no table {name} in {public_uri(root)}: run the slides job, or give the folder of its tables"
        ) from None
    except KeyError:
        raise ValueError(
            f"table {name} in {public_uri(root)} has no column {only[0]}: run the splits job first"
        ) from None
    return rows
