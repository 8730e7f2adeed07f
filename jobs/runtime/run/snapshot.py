"""What the tables hold, read with Spark for the survey; and the tiles that are selected to be encoded."""

from collections.abc import Sequence

import pandas as pd
from pyspark.sql import Column, DataFrame
from pyspark.sql import functions as F

from jobs.runtime.run.survey import FEATURES_KEY, METADATA, SLIDES_COLUMNS, Snapshot
from jobs.runtime.settings.sections import TilingSettings
from jobs.runtime.tables.tables import ConcurrentRunError, Tables
from udfs.wsi.store import public_uri


def read_snapshot(tables: Tables, tiling: TilingSettings, *, with_patients: bool) -> Snapshot:
    """Return what the tables hold now; of table patients only if asked.

    Raises:
        ConcurrentRunError: two runs wrote to slides at once.
    """
    tiles = _digest(tables.read("tiles"), "tile_rows", "tiles_digest", *_provenance("tiles"))
    if tiling.max_tiles_per_patient is None:
        tiles["tiles"] = tiles["tile_rows"]
    else:
        selected = _digest(selected_tiles(tables, tiling), "tiles", "tiles_digest")
        tiles = tiles.drop(columns="tiles_digest").join(selected)
    indexed = tables.read("indexes").select("image_id").toPandas()["image_id"]
    columns = ["patient_id", "encoder", "params_hash"]
    patients = tables.read("patients").select(columns).collect() if with_patients else []
    return Snapshot(
        _slides(tables),
        tiles,
        feature_digest(tables.read("features")),
        frozenset(indexed),
        {(row.patient_id, row.encoder): row.params_hash for row in patients},
    )


def selected_tiles(tables: Tables, tiling: TilingSettings) -> DataFrame:
    """Return the tiles to encode: all, or the first `max_tiles_per_patient` by a hash of seed, patient and place."""
    tiles, limit = tables.read("tiles"), tiling.max_tiles_per_patient
    if limit is None:
        return tiles
    # Tiles that later fail to decode count, too: the draw of the others does not depend on what could be read.
    draw = F.xxhash64(F.lit(tiling.seed), "patient_id", "image_id", "x_px", "y_px")
    rank = F.expr("row_number() OVER (PARTITION BY patient_id ORDER BY draw, image_id, x_px, y_px)")
    ranked = tiles.withColumn("draw", draw).withColumn("rank", rank)
    return ranked.where(F.col("rank") <= limit).select(tiles.columns)


def feature_digest(rows: DataFrame) -> pd.DataFrame:
    """Return feature_rows, features_digest, features_hash and features_patient by image_id and encoder."""
    return _digest(rows, "feature_rows", "features_digest", *_provenance("features"), key=FEATURES_KEY)


def _slides(tables: Tables) -> pd.DataFrame:
    columns = ["status", "params_hash", "patient_id", "file_version", *METADATA]
    rows = tables.read("slides").select("image_id", *columns).toPandas().set_index("image_id")
    if rows.index.has_duplicates:
        raise ConcurrentRunError(
            f"table slides has {rows.index[rows.index.duplicated()][0]} twice: two runs wrote to {public_uri(tables.root)} at "
            "once; delete that folder, or restore its tables to a version from before"
        )
    return rows.set_axis(SLIDES_COLUMNS, axis=1)


def _provenance(table: str) -> list[Column]:
    """The hash that all rows of an image have, else null, and a patient that they name."""
    same = F.when(F.min("params_hash") == F.max("params_hash"), F.min("params_hash"))
    return [same.alias(f"{table}_hash"), F.min("patient_id").alias(f"{table}_patient")]


def _digest(rows: DataFrame, count: str, name: str, *more: Column, key: Sequence[str] = ("image_id",)) -> pd.DataFrame:
    """By key: the number of its tiles, and a hash of the bag of their corners in any order."""
    corner = "xxhash64(x_px, y_px)"  # the xor of doubled rows is 0, their sum is not
    of_tiles = F.expr(f"concat(bit_xor({corner}), ' ', sum({corner} % 1000003))")
    summed = rows.groupBy(*key).agg(F.count("*").alias(count), of_tiles.alias(name), *more)
    return summed.toPandas().set_index(list(key))
