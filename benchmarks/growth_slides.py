"""A cohort without a pixel: files that are all hole, headers, indexes and tissue made up, tiles that nobody encodes.

What is put in the place of `open_slide`, the mask and the encoder, and nothing else: all that plans, moves and keeps rows is
the jobs' own. Each stands in a function that the driver hands to Spark, for a worker does not see what was changed in the driver.
"""

import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from unittest.mock import patch

import numpy as np
import pandas as pd
import pyarrow as pa
from numpy.typing import NDArray

from udfs import find_tissue as slides
from udfs.find_tissue import TissueSpec
from udfs.schemas import ENCODED
from udfs.spark_task import keep_what_is_loaded
from udfs.wsi import Slide
from udfs.wsi.quality.mask_metric import MaskedTiles
from udfs.wsi.quality.tile_metrics.background_fraction import BackgroundFraction
from udfs.wsi.store import File, FileInfo, StorageOptions
from udfs.wsi.tiff.index import Coding, Level, SlideIndex

TILE_PX = 448
DIM, BINS = 2, 2  # of embeddings and histograms: what they cost to make and to write is measured by others
_LEAST, _MOST, _SKEW = 1_000, 40_000, 2.18  # tiles a slide; the mean is 13,264, the median 9,600
_TISSUE = 0.4  # of the tiles of a slide
_BLOCK_PX, _BLOCK_BYTES = 256, 12_000  # a tile of 448 px is 37 kB

Batches = Iterable[pa.RecordBatch]


def write_cohort(folder: Path, n: int) -> None:
    """`patients.csv` and `slides/` of n slides; every fifth patient has two."""
    (folder / "slides").mkdir(parents=True)
    lines = ["image_id,center_id,patient_id,image_num,label"]
    for i in range(n):
        patient, second = (i // 6 * 5 + i % 6 - 1, 1) if i % 6 == 5 else (i // 6 * 5 + i % 6, 0)
        lines.append(f"{i:04},{patient % 11},{patient:04},{second},{('CE', 'LAA')[patient % 2]}")
        path = folder / "slides" / f"{i:04}.tif"
        path.touch()
        columns, rows = _grid_of(path)
        os.truncate(path, int(columns * rows * (TILE_PX / _BLOCK_PX) ** 2 * _BLOCK_BYTES))
    (folder / "patients.csv").write_text("\n".join(lines) + "\n")


def find_tissue(
    spec: TissueSpec, run_id: str, done: Callable[[int], None] = lambda _: None
) -> Callable[[Iterable[pd.DataFrame]], Iterable[pd.DataFrame]]:
    """As `udfs.find_tissue.find_tissue`, of slides that are not there."""
    real = slides.find_tissue(spec, run_id, done)

    def run(batches: Iterable[pd.DataFrame]) -> Iterator[pd.DataFrame]:
        with (
            patch.object(slides, "open_slide", _open_slide),
            patch.object(BackgroundFraction, "measure", _background_fractions),
        ):
            yield from real(batches)

    return run


def encode_tiles(
    spec: object,
    run_id: str,
    done: Callable[[int], None] = lambda _: None,
    *,
    encoders: object = None,
    tiles_ahead: int = 0,
) -> Callable[[Batches], Batches]:
    """As `udfs.encode_tiles.encode_tiles` for one encoder, of tiles that are neither read nor encoded."""
    del spec, encoders, tiles_ahead

    def run(batches: Batches) -> Iterator[pa.RecordBatch]:
        keep_what_is_loaded()
        for batch in batches:
            for unit in batch.to_pylist():
                n = len(unit["x_px"])
                [encoder] = unit["encoders"]
                constant = {name: unit[name] for name in ("image_id", "patient_id")} | encoder | {"run_id": run_id}
                corners = np.stack([unit["x_px"], unit["y_px"]], axis=1).astype(np.float32)
                columns = {name: _repeated(value, n) for name, value in constant.items()} | {
                    "x_px": unit["x_px"],
                    "y_px": unit["y_px"],
                    "embedding": _lists(corners.reshape(-1), DIM),
                    "embedding_max": _lists(-corners.reshape(-1), DIM),
                    "color_histogram": pa.StructArray.from_arrays(
                        [_lists(np.zeros(n, np.int32), 1), _lists(np.full(n, TILE_PX**2, np.int32), 1)],
                        fields=list(ENCODED.field("color_histogram").type),
                    ),
                }
                yield _batch(columns, n)
                yield _batch({name: [value] for name, value in constant.items()} | {"n_tiles": [n]}, 1)
                done(n)

    return run


def _batch(columns: Mapping[str, object], n: int) -> pa.RecordBatch:
    arrays = (columns.get(field.name, [None] * n) for field in ENCODED)
    return pa.RecordBatch.from_arrays(
        [
            array if isinstance(array, pa.Array) else pa.array(array, field.type)
            for field, array in zip(ENCODED, arrays, strict=True)
        ],
        schema=ENCODED,
    )


def _repeated(value: str, n: int) -> pa.Array:
    return pa.DictionaryArray.from_arrays(np.zeros(n, np.int32), [value]).cast(pa.string())


def _lists(values: NDArray[np.generic], length: int) -> pa.ListArray:
    return pa.ListArray.from_arrays(pa.array(np.arange(0, len(values) + 1, length, np.int32)), pa.array(values))


class _HollowSlide(Slide):
    """A slide with everything but pixels."""

    def downsampled(self, factor: int = 16) -> NDArray[np.uint8]:
        del factor
        return np.empty((0, 0, 3), np.uint8)


def _open_slide(uri: str, storage_options: StorageOptions | None = None, *, threads: int = 1) -> Slide:
    """As `udfs.wsi.open_slide`: the file is asked for its size, and not read."""
    file = File(uri, storage_options)
    return _HollowSlide(file, _index_of(Path(uri), file.info), None, threads)


def _background_fractions(_: BackgroundFraction, tiles: MaskedTiles) -> NDArray[np.float64]:
    """Tissue in one piece in the middle, as a resection's: of the grid's tiles that share which is nearest to its centre."""
    xy_px = tiles.xy_px
    centred = xy_px - xy_px.mean(axis=0)
    distance = np.square(centred / centred.max(axis=0)).sum(axis=1)
    background = np.ones(len(xy_px))
    inner = np.argsort(distance, kind="stable")[: round(_TISSUE * len(xy_px))]
    background[inner] = np.random.default_rng(len(xy_px)).uniform(0, 0.1, len(inner))
    return background


def _grid_of(path: Path) -> tuple[int, int]:
    """Tiles across and down.

    Any stretch of the cohort has the same mean, for the numbers go round by the golden ratio.
    """
    part = int(path.stem) * 0.6180339887498949 % 1
    grid = (_LEAST + (_MOST - _LEAST) * part**_SKEW) / _TISSUE
    rows = round((grid / 1.5) ** 0.5)
    return round(grid / rows), rows


def _index_of(path: Path, info: FileInfo) -> SlideIndex:
    """A pyramid in JPEG with levels at 1/4 and 1/16."""
    columns, rows = _grid_of(path)
    width, height = columns * TILE_PX + 100, rows * TILE_PX + 100
    draw = np.random.default_rng(int(path.stem))
    levels, end = [], 10_000
    for downsample in (1, 4, 16):
        size = width // downsample, height // downsample
        n = -(-size[0] // _BLOCK_PX) * -(-size[1] // _BLOCK_PX)
        counts = draw.normal(_BLOCK_BYTES, _BLOCK_BYTES / 4, n).clip(500).astype("u8")
        offsets = (end + np.cumsum(counts) - counts).astype("u8")
        end += int(counts.sum())
        coding = Coding(compression=7, photometric=6, samples=3, jpeg_tables=bytes(289))
        levels.append(Level(*size, float(downsample), _BLOCK_PX, _BLOCK_PX, 1, coding, offsets, counts))
    return SlideIndex(info, width, height, 0.25, 0.25, "simulated", tuple(levels))
