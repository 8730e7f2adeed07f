"""Table patients: everything that the tables know of a patient in one row per encoder, the bag of its tiles included."""

import math
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
from pyspark.sql import DataFrame, SparkSession
from pyspark.sql import functions as F

from jobs.runtime.run.cli import run_job
from jobs.runtime.run.progress import Progress
from jobs.runtime.run.record import Record
from jobs.runtime.run.run import Job
from jobs.runtime.run.snapshot import feature_digest, selected_tiles
from jobs.runtime.run.survey import features_of, patient_hash
from jobs.runtime.settings.config import Config
from jobs.runtime.settings.identity import Identity
from jobs.runtime.spark.resources import plain_executors
from jobs.runtime.spark.session import heap_bytes
from jobs.runtime.tables.tables import Tables, spark_schema
from udfs.bag_patients import BAGS, HEAP_A_BAG, MAX_BAG_BYTES, bag_patient
from udfs.find_tissue import WITHOUT_TILES

BYTES_A_FILE = 1 << 28  # a task writes a file: larger ones would leave executors idle, smaller ones litter the table
_INFO = (
    "patient_id string, encoder string, center_id string, label string, split string, n_images int, n_images_failed int, "
    "n_images_without_tiles int, complete boolean, wanted_tiles int, params_hash string, run_id string"
)
_BAGGED = ["patient_id", "encoder", "image_id", "x_px", "y_px", "embedding", "embedding_max", "color_histogram"]
_COUNTED = (
    "if(n_tiles = wanted_tiles, n_tiles, raise_error(concat('patient ', patient_id, ': ', n_tiles, "
    "' feature rows for ', wanted_tiles, ' tiles: run again')))"
)
Row = dict[str, Any]
Key = tuple[str, str]  # patient_id, encoder


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
        images = wave[["image_id", "patient_id", "center_id", "label", "removed"]].join(slides)
        digests = feature_digest(features)
        have = _hashes_now(tables, ids, digests, identity.encoders)
        wanted: dict[Key, Row] = {}
        by_encoder = {encoder: images.join(features_of(digests, encoder)) for encoder in identity.encoders}
        lacking = _lacking(by_encoder, selected_tiles(tables, config.tiling).where(in_wave))
        for encoder, of_encoder in by_encoder.items():
            for patient, of_patient in of_encoder.groupby("patient_id"):
                if (patient, encoder) not in lacking and (row := _row(of_patient, identity)):
                    wanted[row["patient_id"], encoder] = row | {"encoder": encoder, "run_id": record.run_id}
        tile_bytes = {
            encoder: dim * np.dtype(config.output.embedding_dtype).itemsize
            for encoder, dim in _dims(features, identity.encoders).items()
        }
        heap = heap_bytes(spark)
        most = {encoder: min(MAX_BAG_BYTES, heap // HEAP_A_BAG) // of_tile for encoder, of_tile in tile_bytes.items()}
        build, too_large, drop = decide(wanted, have, most)
        record.problems += [
            _why_too_large(row, tile_bytes[row["encoder"]], most[row["encoder"]], has_row=bag_key(row) in have)
            for row in too_large
        ]
        if not build and not drop:
            return
        splits = tables.read("splits").where(in_wave).select("patient_id", "split")
        split_of = {row.patient_id: row.split for row in splits.collect()}
        ok = list(images.loc[images["status"] == "ok", "image_id"])
        features = features.where(F.col("image_id").isin(ok))
        pack = bag_patient(config.histogram.bins, config.output.embedding_dtype)
        # Each encoder's bags together, so that a reader finds them together; first the removals of encoders that the settings do
        # not name, which no later run would make.
        encoders = {of for _, of in [*map(bag_key, build), *drop]}
        for encoder in sorted(encoders, key=lambda name: (name in identity.encoders, name)):
            rows = [row | {"split": split_of.get(row["patient_id"])} for row in build if row["encoder"] == encoder]
            built = [row["patient_id"] for row in rows]
            sizes = [row["wanted_tiles"] * tile_bytes[encoder] for row in rows]
            own = features.where((F.col("encoder") == encoder) & F.col("patient_id").isin(built)).select(_BAGGED)
            bags = own.groupBy("patient_id").applyInArrow(pack, spark_schema(BAGS))
            info = F.broadcast(spark.createDataFrame(rows, _INFO).drop("encoder"))
            complete = bags.join(info, "patient_id").withColumn("n_tiles", F.expr(_COUNTED).cast("int"))
            complete = complete.coalesce(tasks_for(sizes, heap, plain_executors(spark)))
            name = f" by {encoder}" if len(encoders) > 1 else ""
            progress.step(f"bags of {len(rows):,} patients{name}, write")
            present = [patient for patient, of in have.keys() & {*map(bag_key, rows), *drop} if of == encoder]
            tables.put("patients", complete, "patient_id", built, present, among=("encoder", encoder))
        record.counts["patients_built"] += len({row["patient_id"] for row in build})


def decide(
    wanted: Mapping[Key, Row], have: Mapping[Key, str], most_tiles: Mapping[str, int]
) -> tuple[list[Row], list[Row], list[Key]]:
    """Decide which rows of patients are built, and which are removed.

    A right row stays, however large a bag may be today. An outdated row that is too large to be made again stays, too. A row is
    removed if its patient has no tile any more, or lacks vectors of its encoder.

    Args:
        wanted: by patient_id and encoder, the row of each patient with tiles: encoder, params_hash and wanted_tiles.
        have: params_hash of the existing rows, by patient_id and encoder.
        most_tiles: in the largest bag that fits in the heap, by encoder.

    Returns:
        The rows to build, the rows to build that are too large, and the keys of the rows that are removed.
    """
    differ = [row for key, row in wanted.items() if have.get(key) != row["params_hash"]]
    build = [row for row in differ if row["wanted_tiles"] <= most_tiles[row["encoder"]]]
    too_large = [row for row in differ if row["wanted_tiles"] > most_tiles[row["encoder"]]]
    return build, too_large, [key for key in have if key not in wanted]


def _lacking(images: Mapping[str, pd.DataFrame], tiles: DataFrame) -> set[Key]:
    """The patients and encoders with a slide that has tiles and no row of the encoder, whose numbers are then not finite: no bag
    is made without such a slide.
    """
    without = {
        encoder: rows[(rows["status"] == "ok") & rows["feature_rows"].isna()] for encoder, rows in images.items()
    }
    if all(rows.empty for rows in without.values()):
        return set()
    with_tiles = {row.image_id for row in tiles.select("image_id").distinct().collect()}
    return {
        (patient, encoder)
        for encoder, rows in without.items()
        for image_id, patient in zip(rows["image_id"], rows["patient_id"], strict=True)
        if image_id in with_tiles
    }


def bag_key(row: Row) -> Key:
    """Return patient_id and encoder of a row."""
    return row["patient_id"], row["encoder"]


def _dims(features: DataFrame, encoders: Sequence[str]) -> dict[str, int]:
    """How long vectors are, by encoder; 1 if there is none."""
    firsts = {
        encoder: features.where(F.col("encoder") == encoder).select(F.size("embedding")).first() for encoder in encoders
    }
    return {encoder: first[0] if first else 1 for encoder, first in firsts.items()}


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
        f"patient {row['patient_id']}, encoder {row['encoder']}: a bag of {row['wanted_tiles']:,} tiles is "
        f"{row['wanted_tiles'] * tile:,} bytes, the limit is {most * tile:,}: {row_now}. Set tiling.max_tiles_per_patient to "
        f"{most:,} or less, or give Spark more memory: a bag may take 1/{HEAP_A_BAG} of an executor's heap, and "
        f"{MAX_BAG_BYTES:,} bytes at most"
    )


def _row(images: pd.DataFrame, identity: Identity) -> Row | None:
    """What the row of a patient holds beside the bag of an encoder; None if the patient has no tile."""
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


def _hashes_now(
    tables: Tables, patients: Sequence[str], features: pd.DataFrame, encoders: Sequence[str]
) -> dict[Key, str]:
    """params_hash by patient_id and encoder, of some patients and of those who own no image any more.

    Rows of encoders that the settings do not name are left out, unless `features` lacks a slide of the bag.
    """
    slides = F.when(~F.col("encoder").isin(list(encoders)), F.array_distinct("tile_index.image_id")).alias("slides")
    rows = tables.read("patients").select("patient_id", "encoder", "params_hash", slides)
    owners = tables.read("slides").select("patient_id").distinct().withColumn("owns", F.lit(True))
    is_due = F.col("patient_id").isin(list(patients)) | F.col("owns").isNull()
    rows = rows.join(owners, "patient_id", "left").where(is_due)
    of_patients = features.reset_index().groupby(["features_patient", "encoder"])["image_id"].agg(set).to_dict()
    return {
        (row.patient_id, row.encoder): row.params_hash
        for row in rows.collect()
        if row.slides is None or not set(row.slides) <= of_patients.get((row.patient_id, row.encoder), set())
    }


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
