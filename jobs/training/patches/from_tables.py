"""Patches from the tables `slides`, `tiles` and `indexes`, at pinned versions, without Spark: a grid over the tissue."""

import sys
from collections.abc import Collection, Mapping

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from jobs.training.patches.patch_units import OnBadSlide, reading_of
from jobs.training.patches.selection import PatchSpec, SlideSource, members
from jobs.training.refusals import NoTableError
from jobs.training.table_versions import read_columns
from udfs.wording import some
from udfs.wsi import SlideError
from udfs.wsi.reading.spacing import mean_mpp
from udfs.wsi.store import StorageOptions, public_uri

_SLIDES = (
    *("image_id", "patient_id", "label", "uri", "width_px", "height_px", "mpp_x", "mpp_y"),
    *("level_downsamples", "file_version"),
)
_TILES = ("image_id", "x_px", "y_px", "tile_px", "downsample")


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
    """Returns a grid of patches over the tissue of every good slide.

    Patches lie side by side from the slide's top-left corner, independent of the tiles. A patch is kept if its centre is in
    a row of `tiles` and it fits on the slide. Patches of the size and spacing of the tiles are the tiles; patches of half
    their edge are the four quarters of each tile. No table must be made again for another `patch_px` or `mpp`.

    Args:
        root: of the tables, as `output.root`.
        patch_px: edge of a finished patch, pixels.
        mpp: um per pixel of a finished patch; None reads `level` as it is.
        level: that is read if `mpp` is None.
        patients: only their slides; None takes all.
        split: only patients with this value (or one of these) in column `split` of table patients; None takes all.
        versions: Delta version of each table, by its name; of other tables the newest is read.
        uris: present URI of a slide, by image_id, if the URI in the table, which is without secrets, cannot be read.
        on_bad_slide: what happens at a slide that cannot be read at `mpp` or `level`. "raise" raises ValueError; "skip" leaves
            the slide out, names it on stderr, and keeps it in `PatchSpec.left_out` and `PatchLoader.skipped`.
        storage_options: of the tables, for fsspec.

    Raises:
        FeedError: a table or version cannot be read.
        ValueError: no such table, no patch, or a slide that cannot be read at `mpp` or `level`.
    """

    def read(name: str, columns: tuple[str, ...], column: str, values: Collection[str]) -> pa.Table:
        version, where = (versions or {}).get(name), public_uri(root)
        try:
            return read_columns(f"{root.rstrip('/')}/{name}", columns, version, storage_options, (column, values))[1]
        except NoTableError:
            raise ValueError(f"no table {name} in {where}: run the slides job, or correct the folder") from None
        except KeyError:
            raise ValueError(f"table {name} in {where} has no column {column}: run the splits job first") from None

    wanted = None if patients is None else set(patients)
    if split is not None:
        names = [split] if isinstance(split, str) else sorted(split)
        of_split = set(read("patients", ("patient_id",), "split", names)["patient_id"].to_pylist())
        if not of_split:
            raise ValueError(
                f"no patient of split {' or '.join(names)} in {public_uri(root)}: correct the name, or run the splits job if "
                "no patient has a split yet"
            )
        wanted = of_split if wanted is None else wanted & of_split
    rows = read("slides", _SLIDES, "status", ["ok"]).to_pylist()
    good = {row["image_id"]: row for row in rows if wanted is None or row["patient_id"] in wanted}
    tiles = _tiles_by_image(read("tiles", _TILES, "image_id", list(good)))
    indexes = {
        (row["image_id"], row["file_version"]): row["index"]
        for row in read("indexes", ("image_id", "file_version", "index"), "image_id", list(good)).to_pylist()
    }
    sources: list[SlideSource] = []
    numbers, corners = [], []
    left_out: dict[str, str] = {}
    for image_id in sorted(good.keys() & tiles.keys()):
        row = good[image_id]
        slide_mpp, downsamples = mean_mpp(row["mpp_x"], row["mpp_y"]), tuple(row["level_downsamples"])
        try:
            span_px = reading_of(patch_px, mpp, level, downsamples, slide_mpp).span_px
        except SlideError as error:
            if on_bad_slide == "raise":
                raise ValueError(f"{image_id}: {error}") from None
            left_out[image_id] = f"{image_id}: {error}"
            continue
        grid = grid_on_tissue(*tiles[image_id], row["width_px"], row["height_px"], span_px)
        if len(grid):
            numbers.append(np.full(len(grid), len(sources), np.int32))
            corners.append(grid)
            uri, index = (uris or {}).get(image_id, row["uri"]), indexes.get((image_id, row["file_version"]))
            sources.append(SlideSource(image_id, uri, row["label"], slide_mpp, downsamples, index))
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
    """Returns the corners of patches that lie side by side and have their centres in a tile, int32 [m, 2] of (x, y), by row.

    All lengths are level-0 pixels. `tiles`: int64 [n, 2] of (x, y), corners of the tiles, which lie side by side from (0, 0),
    as job slides places them. `tile_span_px` and `span_px`: edges of a tile and of a patch.
    """
    columns, rows = int(width_px / span_px), int(height_px / span_px)  # patches that fit
    kept = np.rint(tiles / tile_span_px).astype(np.int64)
    if not columns or not rows or not len(kept):
        return np.zeros((0, 2), np.int32)
    # a mask of the tiles, looked up at the centres of the patches
    at_x = ((np.arange(columns) + 0.5) * span_px / tile_span_px).astype(np.int64)
    at_y = ((np.arange(rows) + 0.5) * span_px / tile_span_px).astype(np.int64)
    mask = np.zeros((max(at_y[-1], kept[:, 1].max()) + 1, max(at_x[-1], kept[:, 0].max()) + 1), bool)
    mask[kept[:, 1], kept[:, 0]] = True
    row, column = np.nonzero(mask[np.ix_(at_y, at_x)])
    corners: NDArray[np.int32] = np.rint(np.stack([column, row], axis=1) * span_px).astype(np.int32)
    return corners


def _tiles_by_image(tiles: pa.Table) -> dict[str, tuple[NDArray[np.int64], float]]:
    """Returns by image_id the corners of the tiles, int64 [n, 2], and the edge of a tile in level-0 pixels."""
    ids = tiles["image_id"].combine_chunks().dictionary_encode()
    xy_px = np.stack([tiles["x_px"].to_numpy(), tiles["y_px"].to_numpy()], axis=1).astype(np.int64)
    spans = tiles["tile_px"].to_numpy() * tiles["downsample"].to_numpy()
    rows = members(ids.indices.to_numpy(), len(ids.dictionary))
    return {
        image_id: (xy_px[of_image], float(spans[of_image[0]]))
        for image_id, of_image in zip(ids.dictionary.to_pylist(), rows, strict=True)
    }
