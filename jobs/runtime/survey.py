"""What a run has to do: for each image of the cohort, what its rows should be against what the tables hold.

A row is stale when its `params_hash` is not the one that today's settings, file and code give. Nothing else decides, so a
run that was killed anywhere goes on where the last commit left it.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict

import pandas as pd
from pyspark.sql import Column, DataFrame
from pyspark.sql import functions as F

from jobs.runtime.cohort import Image, Located
from jobs.runtime.config import Config, settings_hash
from jobs.runtime.tables import Tables
from udfs import features, patients, slides

METADATA = ["center_id", "label", "image_num"]  # of the CSV, in slides, and of no influence on pixels


def take_survey(
    images: Sequence[Image],
    located: Mapping[str, Located],
    tables: Tables,
    config: Config,
    models_fingerprint: Sequence[str | None] | None,
) -> pd.DataFrame:
    """One row an image of the cohort, and one for each image that its patient no longer has (`gone`).

    Args:
        images: the rows of the CSV.
        located: their files.
        tables: what is there.
        config: the settings.
        models_fingerprint: hashes of the encoder's and StainNet's weights; None where the features are not asked for.

    Returns:
        Indexed by image_id: patient_id, center_id, label, image_num, uri, mpp, file_version, size_bytes, error_code,
        error_message, want_slide_hash, want_features_hash, gone, status (None: no row), slide_hash, tiles and
        tiles_digest (selected ones), has_tiles, feature_rows, features_digest, features_hash (None: several),
        slide_stale, metadata_stale, features_stale.
    """
    rows = [_wanted(image, located[image.image_id], config, models_fingerprint) for image in images]
    survey = pd.DataFrame(rows).set_index("image_id", drop=False)
    survey["gone"] = False
    have = _slides_now(tables)
    gone = have[have["have_patient_id"].isin(set(survey["patient_id"])) & ~have.index.isin(survey.index)]
    if len(gone):
        lost = pd.DataFrame({"image_id": gone.index, "patient_id": gone["have_patient_id"], "gone": True})
        survey = pd.concat([survey, lost.set_index("image_id", drop=False)])
    survey = survey.join(have).join(_digests_now(tables, config)).rename_axis(None)
    # also of slides whose row is not there yet: a run may have died between the two commits
    placed = {row.image_id for row in tables.read("tiles").select("image_id").distinct().toLocalIterator()}
    survey["has_tiles"] = survey.index.isin(placed)
    survey[["tiles", "feature_rows"]] = survey[["tiles", "feature_rows"]].fillna(0).astype("int64")
    return _judge(survey, config)


def _wanted(
    image: Image, located: Located, config: Config, models_fingerprint: Sequence[str | None] | None
) -> dict[str, object]:
    info, error = located.info, located.error
    tiling = config.tiling
    version = info.version if info else (error.code.value if error else None)
    file_hash = settings_hash(image.patient_id, version, image.mpp, tiling.tile_px, tiling.mpp)
    mask = (tiling.mask_downsample, tiling.background_brightness, tiling.max_background)
    wanted = asdict(image) | {
        "uri": located.uri,
        "file_version": info.version if info else None,
        "size_bytes": info.size_bytes if info else None,
        "error_code": error.code.value if error else None,
        "error_message": error.message if error else None,
        "want_slide_hash": settings_hash(slides.VERSION, file_hash, mask),
        "want_features_hash": None,
    }
    if models_fingerprint is not None:
        encoder = config.encoder
        how = (encoder.name, encoder.input_px, encoder.interpolation, config.histogram.bins)
        # mpp in the CSV moves tiles only where they are read at a target mpp
        where = (version, tiling.tile_px, tiling.mpp, image.mpp if tiling.mpp else None, image.patient_id)
        wanted["want_features_hash"] = settings_hash(features.VERSION, where, how, models_fingerprint)
    return wanted


def _slides_now(tables: Tables) -> pd.DataFrame:
    rows = tables.read("slides").select(
        "image_id",
        "status",
        F.col("params_hash").alias("slide_hash"),
        *(F.col(name).alias(f"have_{name}") for name in ("center_id", "label", "image_num", "patient_id")),
    )
    return rows.toPandas().set_index("image_id")


def selected_tiles(tables: Tables, config: Config) -> DataFrame:
    """The tiles that are encoded: all, or the first `max_tiles_per_patient` by a hash of seed, patient and place."""
    tiles = tables.read("tiles")
    limit = config.tiling.max_tiles_per_patient
    if limit is None:
        return tiles
    # Of all tiles, also those that turn out not to decode: who else is drawn does not hang on what could be read.
    draw = F.xxhash64(F.lit(config.tiling.seed), "patient_id", "image_id", "x_px", "y_px")
    ranked = tiles.withColumn("draw", draw)
    rank = F.expr("row_number() OVER (PARTITION BY patient_id ORDER BY draw, image_id, x_px, y_px)")
    return ranked.withColumn("rank", rank).where(F.col("rank") <= limit).select(tiles.columns)


def _digests_now(tables: Tables, config: Config) -> pd.DataFrame:
    tiles = digest(selected_tiles(tables, config), "tiles", "tiles_digest")
    rows = tables.read("features")
    features_hash = F.when(F.min("params_hash") == F.max("params_hash"), F.min("params_hash")).alias("features_hash")
    encoded = digest(rows, "feature_rows", "features_digest", features_hash)
    return tiles.join(encoded, how="outer")


def digest(rows: DataFrame, count: str, name: str, *more: Column) -> pd.DataFrame:
    """By image_id: the number of its tiles, and a hash of the set of their corners, whatever their order."""
    of_tiles = F.expr("bit_xor(xxhash64(x_px, y_px))")
    summed = rows.groupBy("image_id").agg(F.count("*").alias(count), of_tiles.cast("string").alias(name), *more)
    return summed.toPandas().set_index("image_id")


def _judge(survey: pd.DataFrame, config: Config) -> pd.DataFrame:
    present = ~survey["gone"].astype(bool)
    survey["slide_stale"] = ~present | (survey["slide_hash"] != survey["want_slide_hash"])
    differs = pd.Series(False, index=survey.index)
    for name in METADATA:
        wanted, have = survey[name], survey[f"have_{name}"]
        differs |= (wanted != have) & ~(wanted.isna() & have.isna())
    survey["metadata_stale"] = present & ~survey["slide_stale"] & differs
    wanted_rows = survey["tiles"].where(survey["status"] == "ok", 0)
    same = (survey["feature_rows"] == wanted_rows) & (
        (wanted_rows == 0)
        | (
            (survey["features_digest"] == survey["tiles_digest"])
            & (survey["features_hash"] == survey["want_features_hash"])
        )
    )
    survey["features_stale"] = survey["slide_stale"] | ~same
    if (
        config.tiling.max_tiles_per_patient
    ):  # a slide that comes, goes or changes moves the sample of the patient's others
        moved = survey[survey["slide_stale"]]
        patients_moved = {*moved["patient_id"], *moved["have_patient_id"]}
        survey["features_stale"] |= survey["patient_id"].isin(patients_moved)
    return survey


def patient_hash(images: pd.DataFrame, config: Config) -> str | None:
    """The params_hash of a patient's row from its images (status, tiles, tiles_digest, want_features_hash).

    Returns:
        None where the patient has no tile, and so no row.
    """
    rows = images[~images["gone"].astype(bool)].sort_values("image_id")
    ok = rows["status"] == "ok"
    if not rows.loc[ok, "tiles"].sum():
        return None
    parts = [
        (row.image_id, row.status, row.tiles_digest if row.status == "ok" else None, row.want_features_hash)
        for row in rows.itertuples()
    ]
    first = rows.iloc[0]
    return settings_hash(patients.VERSION, first["center_id"], first["label"], config.histogram.bins, parts)


def plan_waves(stale: Mapping[str, int], slides_a_wave: int) -> list[list[str]]:
    """Group patients into waves.

    Args:
        stale: how many slides of each patient there are to work on.
        slides_a_wave: a wave is full with so many; a patient is never split.

    Returns:
        Lists of patient_id. Neighbours in name share a wave, so that a Delta file holds a narrow range of them and a
        reader can skip it.
    """
    waves: list[list[str]] = []
    filled = 0
    for patient in sorted(stale):
        size = max(stale[patient], 1)
        if not waves or filled + size > slides_a_wave:
            waves.append([])
            filled = 0
        waves[-1].append(patient)
        filled += size
    return waves
