"""Tables slides, tiles and indexes: one pass over each slide finds header, tissue and tiles, or what is wrong with it."""

import math
import sys
from collections.abc import Sequence

import pandas as pd
import pyarrow as pa
from pyspark import StorageLevel
from pyspark.sql import DataFrame
from pyspark.sql import functions as F

from jobs.runtime.run.cli import run_job
from jobs.runtime.run.run import Job, Run
from jobs.runtime.run.survey import METADATA
from jobs.runtime.tables.tables import spark_schema
from udfs.find_tissue import failed_row, find_tissue
from udfs.schemas import FOUND_TISSUE, PER_TILE, SLIDES, TILES
from udfs.wsi import ErrorCode, SlideError

_TILES_A_FILE = 1_000_000  # some 20 MB
_TEXTS = ("image_id", "patient_id", "center_id", "label", "uri", "params_hash", "file_version")
_INPUT = pa.schema(
    dict.fromkeys(_TEXTS, pa.string()) | {"image_num": pa.int32(), "mpp": pa.float64(), "size_bytes": pa.int64()}
)


def stale(survey: pd.DataFrame) -> "pd.Series[bool]":
    """The images whose row in slides is not what it should be."""
    return survey["slide_stale"] | survey["metadata_stale"]


def find(run: Run, wave: pd.DataFrame) -> None:
    """Bring slides, tiles and indexes up to date for a wave; slides last: a row there says that the others are there."""
    _correct_metadata(run, wave[wave["metadata_stale"]])
    work = wave[wave["slide_stale"]]
    if work.empty:
        return
    images = work[~work["removed"]].rename(columns={"want_slide_hash": "params_hash"})
    to_open = images[images["error_code"].isna()]
    done = run.spark.sparkContext.accumulator(0)
    with run.stage("slides", len(to_open), lambda: int(done.value)):
        run.step(f"find tissue on {len(to_open):,} slides")
        rows = run.spark.createDataFrame(_arrow(to_open, _INPUT))
        # A task a slide: even over executors, and a task that dies tells which slide killed it.
        found = (
            rows.repartitionByRange(max(1, len(to_open)), "image_id")
            .mapInPandas(find_tissue(run.tissue_spec, run.record.run_id, done.add), spark_schema(FOUND_TISSUE))
            .persist(StorageLevel.DISK_ONLY)
        )
        zipped = F.inline(F.arrays_zip(*PER_TILE))
        constant = [name for name in TILES.names if name not in PER_TILE]
        tiles = (
            found.where("status = 'ok'")
            .withColumn("tile_px", F.lit(run.config.tiling.tile_px))
            .select(*constant, zipped)
        )
        read = found.select("image_id", "n_tiles", "size_bytes", "work").collect()  # here the slides are read
        run.record.count_work("slides", read)
        run.step("write")
        tiles = tiles.coalesce(max(1, math.ceil(sum(slide.n_tiles for slide in read) / _TILES_A_FILE)))
        run.tables.put("tiles", tiles, "image_id", to_open["image_id"], work.loc[work["tile_rows"] > 0, "image_id"])
        indexes = found.where("index IS NOT NULL").coalesce(1)
        run.tables.put("indexes", indexes, "image_id", to_open["image_id"], work.loc[work["indexed"], "image_id"])
        present = work.loc[work["status"].notna(), "image_id"]
        slides = found.select(SLIDES.names).unionByName(_unopened(run, images)).coalesce(1)
        run.tables.put("slides", slides, "image_id", work["image_id"], present)
        run.record.counts["slides_processed"] += len(images)
        found.unpersist()


def _unopened(run: Run, images: pd.DataFrame) -> DataFrame:
    """The rows of table slides of those images whose file the driver could not find: there is nothing for a task to do."""
    failed = images[images["error_code"].notna()]
    errors = [SlideError(ErrorCode(code), text) for code, text in failed[["error_code", "error_message"]].to_numpy()]
    records = _arrow(failed, _INPUT).to_pylist()
    rows = [failed_row(record, error, run.record.run_id) for record, error in zip(records, errors, strict=True)]
    return run.spark.createDataFrame(pa.Table.from_pylist(rows, SLIDES))


def _correct_metadata(run: Run, images: pd.DataFrame) -> None:
    """Centre, label, number and place come from CSV and listing: where they changed, no slide need be read again."""
    if len(images):
        with run.stage("slides"):
            run.step(f"correct {len(images):,} rows")
            schema = pa.schema([SLIDES.field(name) for name in ("image_id", *METADATA)])
            today = images.drop(columns="uri").rename(columns={new: name for name, new in METADATA.items()})
            run.tables.upsert("slides", run.spark.createDataFrame(_arrow(today, schema)), "image_id", METADATA)


def _arrow(rows: pd.DataFrame, schema: pa.Schema) -> pa.Table:
    """The columns of the schema; null where pandas has None or NaN, and whole numbers whole."""
    return pa.Table.from_pandas(rows, schema, preserve_index=False)


JOB = Job(
    "slides",
    reads=("features",),
    writes=("slides", "tiles", "indexes"),
    stages=(find,),
    stale=stale,
    next_step="the features job encodes the tiles",
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the job; returns the exit status."""
    return run_job(JOB, argv)


if __name__ == "__main__":
    sys.exit(main())
