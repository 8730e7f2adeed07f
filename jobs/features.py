"""Table features: the tiles of every good slide read, stain-normalised, embedded and counted; no pixel is stored."""

import math
import sys
from collections.abc import Sequence

import pandas as pd
from pyspark import StorageLevel
from pyspark.sql import DataFrame, Window
from pyspark.sql import functions as F

from jobs.runtime.cli import run_job
from jobs.runtime.run import Run
from jobs.runtime.survey import selected_tiles
from jobs.runtime.tables import SCHEMAS, spark_schema
from udfs.features import encode_tiles
from udfs.schemas import ENCODED

_ROWS_A_FILE = 8192  # about 80 MB
_KEY = ["image_id", "x_px", "y_px"]


def stale(run: Run, survey: pd.DataFrame) -> "pd.Series[bool]":
    """The images whose slides row is good and whose features are not those of their tiles."""
    waiting = int(survey["slide_stale"].sum())
    if waiting and run.job == "features":
        run.problems.append(f"{waiting} images wait for the slides job: run it, then this again")
    return survey["features_stale"] & ~survey["slide_stale"]


def encode(run: Run, wave: pd.DataFrame) -> None:
    """Bring features up to date for a wave; a slide whose data does not decode is marked failed in slides."""
    work = _with_slides_done(run, wave[wave["features_stale"]])
    if work.empty:
        return
    present = set(work.loc[work["feature_rows"] > 0, "image_id"])
    done = run.spark.sparkContext.accumulator(0)
    wanted = work.loc[work["slide_ok"] & work["uri"].notna(), ["image_id", "uri", "want_features_hash"]]
    schema = "image_id string, uri string, want_features_hash string"
    wanted_rows = F.broadcast(run.spark.createDataFrame(list(wanted.itertuples(index=False, name=None)), schema))
    in_wave = F.col("patient_id").isin(sorted(set(work["patient_id"])))
    tiles = selected_tiles(run.tables, run.config).where(in_wave).join(wanted_rows, "image_id")
    with run.stage("plan"):
        kept: DataFrame | None = None
        if present:  # rows that are still right stay; only tiles that are new are encoded
            right = run.tables.read("features").where(F.col("image_id").isin(sorted(present)))
            right = right.join(tiles.select(*_KEY, "want_features_hash"), _KEY)
            kept = right.where("params_hash = want_features_hash").select(SCHEMAS["features"].names)
            tiles = tiles.join(kept.select(_KEY), _KEY, "left_anti")
        units = _work_units(tiles, run.config.run.unit_tiles).persist(StorageLevel.DISK_ONLY)
        n_units, n_tiles = units.agg(F.count("*"), F.coalesce(F.sum(F.size("x_px")), F.lit(0))).collect()[0]
    if not n_tiles and not present:  # slides that failed or have no tissue: nothing to write, so no empty commit
        units.unpersist()
        return
    with run.stage("features", int(n_tiles), lambda: int(done.value)):
        # The range of a unit's key is a partition of its own: a task a unit, however the tiles spread over slides.
        encoded = (
            units.repartitionByRange(max(1, n_units), "image_id", "unit")
            .mapInArrow(encode_tiles(run.feature_spec, run.run_id, done.add), spark_schema(ENCODED))
            .persist(StorageLevel.DISK_ONLY)
        )
        failures = encoded.where("error_code IS NOT NULL").select("image_id", "error_code", "error_message")
        failed = {
            row.image_id: (*row, "failed", run.run_id) for row in failures.collect()
        }  # here the tiles are encoded
        if failed:
            columns = ["error_code", "error_message", "status", "run_id"]
            rows = run.spark.createDataFrame(list(failed.values()), ["image_id", *columns])
            run.tables.upsert("slides", rows, "image_id", columns)
        of_failed = F.col("image_id").isin(list(failed))
        good = encoded.where(F.col("error_code").isNull() & ~of_failed)
        good = good.select(SCHEMAS["features"].names).coalesce(max(1, math.ceil(n_tiles / _ROWS_A_FILE)))
        if kept is not None:
            good = good.unionByName(kept.where(~of_failed))
        # Before the commit: Spark drops what it holds of frames that were made from a table when that table changes.
        run.counts["tiles_encoded"] += encoded.where("error_code IS NULL").count()
        run.tables.put("features", good, "image_id", work["image_id"], present)
        for frame in (units, encoded):
            frame.unpersist()


def _with_slides_done(run: Run, images: pd.DataFrame) -> pd.DataFrame:
    """Those of the images whose row in slides is today's, or that are gone; `slide_ok` says which have tiles to encode."""
    rows = run.tables.read("slides").where(F.col("image_id").isin(list(images["image_id"])))
    now = rows.select(
        "image_id", F.col("status").alias("status_now"), F.col("params_hash").alias("hash_now")
    ).toPandas()
    images = images.join(now.set_index("image_id"))
    done = images["gone"].astype(bool) | (images["hash_now"] == images["want_slide_hash"])
    images = images[done]
    return images.assign(slide_ok=(images["status_now"] == "ok") & ~images["gone"].astype(bool))


def _work_units(tiles: DataFrame, unit_tiles: int) -> DataFrame:
    """A row for each `unit_tiles` neighbouring tiles of one slide, row by row of the slide.

    A unit never holds two slides and does not depend on what else is in the wave, so its batches, and with them the last
    bit of every embedding, come out the same however a run is cut into waves and tasks. (Where only some tiles of a slide
    are new, its units hold these alone, and a last bit may differ from a run that encoded them all.)
    """
    place = F.row_number().over(Window.partitionBy("image_id").orderBy("y_px", "x_px")) - 1
    same = ["image_id", "patient_id", "uri", "want_features_hash", "tile_px", "level_read", "downsample"]
    numbered = tiles.withColumn("unit", F.floor(place / unit_tiles))
    corners = F.sort_array(F.collect_list(F.struct("y_px", "x_px")))
    units = numbered.groupBy(*same, "unit").agg(corners.alias("corners"))
    return units.select(
        "image_id",
        "unit",
        "patient_id",
        "uri",
        F.col("want_features_hash").alias("params_hash"),
        "tile_px",
        "level_read",
        "downsample",
        F.col("corners.x_px").alias("x_px"),
        F.col("corners.y_px").alias("y_px"),
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Run the job; returns the exit status."""
    return run_job("features", __doc__, [encode], stale, argv)


if __name__ == "__main__":
    sys.exit(main())
