"""Tables slides, tiles and indexes: one pass over each slide finds header, tissue and tiles, or what is wrong with it."""

import math
import sys
from collections.abc import Sequence
from typing import Any

import pandas as pd
import pyarrow as pa
from pyspark import StorageLevel
from pyspark.sql import DataFrame
from pyspark.sql import functions as F

from jobs.runtime.run.cli import run_job
from jobs.runtime.run.run import Run
from jobs.runtime.run.survey import METADATA
from jobs.runtime.tables.tables import SCHEMAS, spark_schema
from udfs.find_tissue import failed_row, find_tissue
from udfs.schemas import FOUND_TISSUE
from udfs.wsi import ErrorCode, SlideError

_TILES_A_FILE = 1_000_000  # some 20 MB
_INPUT = (
    "image_id string, patient_id string, center_id string, image_num int, label string, uri string, mpp double, "
    "params_hash string, file_version string, size_bytes bigint"
)
_COLUMNS = [column.split()[0] for column in _INPUT.split(", ")]


def stale(run: Run, survey: pd.DataFrame) -> "pd.Series[bool]":
    """The images whose row in slides is not what it should be."""
    del run
    return survey["slide_stale"] | survey["metadata_stale"]


def find(run: Run, wave: pd.DataFrame) -> None:
    """Bring slides, tiles and indexes up to date for a wave; slides last: a row there says that the others are there."""
    _correct_metadata(run, wave[wave["metadata_stale"]])
    work = wave[wave["slide_stale"]]
    if work.empty:
        return
    images = work[~work["gone"].astype(bool)].rename(columns={"want_slide_hash": "params_hash"})
    to_open = images[images["error_code"].isna()]
    done = run.spark.sparkContext.accumulator(0)
    with run.stage("slides", len(to_open), lambda: int(done.value)):
        run.step(f"find tissue on {len(to_open):,} slides")
        rows = run.spark.createDataFrame(_plain(to_open[_COLUMNS]), _INPUT)
        # A task a slide: even over executors, and a task that dies tells which slide killed it.
        found = rows.repartitionByRange(max(1, len(to_open)), "image_id").mapInPandas(
            find_tissue(run.tissue_spec, run.run_id, done.add), spark_schema(FOUND_TISSUE)
        )
        found = run.show_work(found).persist(StorageLevel.DISK_ONLY)
        zipped = F.inline(F.arrays_zip("x_px", "y_px", "background_fraction"))
        constant = [name for name in SCHEMAS["tiles"].names if name not in ("x_px", "y_px", "background_fraction")]
        tiles = (
            found.where("status = 'ok'")
            .withColumn("tile_px", F.lit(run.config.tiling.tile_px))
            .select(*constant, zipped)
        )
        read = found.select("image_id", "n_tiles", "size_bytes", "work").collect()  # here the slides are read
        run.count_work("slides", read)
        run.step("write")
        tiles = tiles.coalesce(max(1, math.ceil(sum(slide.n_tiles for slide in read) / _TILES_A_FILE)))
        run.tables.put("tiles", tiles, "image_id", to_open["image_id"], work.loc[work["tile_rows"] > 0, "image_id"])
        indexes = found.where("index IS NOT NULL").coalesce(1)
        run.tables.put("indexes", indexes, "image_id", to_open["image_id"], work.loc[work["indexed"], "image_id"])
        present = work.loc[work["status"].notna(), "image_id"]
        slides = found.select(SCHEMAS["slides"].names).unionByName(_unopened(run, images)).coalesce(1)
        run.tables.put("slides", slides, "image_id", work["image_id"], present)
        run.counts["slides_processed"] += len(images)
        found.unpersist()


def _unopened(run: Run, images: pd.DataFrame) -> DataFrame:
    """The rows of table slides of those images whose file the driver could not find: there is nothing for a task to do."""
    failed = images[images["error_code"].notna()]
    codes, messages = failed["error_code"].to_list(), failed["error_message"].to_list()
    errors = [SlideError(ErrorCode(code), message) for code, message in zip(codes, messages, strict=True)]
    records = [dict(zip(_COLUMNS, row, strict=True)) for row in _plain(failed[_COLUMNS])]
    rows = [failed_row(record, error, run.run_id) for record, error in zip(records, errors, strict=True)]
    return run.spark.createDataFrame(pa.Table.from_pylist(rows, SCHEMAS["slides"]))


def _correct_metadata(run: Run, images: pd.DataFrame) -> None:
    """Centre, label, number and place come from CSV and listing: where they changed, no slide need be read again."""
    if len(images):
        with run.stage("slides"):
            run.step(f"correct {len(images):,} rows")
            schema = "image_id string, center_id string, label string, image_num int, uri string"
            rows = run.spark.createDataFrame(_plain(images[["image_id", *METADATA.values()]]), schema)
            run.tables.upsert("slides", rows, "image_id", METADATA)


def _plain(rows: pd.DataFrame) -> list[tuple[Any, ...]]:
    """The rows with None for what is missing and whole numbers whole, as Spark wants them."""
    whole = [name in ("image_num", "size_bytes") for name in rows.columns]
    return [
        tuple(None if pd.isna(v) else int(v) if w else v for v, w in zip(row, whole, strict=True))
        for row in rows.itertuples(index=False)
    ]


def main(argv: Sequence[str] | None = None) -> int:
    """Run the job; returns the exit status."""
    return run_job("slides", [find], stale, argv, encodes=False)


if __name__ == "__main__":
    sys.exit(main())
