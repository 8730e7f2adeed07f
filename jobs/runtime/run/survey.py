"""What a run has to do: for each image of the cohort, what its rows should be against what the tables hold.

A row is stale when its `params_hash` is not the one that today's settings, file and code give. Nothing else decides, so a
run that was killed anywhere goes on where the last commit left it.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import pandas as pd
from pyspark.sql import Column, DataFrame
from pyspark.sql import functions as F

from jobs.runtime.cohort.locating import Located
from jobs.runtime.cohort.patient_csv import Image
from jobs.runtime.settings.config import Config, settings_hash
from jobs.runtime.tables.tables import ConcurrentRunError, Tables
from udfs import bag_patients as patients
from udfs import encode_tiles as features
from udfs import find_tissue as slides
from udfs.wsi import ErrorCode
from udfs.wsi.quality.mask_metric import mask_metrics
from udfs.wsi.store import public_uri

# Columns of slides that do not shape pixels, and what the survey calls today's value: they are corrected in place.
METADATA = {"center_id": "center_id", "label": "label", "image_num": "image_num", "uri": "public_uri"}
_MAY_COME_BACK = (ErrorCode.ACCESS_DENIED, ErrorCode.READ_FAILED)


def take_survey(
    images: Sequence[Image],
    located: Mapping[str, Located],
    tables: Tables,
    config: Config,
    models_fingerprint: Sequence[str | None] | None,
    *,
    retry_failed: bool,
) -> pd.DataFrame:
    """One row an image of the cohort, and one for each image that its patient no longer has (`gone`).

    Args:
        images: the rows of the CSV.
        located: their files.
        tables: what is there.
        config: the settings.
        models_fingerprint: hashes of the encoder's and StainNet's weights; None where the features are not asked for.
        retry_failed: take failed slides for stale.

    Returns:
        Indexed by image_id: patient_id, center_id, label, image_num, uri, public_uri, mpp, file_version, size_bytes,
        error_code, error_message, want_slide_hash, want_features_hash, gone, status (None: no row), slide_hash, tile_rows
        and tiles_hash (all of them), tiles and tiles_digest (selected ones), feature_rows, features_digest,
        features_hash, indexed, slide_stale, metadata_stale, features_stale. A hash is None where rows have several.

    Raises:
        ConcurrentRunError: two runs wrote to slides at once.
    """
    have = _slides_now(tables)
    rows = [
        _wanted(image, located[image.image_id], have.get(image.image_id, {}), config, models_fingerprint)
        for image in images
    ]
    survey = pd.DataFrame(rows).set_index("image_id", drop=False)
    survey["gone"] = False
    digests = _digests_now(tables, config)
    # Also of slides whose own row is not there: a run may have died between two commits.
    owners = {name: str(row["have_patient_id"]) for name, row in have.items()}
    owners = {**digests["features_patient"].dropna(), **digests["tiles_patient"].dropna(), **owners}
    patients_here, images_here = set(survey["patient_id"]), set(survey.index)
    gone = {image: owner for image, owner in owners.items() if owner in patients_here and image not in images_here}
    if gone:
        lost = pd.DataFrame({"image_id": list(gone), "patient_id": list(gone.values()), "gone": True})
        survey = pd.concat([survey, lost.set_index("image_id", drop=False)])
    known = pd.DataFrame.from_dict(have, orient="index", columns=_HAVE)
    survey = survey.join(known).join(digests).rename_axis(None)
    indexed = tables.read("indexes").select("image_id").toPandas()["image_id"]
    survey["indexed"] = survey["image_id"].isin(indexed)
    for count in ("tile_rows", "tiles", "feature_rows"):
        survey[count] = survey[count].fillna(0).astype("int64")
    return _judge(survey, config, retry_failed=retry_failed)


def _wanted(
    image: Image,
    located: Located,
    have: Mapping[str, Any],
    config: Config,
    models_fingerprint: Sequence[str | None] | None,
) -> dict[str, object]:
    info, error = located.info, located.error
    tiling = config.tiling
    version = info.version if info else (error.code.value if error else None)
    unreachable = error is not None and have.get("status") not in (None, "failed")
    if unreachable:  # what was made of the file while it was there stays, as long as the settings do
        version = have["have_file_version"]
    file_hash = settings_hash(image.patient_id, version, image.mpp, tiling.tile_px, tiling.mpp)
    mask = (tiling.mask_downsample, config.tissue_method.identity, tiling.max_background)
    metrics = {metric.column: metric.version for metric in mask_metrics()}
    wanted = asdict(image) | {
        "uri": located.uri,
        "public_uri": have["have_uri"] if unreachable else public_uri(located.uri) if located.uri else None,
        "keep": unreachable and error is not None and error.code in _MAY_COME_BACK,
        "unreachable": unreachable,
        "file_version": info.version if info else None,
        "size_bytes": info.size_bytes if info else None,
        "error_code": error.code.value if error else None,
        "error_message": error.message if error else None,
        "want_slide_hash": settings_hash(slides.VERSION, file_hash, mask, metrics),
        "want_features_hash": None,
    }
    if models_fingerprint is not None:
        encoder = config.encoder
        how = [encoder.name, encoder.input_px, encoder.interpolation, config.histogram.bins]
        # mpp in the CSV moves tiles only where they are read at a target mpp
        where = (version, tiling.tile_px, tiling.mpp, image.mpp if tiling.mpp else None, image.patient_id)
        wanted["want_features_hash"] = settings_hash(features.VERSION, where, how, models_fingerprint)
    return wanted


_HAVE = ["status", "slide_hash", "have_patient_id", "have_file_version", *(f"have_{name}" for name in METADATA)]


def _slides_now(tables: Tables) -> dict[str, dict[str, Any]]:
    """By image_id: the columns of slides that the survey looks at."""
    renamed = {"params_hash": "slide_hash", "patient_id": "have_patient_id", "file_version": "have_file_version"}
    columns = [F.col(old).alias(new) for old, new in renamed.items()]
    columns += [F.col(name).alias(f"have_{name}") for name in METADATA]
    rows = tables.read("slides").select("image_id", "status", *columns)
    found: dict[str, dict[str, Any]] = {}
    for row in rows.collect():
        if row.image_id in found:
            raise ConcurrentRunError(
                f"table slides has {row.image_id} twice: two runs wrote to {public_uri(tables.root)} at once; delete that "
                "folder, or restore its tables to a version from before"
            )
        found[row.image_id] = row.asDict()
    return found


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
    placed = digest(tables.read("tiles"), "tile_rows", "tiles_digest", *_provenance("tiles"))
    if config.tiling.max_tiles_per_patient is None:
        placed["tiles"] = placed["tile_rows"]
    else:
        selected = digest(selected_tiles(tables, config), "tiles", "tiles_digest")
        placed = placed.drop(columns="tiles_digest").join(selected)
    return placed.join(feature_digest(tables.read("features")), how="outer")


def feature_digest(rows: DataFrame) -> pd.DataFrame:
    """By image_id: feature_rows, features_digest, features_hash and features_patient."""
    return digest(rows, "feature_rows", "features_digest", *_provenance("features"))


def _provenance(table: str) -> list[Column]:
    """Of the rows of an image: the hash that all of them have, else null, and a patient that they name."""
    same = F.when(F.min("params_hash") == F.max("params_hash"), F.min("params_hash"))
    return [same.alias(f"{table}_hash"), F.min("patient_id").alias(f"{table}_patient")]


def digest(rows: DataFrame, count: str, name: str, *more: Column) -> pd.DataFrame:
    """By image_id: the number of its tiles, and a hash of the bag of their corners, whatever their order."""
    corner = "xxhash64(x_px, y_px)"  # the sum beside the xor tells doubled rows
    of_tiles = F.expr(f"concat(bit_xor({corner}), ' ', sum({corner} % 1000003))")
    summed = rows.groupBy("image_id").agg(F.count("*").alias(count), of_tiles.alias(name), *more)
    return summed.toPandas().set_index("image_id")


def _judge(survey: pd.DataFrame, config: Config, *, retry_failed: bool) -> pd.DataFrame:
    present = ~survey["gone"].astype(bool)
    ok = survey["status"] == "ok"
    # Tiles are committed before slides: a run that died between the two left tiles of another hash than their slide's.
    torn = (survey["tile_rows"] > 0) & (survey["tiles_hash"] != survey["slide_hash"]) | ok & (survey["tile_rows"] == 0)
    stale = (survey["slide_hash"] != survey["want_slide_hash"]) | torn
    if retry_failed:
        stale |= survey["status"] == "failed"
    survey["slide_stale"] = ~present | (stale & (survey["keep"] != True))  # noqa: E712 - missing for images that are gone
    differs = pd.Series(False, index=survey.index)
    for name, today in METADATA.items():
        wanted, have = survey[today], survey[f"have_{name}"]
        differs |= (wanted != have) & ~(wanted.isna() & have.isna())
    survey["metadata_stale"] = present & ~survey["slide_stale"] & differs
    wanted_rows = survey["tiles"].where(ok, 0)
    digest_same = survey["features_digest"] == survey["tiles_digest"]
    hash_same = survey["features_hash"] == survey["want_features_hash"]
    same = (survey["feature_rows"] == wanted_rows) & ((wanted_rows == 0) | (digest_same & hash_same))
    survey["features_stale"] = survey["slide_stale"] | ~same
    if config.tiling.max_tiles_per_patient:
        # a slide that comes, goes or changes moves the sample of the patient's others
        moved = survey[survey["slide_stale"]]
        survey["features_stale"] |= survey["patient_id"].isin({*moved["patient_id"], *moved["have_patient_id"]})
    survey["features_stale"] &= survey["keep"] != True  # noqa: E712
    return survey


def patient_hash(images: pd.DataFrame, config: Config) -> str | None:
    """The params_hash of a patient's row from its images (status, feature_rows, features_digest, features_hash).

    Returns:
        None where the patient has no tile, and so no row.
    """
    rows = images[~images["gone"].astype(bool)].sort_values("image_id")
    ok = rows["status"] == "ok"
    if not rows.loc[ok, "feature_rows"].sum():
        return None
    parts = [
        (row.image_id, row.status, *((row.features_digest, row.features_hash) if row.status == "ok" else ()))
        for row in rows.itertuples()
    ]
    first = rows.iloc[0]
    dtype = config.output.embedding_dtype
    how = [config.histogram.bins, *([] if dtype == "float32" else [dtype])]
    label = None if pd.isna(first["label"]) else first["label"]  # some versions of pandas make None NaN
    return settings_hash(patients.VERSION, first["center_id"], label, *how, parts)


def plan_waves(effort: Mapping[str, float], slides_a_wave: int) -> list[list[str]]:
    """Group patients into waves.

    Args:
        effort: how much work there is on each patient; 1 is a slide that is read.
        slides_a_wave: a wave is full with so much; a patient is never split.

    Returns:
        Lists of patient_id. Neighbours in name share a wave, so that a Delta file holds a narrow range of them and a
        reader can skip it.
    """
    waves: list[list[str]] = []
    filled = 0.0
    for patient in sorted(effort):
        if not waves or filled + effort[patient] > slides_a_wave:
            waves.append([])
            filled = 0.0
        waves[-1].append(patient)
        filled += effort[patient]
    return waves
