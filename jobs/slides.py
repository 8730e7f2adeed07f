"""Tables slides, tiles and indexes: one pass over each slide finds header, tissue and tiles, or what is wrong with it."""

import math
import sys
from collections.abc import Sequence

import pandas as pd
import pyarrow as pa
from pyspark import StorageLevel
from pyspark.sql import SparkSession
from pyspark.sql import functions as F

from jobs.runtime.run.cli import run_job
from jobs.runtime.run.progress import Progress
from jobs.runtime.run.record import Record
from jobs.runtime.run.run import Job
from jobs.runtime.run.survey import METADATA
from jobs.runtime.tables.tables import Tables, spark_schema
from udfs.find_tissue import TissueSpec, failed_row, find_tissue
from udfs.schemas import FOUND_TISSUE, PER_TILE, SLIDES, TILES
from udfs.wsi import ErrorCode, SlideError

_TILES_A_FILE = 1_000_000  # some 20 MB
_TEXTS = ("image_id", "patient_id", "center_id", "label", "uri", "params_hash", "file_version")
_INPUT = pa.schema(
    dict.fromkeys(_TEXTS, pa.string()) | {"image_num": pa.int32(), "mpp": pa.float64(), "size_bytes": pa.int64()}
)


def find(
    wave: pd.DataFrame, spec: TissueSpec, spark: SparkSession, tables: Tables, progress: Progress, record: Record
) -> None:
    """Bring slides, tiles and indexes up to date for a wave; slides last: its row says that the others are written."""
    _correct_metadata(wave[wave["metadata_stale"]], spark, tables, progress)
    work = wave[wave["slide_stale"]]
    if work.empty:
        return
    images = work[~work["removed"]].rename(columns={"want_slide_hash": "params_hash"})
    to_open, not_found = images[images["error_code"].isna()], images[images["error_code"].notna()]
    done = spark.sparkContext.accumulator(0)
    with progress.stage("slides", len(to_open), lambda: int(done.value)):
        progress.step(f"find tissue on {len(to_open):,} slides")
        rows = spark.createDataFrame(_arrow(to_open, _INPUT))
        # One task per slide: executors share the work evenly, and a task that dies tells which slide killed it.
        found = (
            rows.repartitionByRange(max(1, len(to_open)), "image_id")
            .mapInPandas(find_tissue(spec, record.run_id, done.add), spark_schema(FOUND_TISSUE))
            .persist(StorageLevel.DISK_ONLY)
        )
        zipped = F.inline(F.arrays_zip(*PER_TILE))
        constant = [name for name in TILES.names if name not in PER_TILE]
        tiles = found.where("status = 'ok'").withColumn("tile_px", F.lit(spec.tile_px)).select(*constant, zipped)
        read = found.select("image_id", "n_tiles", "size_bytes", "work").collect()  # here the slides are read
        record.count_work("slides", read)
        progress.step("write")
        tiles = tiles.coalesce(max(1, math.ceil(sum(slide.n_tiles for slide in read) / _TILES_A_FILE)))
        tables.put("tiles", tiles, "image_id", to_open["image_id"], work.loc[work["tile_rows"] > 0, "image_id"])
        indexes = found.where("index IS NOT NULL").coalesce(1)
        tables.put("indexes", indexes, "image_id", to_open["image_id"], work.loc[work["indexed"], "image_id"])
        present = work.loc[work["status"].notna(), "image_id"]
        failed = spark.createDataFrame(_failed_rows(not_found, record.run_id))
        slides = found.select(SLIDES.names).unionByName(failed).coalesce(1)
        tables.put("slides", slides, "image_id", work["image_id"], present)
        record.counts["slides_processed"] += len(images)
        found.unpersist()


def _failed_rows(images: pd.DataFrame, run_id: str) -> pa.Table:
    """The rows of table slides of images whose file the driver could not find: a task has nothing to do for them."""
    errors = [SlideError(ErrorCode(code), text) for code, text in images[["error_code", "error_message"]].to_numpy()]
    records = _arrow(images, _INPUT).to_pylist()
    rows = [failed_row(record, error, run_id) for record, error in zip(records, errors, strict=True)]
    return pa.Table.from_pylist(rows, SLIDES)


def _correct_metadata(images: pd.DataFrame, spark: SparkSession, tables: Tables, progress: Progress) -> None:
    """Correct centre, label, number and place, which come from CSV and listing; no slide is read for them."""
    if len(images):
        with progress.stage("slides"):
            progress.step(f"correct {len(images):,} rows")
            schema = pa.schema([SLIDES.field(name) for name in ("image_id", *METADATA)])
            today = images.drop(columns="uri").rename(columns={new: name for name, new in METADATA.items()})
            tables.upsert("slides", spark.createDataFrame(_arrow(today, schema)), "image_id", METADATA)


def _arrow(rows: pd.DataFrame, schema: pa.Schema) -> pa.Table:
    """The columns of the schema; null if pandas has None or NaN, and whole numbers whole."""
    return pa.Table.from_pandas(rows, schema, preserve_index=False)


JOB = Job(
    "slides",
    reads=("features",),
    writes=("slides", "tiles", "indexes"),
    stages=(lambda run, wave: find(wave, run.tissue_spec, run.spark, run.tables, run.progress, run.record),),
    stale=("slide_stale", "metadata_stale"),
    next_step="the features job encodes the tiles",
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the job; returns the exit status."""
    return run_job(JOB, argv)


if __name__ == "__main__":
    sys.exit(main())
