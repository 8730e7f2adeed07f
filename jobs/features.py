"""Table features: the tiles of every good slide read, stain-normalised, embedded and counted; no pixel is stored."""

import math
import sys
from collections.abc import Sequence

import pandas as pd
from pyspark import StorageLevel
from pyspark.sql import DataFrame, Row
from pyspark.sql import functions as F

from jobs.runtime.run.cli import run_job
from jobs.runtime.run.run import Job, Run
from jobs.runtime.run.snapshot import selected_tiles
from jobs.runtime.spark.session import slots
from jobs.runtime.tables.tables import spark_schema
from udfs.encode_tiles import encode_tiles
from udfs.plan_units import pack_tasks, plan_units
from udfs.schemas import ENCODED, FEATURES, UNITS

_ROWS_A_FILE = 8192  # about 80 MB
_PLANNERS_A_SLOT = 2
_KEY = ["image_id", "x_px", "y_px"]


def stale(survey: pd.DataFrame) -> "pd.Series[bool]":
    """The images whose slides row is good and whose features are not those of their tiles."""
    return survey["features_stale"] & ~survey["slide_stale"]


def waiting(survey: pd.DataFrame) -> str:
    """How many images have no slides row that is right."""
    number = int(survey["slide_stale"].sum())
    return f"{number} images wait for the slides job: run it, then this again" if number else ""


def encode(run: Run, wave: pd.DataFrame) -> None:
    """Bring features up to date for a wave; a slide whose data does not decode is marked failed in slides."""
    with run.stage("plan"):
        run.step("slides that are done")
        work = _with_slides_done(run, wave[wave["features_stale"]])
        if work.empty:
            return
        present = set(work.loc[work["feature_rows"] > 0, "image_id"])
        done = run.spark.sparkContext.accumulator(0)
        wanted = work.loc[
            work["slide_ok"] & work["uri"].notna(), ["image_id", "uri", "want_features_hash", "file_version_now"]
        ]
        schema = "image_id string, uri string, want_features_hash string, file_version string"
        wanted_rows = F.broadcast(run.spark.createDataFrame(list(wanted.itertuples(index=False, name=None)), schema))
        in_wave = F.col("patient_id").isin(sorted(set(work["patient_id"])))
        tiles = selected_tiles(run.tables, run.config).where(in_wave).join(wanted_rows, "image_id")
        run.step("work units")
        kept: DataFrame | None = None
        if present:  # rows that are still right stay; only tiles that are new are encoded
            right = run.tables.read("features").where(F.col("image_id").isin(sorted(present)))
            right = right.join(tiles.select(*_KEY, "want_features_hash"), _KEY)
            kept = right.where("params_hash = want_features_hash").select(FEATURES.names)
            tiles = tiles.join(kept.select(_KEY), _KEY, "left_anti")
        units = _work_units(run, tiles, list(wanted["image_id"])).persist(StorageLevel.DISK_ONLY)
        planned = units.select("image_id", "unit", "cost", "n_tiles").collect()
        n_tiles = sum(unit.n_tiles for unit in planned)
        # Slides that failed or have no tissue, or tiles that were measured anew and are where they were.
        is_right = not n_tiles and (kept.count() if kept is not None else 0) == int(work["feature_rows"].sum())
    if is_right:  # no commit that changes nothing
        units.unpersist()
        return
    with run.stage("features", n_tiles, lambda: int(done.value)):
        run.step(f"encode {n_tiles:,} tiles")
        encoded = (
            _in_tasks(run, units, planned)
            .mapInArrow(
                encode_tiles(run.feature_spec, run.record.run_id, done.add, tiles_ahead=n_tiles),
                spark_schema(ENCODED),
                profile=run.stage_resources.profile,
            )
            .persist(StorageLevel.DISK_ONLY)
        )
        ends = encoded.where("x_px IS NULL").select(
            "image_id", "n_tiles", "error_code", "error_message", "size_bytes", "work"
        )
        ended = ends.collect()  # here the tiles are encoded
        run.step("write")
        failed = {
            unit.image_id: (unit.image_id, unit.error_code, unit.error_message, "failed", run.record.run_id)
            for unit in ended
            if unit.error_code
        }
        if failed:
            columns = ["error_code", "error_message", "status", "run_id"]
            rows = run.spark.createDataFrame(list(failed.values()), ["image_id", *columns])
            run.tables.upsert("slides", rows, "image_id", columns)
        of_failed = F.col("image_id").isin(list(failed))
        good = encoded.where(F.col("x_px").isNotNull() & ~of_failed)
        good = good.select(FEATURES.names).coalesce(max(1, math.ceil(n_tiles / _ROWS_A_FILE)))
        if kept is not None:
            good = good.unionByName(kept.where(~of_failed))
        run.record.counts["tiles_encoded"] += sum(unit.n_tiles for unit in ended)
        run.record.count_work("features", ended)
        run.tables.put("features", good, "image_id", work["image_id"], present)
        for frame in (units, encoded):
            frame.unpersist()


def _with_slides_done(run: Run, images: pd.DataFrame) -> pd.DataFrame:
    """Those of the images whose row in slides is today's, and those that were removed.

    Further columns: `slide_ok` says which have tiles to encode, `file_version_now` which file these were found in.
    """
    rows = run.tables.read("slides").where(F.col("image_id").isin(list(images["image_id"])))
    now = rows.select("image_id", "status", "file_version", F.col("params_hash").alias("hash")).toPandas()
    images = images.join(now.set_index("image_id").add_suffix("_now"))
    done = images["removed"] | (images["hash_now"] == images["want_slide_hash"])
    images = images[done]
    return images.assign(slide_ok=(images["status_now"] == "ok") & ~images["removed"])


def _work_units(run: Run, tiles: DataFrame, images: list[str]) -> DataFrame:
    """`udfs.schemas.UNITS` of the tiles. Where a slide has no index (an older run's, not a TIFF) its units have none."""
    same = ["image_id", "patient_id", "uri", "tile_px", "level_read", "downsample"]
    corners = F.sort_array(F.collect_list(F.struct("y_px", "x_px")))
    index = run.tables.read("indexes").where(F.col("image_id").isin(images)).select("image_id", "file_version", "index")
    slides = tiles.groupBy(*same, "want_features_hash", "file_version").agg(corners.alias("corners"))
    slides = slides.join(index, ["image_id", "file_version"], "left").withColumnRenamed(
        "want_features_hash", "params_hash"
    )
    slides = slides.select(*same, "params_hash", "corners.x_px", "corners.y_px", "index")
    # A fixed number of partitions: by their size, Spark would plan all slides in one.
    planners = max(1, min(len(images), _PLANNERS_A_SLOT * slots(run.spark)))
    return slides.repartition(planners, "image_id").mapInArrow(
        plan_units(run.config.run.unit_tiles), spark_schema(UNITS)
    )


def _in_tasks(run: Run, units: DataFrame, planned: list[Row]) -> DataFrame:
    """The units, those of a task in a partition of its own, in order; the partition of the costliest task is the first."""
    at_once = run.stage_resources.slots()
    tasks = pack_tasks([(unit.image_id, unit.unit, unit.cost) for unit in planned], at_once)
    of_task = [(unit.image_id, unit.unit, task) for unit, task in zip(planned, tasks, strict=True)]
    numbers = run.spark.createDataFrame(of_task, "image_id string, unit int, task int")
    others = [name for name in UNITS.names if name != "unit"]
    together = F.sort_array(F.collect_list(F.struct("unit", *others))).alias("units")
    rows = units.join(F.broadcast(numbers), ["image_id", "unit"]).groupBy("task").agg(together)
    # Ranges are drawn from a sample that holds every row as long as a task is one row: then each is a range of its own.
    return rows.repartitionByRange(max(1, len(set(tasks))), "task").select(F.inline("units"))


JOB = Job(
    "features",
    reads=("tiles", "indexes"),
    writes=("slides", "features"),
    stages=(encode,),
    stale=stale,
    waiting=waiting,
    models="loaded",
    next_step="the patients job makes one row per patient",
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the job; returns the exit status."""
    return run_job(JOB, argv)


if __name__ == "__main__":
    sys.exit(main())
