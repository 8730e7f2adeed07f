"""What table features holds of each slide and encoder, read with Spark for job vectors."""

from collections.abc import Sequence
from typing import NamedTuple

from pyspark.sql import functions as F

from jobs.runtime.tables.tables import Tables
from udfs.wording import is_run_id


class TilesOfSlide(NamedTuple):
    """What table features holds of one slide and encoder."""

    image_id: str
    encoder: str
    patient_id: str
    n_tiles: int
    digest: str | None  # of the places and hashes of the tiles; None: they wait for the features job


def tiles_of_slides(tables: Tables, encoders: Sequence[str]) -> list[TilesOfSlide]:
    """Return what table features holds of each slide and encoder.

    Slides wait for the features job if their tiles have several hashes, or are of a later run than the last that ended: that
    run may have had other weights than the one that made the other slides.
    """
    ended = _last_runs(tables)
    tile = "xxhash64(x_px, y_px, params_hash)"  # the xor of doubled rows is 0, their sum is not
    digest = F.expr(
        f"if(min(params_hash) = max(params_hash), concat(bit_xor({tile}), ' ', sum({tile} % 1000003)), null)"
    )
    rows = tables.read("features").where(F.col("encoder").isin(list(encoders))).groupBy("image_id", "encoder")
    found = rows.agg(
        F.min("patient_id"), F.count("*"), digest.alias("digest"), F.max("run_id").alias("run_id")
    ).collect()

    def is_late(encoder: str, run_id: str) -> bool:
        return is_run_id(run_id) and run_id > ended.get(encoder, run_id)

    every = [(TilesOfSlide(*row[:5]), row.run_id) for row in found]
    return [each._replace(digest=None) if is_late(each.encoder, run_id) else each for each, run_id in every]


def _last_runs(tables: Tables) -> dict[str, str]:
    """The last run that brought features of an encoder up to date, by encoder; it lacks encoders that no run recorded."""
    ended = tables.read("runs").where(
        "status = 'done' AND job != 'patients'"
    )  # which records features that it only read
    by_encoder = ended.select(F.explode("features").alias("encoder", "recipe"), "run_id").groupBy("encoder")
    return {row.encoder: row.last for row in by_encoder.agg(F.max("run_id").alias("last")).collect()}
