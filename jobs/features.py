"""Table features: the tiles of every good slide read, stain-normalised, embedded by each encoder and counted.

No pixel is stored.
"""

import math
import sys
from collections import Counter
from collections.abc import Collection, Mapping, Sequence

import pandas as pd
from pyspark import StorageLevel
from pyspark.sql import DataFrame, Row, SparkSession
from pyspark.sql import functions as F

from jobs.runtime.run.cli import run_job
from jobs.runtime.run.progress import Progress
from jobs.runtime.run.record import Record
from jobs.runtime.run.run import Job
from jobs.runtime.run.snapshot import selected_tiles
from jobs.runtime.settings.config import Config
from jobs.runtime.spark.resources import StageResources
from jobs.runtime.spark.session import slots
from jobs.runtime.tables.catalog import are_in
from jobs.runtime.tables.tables import Tables, spark_schema
from udfs.encode_tiles import FeatureSpec, encode_tiles
from udfs.plan_units import pack_tasks, plan_units
from udfs.schemas import ENCODED, FEATURES, UNITS
from udfs.wording import some

_ROWS_A_FILE = 8192  # about 80 MB
_PLANNERS_A_SLOT = 2
_KEY = ["image_id", "x_px", "y_px", "encoder"]
_WANTED = (
    "image_id string, uri string, file_version string, encoders array<struct<encoder: string, params_hash: string>>"
)
_PER_SLIDE = ["image_id", "patient_id", "uri", "tile_px", "level_read", "downsample", "file_version"]  # of its tiles


def encode(
    wave: pd.DataFrame,
    config: Config,
    spec: FeatureSpec,
    resources: StageResources,
    spark: SparkSession,
    tables: Tables,
    progress: Progress,
    record: Record,
) -> None:
    """Bring features up to date for a wave; a slide whose data does not decode is marked failed in slides."""
    with progress.stage("plan"):
        progress.step("slides that are done")
        work = _with_slides_done(tables, wave[wave["features_stale"]])
        if work.empty:
            return
        present = set(work.loc[work["feature_rows"] > 0, "image_id"])
        done = spark.sparkContext.accumulator(0)
        wanted = work[work["slide_ok"] & work["uri"].notna()]
        encoders_of = [
            [(name, value) for name, value in hashes.items() if name in stale]
            for hashes, stale in zip(wanted["want_features_hashes"], wanted["stale_encoders"], strict=True)
        ]
        rows = list(zip(wanted["image_id"], wanted["uri"], wanted["file_version_now"], encoders_of, strict=True))
        wanted_rows = F.broadcast(spark.createDataFrame(rows, _WANTED))
        in_wave = F.col("patient_id").isin(sorted(set(work["patient_id"])))
        tiles = selected_tiles(tables, config.tiling).where(in_wave).join(wanted_rows, "image_id")
        progress.step("work units")
        kept: DataFrame | None = None
        if present:  # rows that are still right stay; only tiles that are new are encoded
            right = tables.read("features").where(F.col("image_id").isin(sorted(present)))
            each = tiles.withColumn("wanted", F.explode("encoders")).withColumn("encoder", F.col("wanted.encoder"))
            right = right.join(each.select(*_KEY, "wanted"), _KEY)
            kept = right.where("params_hash = wanted.params_hash").select(FEATURES.names)
            missing = each.join(kept.select(_KEY), _KEY, "left_anti").groupBy([*_PER_SLIDE, "x_px", "y_px"])
            tiles = missing.agg(F.sort_array(F.collect_list("wanted")).alias("encoders"))
        units = _work_units(tables, tiles, list(wanted["image_id"]), config.run.unit_tiles)
        units = units.persist(StorageLevel.DISK_ONLY)
        planned = units.select("image_id", "unit", "cost", "n_tiles").collect()
        n_tiles = sum(unit.n_tiles for unit in planned)
        # Slides that failed or have no tissue, or tiles that were measured again and did not move.
        is_right = not n_tiles and (kept.count() if kept is not None else 0) == int(work["feature_rows"].sum())
    if is_right:  # no commit that changes nothing
        units.unpersist()
        return
    with progress.stage("features", n_tiles, lambda: int(done.value)):
        progress.step(f"encode {n_tiles:,} tiles")
        encoders = {name for of_image in encoders_of for name, _ in of_image}
        encode_units = encode_tiles(spec, record.run_id, done.add, encoders=encoders, tiles_ahead=n_tiles)
        encoded = (
            in_tasks(units, planned, resources.slots())
            .mapInArrow(encode_units, spark_schema(ENCODED), profile=resources.profile)
            .persist(StorageLevel.DISK_ONLY)
        )
        columns = ["image_id", "encoder", "n_tiles", "error_code", "error_message", "size_bytes", "work"]
        ended = encoded.where("x_px IS NULL").select(columns).collect()  # here the tiles are encoded
        progress.step("write")
        bad = sorted({unit.image_id for unit in ended if unit.encoder})
        others = tables.read("features").where(~F.col("encoder").isin(list(config.encoders)))
        rows_of_others = (
            others.where(F.col("image_id").isin(bad)).select("image_id").distinct().collect() if bad else []
        )
        faults, of_encoders = _faults(ended, config.encoders, {row.image_id for row in rows_of_others})
        failed = {
            image_id: (image_id, unit.error_code, unit.error_message, "failed", record.run_id)
            for image_id, unit in faults.items()
        }
        record.problems += _problems(of_encoders)
        if failed:
            columns = ["error_code", "error_message", "status", "run_id"]
            fates = spark.createDataFrame(list(failed.values()), ["image_id", *columns])
            tables.upsert("slides", fates, "image_id", columns)
        of_failed = F.col("image_id").isin(list(failed))
        if of_encoders:
            of_failed |= F.expr(are_in(("image_id", "encoder"), of_encoders))
        good = encoded.where(F.col("x_px").isNotNull() & ~of_failed)
        good = good.select(FEATURES.names).coalesce(max(1, math.ceil(n_tiles * len(encoders) / _ROWS_A_FILE)))
        if kept is not None:
            good = good.unionByName(kept.where(~of_failed))
        record.counts["tiles_encoded"] += sum(unit.n_tiles for unit in ended)
        record.count_work("features", ended)
        stale_of = zip(work["image_id"], work["stale_encoders"], strict=True)
        pairs = [(image_id, encoder) for image_id, stale in stale_of for encoder in stale]
        encoded_now = {(image_id, name) for (image_id, *_), of in zip(rows, encoders_of, strict=True) for name, _ in of}
        if present or any(pair not in of_encoders and pair[0] not in failed for pair in encoded_now):
            tables.replace("features", good, are_in(("image_id", "encoder"), pairs) if present else None)
        for frame in (units, encoded):
            frame.unpersist()


def _faults(
    ended: Sequence[Row], encoders: Collection[str], of_others: Collection[str]
) -> tuple[dict[str, Row], dict[tuple[str, str], str]]:
    """Tell slides that fail from those that lack the vectors of some encoders only.

    Args:
        ended: how units went; with an encoder, that its vectors are not finite.
        encoders: all of the settings.
        of_others: the slides that have rows of other encoders.

    Returns:
        By image_id, a unit of each slide that cannot be read or that no encoder can embed; and the message of each other
        image_id and encoder.
    """
    faults = {unit.image_id: unit for unit in ended if unit.error_code and not unit.encoder}
    by_encoder = {(unit.image_id, unit.encoder): unit for unit in ended if unit.encoder}
    n_encoders = Counter(image_id for image_id, _ in by_encoder)
    all_bad = {image_id for image_id, number in n_encoders.items() if number == len(encoders)} - set(of_others)
    faults = {unit.image_id: unit for unit in by_encoder.values() if unit.image_id in all_bad} | faults
    return faults, {key: unit.error_message for key, unit in by_encoder.items() if key[0] not in faults}


def _problems(messages: Mapping[tuple[str, str], str]) -> list[str]:
    """A line per encoder that lacks slides, from the messages by image_id and encoder."""
    lines = []
    for encoder in sorted({name for _, name in messages}):
        slides = sorted(image_id for image_id, name in messages if name == encoder)
        first = messages[slides[0], encoder]
        lines.append(
            f"{len(slides)} slides lack vectors of encoder {encoder}, the next run tries them again: {some(slides)}: {first}"
        )
    return lines


def in_tasks(units: DataFrame, planned: Sequence[Row], at_once: int) -> DataFrame:
    """Return the units in order, with the units of each task in a partition of its own, the costliest task first.

    Args:
        units: as `udfs.schemas.UNITS`.
        planned: their image_id, unit and cost.
        at_once: how many tasks run at once.
    """
    tasks = pack_tasks([(unit.image_id, unit.unit, unit.cost) for unit in planned], at_once)
    of_task = [(unit.image_id, unit.unit, task) for unit, task in zip(planned, tasks, strict=True)]
    numbers = units.sparkSession.createDataFrame(of_task, "image_id string, unit int, task int")
    others = [name for name in UNITS.names if name != "unit"]
    together = F.sort_array(F.collect_list(F.struct("unit", *others))).alias("units")
    rows = units.join(F.broadcast(numbers), ["image_id", "unit"]).groupBy("task").agg(together)
    # Spark draws ranges from a sample. With one row per task the sample has every row, so each task gets a range of its own.
    return rows.repartitionByRange(max(1, len(set(tasks))), "task").select(F.inline("units"))


def _with_slides_done(tables: Tables, images: pd.DataFrame) -> pd.DataFrame:
    """The images whose row in slides is today's, and those that were removed.

    Further columns: `slide_ok` says which have tiles to encode, `file_version_now` which file these were found in.
    """
    rows = tables.read("slides").where(F.col("image_id").isin(list(images["image_id"])))
    now = rows.select("image_id", "status", "file_version", F.col("params_hash").alias("hash")).toPandas()
    images = images.join(now.set_index("image_id").add_suffix("_now"))
    images = images[images["removed"] | (images["hash_now"] == images["want_slide_hash"])]
    return images.assign(slide_ok=(images["status_now"] == "ok") & ~images["removed"])


def _work_units(tables: Tables, tiles: DataFrame, images: Sequence[str], unit_tiles: int) -> DataFrame:
    """`udfs.schemas.UNITS` of the tiles. If a slide has no index (an older run's, not a TIFF) its units have none."""
    corners = F.sort_array(F.collect_list(F.struct("y_px", "x_px")))
    index = tables.read("indexes").where(F.col("image_id").isin(images)).select("image_id", "file_version", "index")
    slides = tiles.groupBy(*_PER_SLIDE, "encoders").agg(corners.alias("corners"))
    slides = slides.join(index, ["image_id", "file_version"], "left").drop("file_version")
    slides = slides.select("*", "corners.x_px", "corners.y_px").drop("corners")
    # A fixed number of partitions: by their size, Spark would plan all slides in one.
    planners = max(1, min(len(images), _PLANNERS_A_SLOT * slots(tiles.sparkSession)))
    # In one order: units are numbered along it, also if Spark makes a lost partition again.
    slides = slides.repartition(planners, "image_id").sortWithinPartitions("image_id", "encoders")
    return slides.mapInArrow(plan_units(unit_tiles), spark_schema(UNITS))


JOB = Job(
    "features",
    reads=("tiles", "indexes"),
    writes=("slides", "features"),
    stages=(
        lambda run, wave: encode(
            wave,
            run.config,
            run.compared_feature_spec,
            run.stage_resources,
            run.spark,
            run.tables,
            run.progress,
            run.record,
        ),
    ),
    stale=("features_due",),
    waits_for={"slides": "slide_stale"},
    models="loaded",
    next_step="the patients job makes one row per patient",
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the job; returns the exit status."""
    return run_job(JOB, argv)


if __name__ == "__main__":
    sys.exit(main())
