"""Table patients: everything that the tables know of a patient in one row, the bags of its tiles included."""

import math
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
from pyspark.sql import SparkSession
from pyspark.sql import functions as F

from jobs.runtime.run.cli import run_job
from jobs.runtime.run.progress import Progress
from jobs.runtime.run.record import Record
from jobs.runtime.run.run import Job
from jobs.runtime.run.snapshot import feature_digest
from jobs.runtime.run.survey import patient_hash
from jobs.runtime.settings.config import Config
from jobs.runtime.settings.identity import Identity
from jobs.runtime.spark.resources import plain_executors
from jobs.runtime.spark.session import heap_bytes
from jobs.runtime.tables.tables import Tables, spark_schema
from udfs.bag_patients import BAGS, HEAP_A_BAG, MAX_BAG_BYTES, bag_patient
from udfs.find_tissue import WITHOUT_TILES

BYTES_A_FILE = 1 << 28  # a task writes a file: larger ones would leave executors idle, smaller ones litter the table
_INFO = (
    "patient_id string, center_id string, label string, split string, n_images int, n_images_failed int, "
    "n_images_without_tiles int, complete boolean, wanted_tiles int, params_hash string, run_id string"
)
Row = dict[str, Any]


def assemble(
    wave: pd.DataFrame,
    config: Config,
    identity: Identity,
    spark: SparkSession,
    tables: Tables,
    progress: Progress,
    record: Record,
) -> None:
    """Bring patients up to date for a wave."""
    ids = sorted(set(wave["patient_id"]))
    in_wave = F.col("patient_id").isin(ids)
    with progress.stage("patients"):
        progress.step(f"state of {len(ids):,} patients")
        slides = tables.read("slides").where(in_wave).select("image_id", "status").toPandas().set_index("image_id")
        features = tables.read("features").where(in_wave)
        images = wave[["image_id", "patient_id", "center_id", "label", "removed"]]
        images = images.join(slides).join(feature_digest(features))
        images["feature_rows"] = images["feature_rows"].fillna(0).astype("int64")
        have = _hashes_now(tables, ids)
        rows = {str(patient): _row(of_patient, identity) for patient, of_patient in images.groupby("patient_id")}
        wanted = {patient: row | {"run_id": record.run_id} for patient, row in rows.items() if row}
        first = features.select(F.size("embedding").alias("dim")).first()
        tile_bytes = (first.dim if first else 1) * np.dtype(config.output.embedding_dtype).itemsize
        heap = heap_bytes(spark)
        most = min(MAX_BAG_BYTES, heap // HEAP_A_BAG) // tile_bytes
        build, too_large, drop = decide(wanted, have, most)
        record.problems += [
            _why_too_large(row, tile_bytes, most, has_row=row["patient_id"] in have) for row in too_large
        ]
        if not build and not drop:
            return
        splits = tables.read("splits").where(in_wave).select("patient_id", "split")
        split_of = {row.patient_id: row.split for row in splits.collect()}
        info = spark.createDataFrame([row | {"split": split_of.get(row["patient_id"])} for row in build], _INFO)
        built = [row["patient_id"] for row in build]
        ok = list(images.loc[images["status"] == "ok", "image_id"])
        features = features.where(F.col("patient_id").isin(built) & F.col("image_id").isin(ok))
        columns = ["patient_id", "image_id", "x_px", "y_px", "embedding", "embedding_max", "color_histogram"]
        pack = bag_patient(config.histogram.bins, config.output.embedding_dtype)
        bags = features.select(columns).groupBy("patient_id").applyInArrow(pack, spark_schema(BAGS))
        counted = F.expr(
            "if(n_tiles = wanted_tiles, n_tiles, raise_error(concat('patient ', patient_id, ': ', n_tiles, "
            "' feature rows for ', wanted_tiles, ' tiles: run again'))) "
        )
        complete = bags.join(F.broadcast(info), "patient_id").withColumn("n_tiles", counted.cast("int"))
        sizes = [row["wanted_tiles"] * tile_bytes for row in build]
        complete = complete.coalesce(tasks_for(sizes, heap, plain_executors(spark)))
        progress.step(f"bags of {len(build):,} patients, write")
        tables.put("patients", complete, "patient_id", built, [p for p in have if p in built or p in drop])
        record.counts["patients_built"] += len(build)


def decide(
    wanted: Mapping[str, Row], have: Mapping[str, str], most_tiles: int
) -> tuple[list[Row], list[Row], list[str]]:
    """Decide which rows of patients are built, and which are removed.

    A right row stays, however large a bag may be today. An outdated row that is too large to be made again stays, too. A row is
    removed only if its patient has no tile any more.

    Args:
        wanted: by patient_id, the row of each patient with tiles: its params_hash and wanted_tiles.
        have: params_hash of the existing rows, by patient_id.
        most_tiles: in the largest bag that fits in the heap.

    Returns:
        The rows to build, the rows to build that are too large, and the patients whose row is removed.
    """
    differ = [row for patient, row in wanted.items() if have.get(patient) != row["params_hash"]]
    build = [row for row in differ if row["wanted_tiles"] <= most_tiles]
    too_large = [row for row in differ if row["wanted_tiles"] > most_tiles]
    return build, too_large, [patient for patient in have if patient not in wanted]


def tasks_for(bags: Sequence[int], heap: int, executors: int) -> int:
    """Return how many tasks build and write bags of so many bytes each.

    An executor runs no more of them at once than its heap has room for, even if all bags are as large as the largest: Spark
    deals tasks out in turn to idle executors, and before this stage all are idle.
    """
    files = math.ceil(2 * sum(bags) / BYTES_A_FILE)
    room = heap // (HEAP_A_BAG * max(bags, default=1))
    return max(1, min(files, max(1, room) * executors))


def _why_too_large(row: Row, tile: int, most: int, *, has_row: bool) -> str:
    """Why the row of a patient is not made: a tile has `tile` bytes, and `most` tiles fit in a bag."""
    row_now = "its row stays, and is older than the CSV, slides or settings" if has_row else "it gets no row"
    return (
        f"patient {row['patient_id']}: a bag of {row['wanted_tiles']:,} tiles is {row['wanted_tiles'] * tile:,} bytes, the limit "
        f"is {most * tile:,}: {row_now}. Set tiling.max_tiles_per_patient to {most:,} or less, or give Spark more memory: a bag "
        f"may take 1/{HEAP_A_BAG} of an executor's heap, and {MAX_BAG_BYTES:,} bytes at most"
    )


def _row(images: pd.DataFrame, identity: Identity) -> Row | None:
    """What the row of a patient holds beside the bags; None if the patient has no tile."""
    value = patient_hash(images, identity)
    if value is None:
        return None
    present = images[~images["removed"]]
    first = present.iloc[0]
    return {
        "patient_id": first["patient_id"],
        "center_id": first["center_id"],
        "label": None if pd.isna(first["label"]) else first["label"],
        "n_images": len(present),
        "n_images_failed": int((present["status"] == "failed").sum()),
        "n_images_without_tiles": int(present["status"].isin(WITHOUT_TILES).sum()),
        "complete": bool((present["status"] == "ok").all()),
        "wanted_tiles": int(images.loc[images["status"] == "ok", "feature_rows"].sum()),
        "params_hash": value,
    }


def _hashes_now(tables: Tables, patients: Sequence[str]) -> dict[str, str]:
    """params_hash by patient_id, of some patients and of those who own no image any more."""
    rows = tables.read("patients").select("patient_id", "params_hash")
    owners = tables.read("slides").select("patient_id").distinct().withColumn("owns", F.lit(True))
    is_due = F.col("patient_id").isin(list(patients)) | F.col("owns").isNull()
    rows = rows.join(owners, "patient_id", "left").where(is_due)
    return {row.patient_id: row.params_hash for row in rows.collect()}


JOB = Job(
    "patients",
    reads=("slides", "tiles", "indexes", "features", "splits"),
    writes=("patients",),
    stages=(
        lambda run, wave: assemble(wave, run.config, run.identity, run.spark, run.tables, run.progress, run.record),
    ),
    stale=("patient_stale",),
    waits_for={"slides": "slide_stale", "features": "features_stale"},
    models="recorded",
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the job; returns the exit status."""
    return run_job(JOB, argv)


if __name__ == "__main__":
    sys.exit(main())
