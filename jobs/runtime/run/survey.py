"""What a run has to do: for each image of the cohort, what its rows should be against what the tables hold.

A row is stale if its `params_hash` is not the one that today's settings, file and code give. Nothing else decides, so a run
that was killed continues at the last commit. The survey is a function of plain values.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import pandas as pd

from jobs.runtime.cohort.locating import Located
from jobs.runtime.cohort.patient_csv import Image
from jobs.runtime.settings.identity import Identity
from udfs.wsi import ErrorCode
from udfs.wsi.store import public_uri

# Columns of slides that do not shape pixels, and what the survey calls today's value: they are corrected in place.
METADATA = {"center_id": "center_id", "label": "label", "image_num": "image_num", "uri": "public_uri"}
_MAY_COME_BACK = (ErrorCode.ACCESS_DENIED, ErrorCode.READ_FAILED)
SLIDES_COLUMNS = [
    "status",
    "slide_hash",
    "stored_patient_id",
    "stored_file_version",
    *(f"stored_{n}" for n in METADATA),
]
TILES_COLUMNS = ["tile_rows", "tiles_hash", "tiles_patient", "tiles", "tiles_digest"]
FEATURES_COLUMNS = ["feature_rows", "features_digest", "features_hash", "features_patient"]
FEATURES_KEY = ["image_id", "encoder"]


@dataclass(frozen=True)
class Snapshot:
    """What the tables hold; the frames are indexed by image_id, and `features` by `FEATURES_KEY`.

    Attributes:
        slides: columns `SLIDES_COLUMNS`.
        tiles: columns `TILES_COLUMNS`: how many rows, their params_hash (None if they have several) and patient; how many of
            them are selected to be encoded, and a digest of the corners of these.
        features: columns `FEATURES_COLUMNS`, the same of table features.
        indexed: the images that have a row in indexes.
        patients: params_hash by patient_id and encoder.
    """

    slides: pd.DataFrame
    tiles: pd.DataFrame
    features: pd.DataFrame
    indexed: frozenset[str]
    patients: Mapping[tuple[str, str], str]


def take_survey(
    images: Sequence[Image],
    located: Mapping[str, Located],
    snapshot: Snapshot,
    identity: Identity,
    *,
    retry_failed: bool,
) -> pd.DataFrame:
    """Return one row per image of the cohort, and one per image that its patient no longer has (`removed`).

    Args:
        images: the rows of the CSV.
        located: the files of the images.
        snapshot: what the tables hold.
        identity: what shapes rows under today's settings. Features of encoders whose models it does not know are all stale.
        retry_failed: take failed slides as stale.

    Returns:
        Indexed by image_id: patient_id, center_id, label, image_num, uri, public_uri, mpp, file_version, size_bytes,
        error_code, error_message, want_slide_hash, want_features_hashes (by encoder), removed, unreachable, indexed, the columns
        of slides and tiles in the snapshot (status None: no row), stale_encoders (those whose rows in features are made anew or
        go), feature_rows (how many rows these have), and the flags slide_stale, metadata_stale, features_stale (there are stale
        encoders), features_due (stale, and the row in slides is right) and patient_stale.
    """
    stored = snapshot.slides.to_dict("index")
    rows = [
        _wanted(image, located[image.image_id], stored.get(image.image_id, {}), identity) | {"removed": False}
        for image in images
    ]
    features = snapshot.features.reset_index("encoder")
    tables = (snapshot.slides, snapshot.tiles, features)
    patient_columns = ("stored_patient_id", "tiles_patient", "features_patient")
    # Tiles and features name owners, too: a run may have died before it committed the row of the slide.
    owners = pd.concat([table[column] for table, column in zip(tables, patient_columns, strict=True)]).dropna()
    present, cohort = {image.image_id for image in images}, {image.patient_id for image in images}
    rows += [
        {"image_id": image, "patient_id": owner, "removed": True, "keep": False, "unreachable": False}
        for image, owner in owners[~owners.index.duplicated()].items()
        if owner in cohort and image not in present
    ]
    survey = pd.DataFrame(rows).set_index("image_id", drop=False)
    for table in tables[:2]:  # one join of all tables would lose the type of flags
        survey = survey.join(table)
    survey = survey.rename_axis(None)
    survey["indexed"] = survey["image_id"].isin(snapshot.indexed)
    for count in ("tile_rows", "tiles"):
        survey[count] = pd.to_numeric(survey[count]).fillna(0).astype("int64")
    _judge_slides(survey, retry_failed=retry_failed)
    _judge_features(survey, snapshot.features, identity)
    _judge_patients(survey, snapshot, identity)
    return survey


def _wanted(image: Image, located: Located, stored: Mapping[Any, Any], identity: Identity) -> dict[str, Any]:
    info, error = located.info, located.error
    version = info.version if info else (error.code.value if error else None)
    unreachable = error is not None and stored.get("status") not in (None, "failed")
    if unreachable:  # the rows that were made of the file stay as long as the settings do
        version = stored["stored_file_version"]
    return asdict(image) | {
        "uri": located.uri,
        "public_uri": stored["stored_uri"] if unreachable else public_uri(located.uri) if located.uri else None,
        "keep": unreachable and error is not None and error.code in _MAY_COME_BACK,
        "unreachable": unreachable,
        "file_version": info.version if info else None,
        "size_bytes": info.size_bytes if info else None,
        "error_code": error.code.value if error else None,
        "error_message": error.message if error else None,
        "want_slide_hash": identity.slide_hash(image.patient_id, version, image.mpp),
        "want_features_hashes": identity.features_hashes(image.patient_id, version, image.mpp),
    }


def features_of(features: pd.DataFrame, encoder: str) -> pd.DataFrame:
    """Return the rows of an encoder in a frame indexed by `FEATURES_KEY`, by image_id."""
    return features[features.index.get_level_values("encoder") == encoder].droplevel("encoder")


def _judge_slides(survey: pd.DataFrame, *, retry_failed: bool) -> None:
    removed, ok = survey["removed"], survey["status"] == "ok"
    # Tiles are committed before slides: a run that died in between left tiles with another hash than their slide.
    torn = (survey["tile_rows"] > 0) & (survey["tiles_hash"] != survey["slide_hash"]) | ok & (survey["tile_rows"] == 0)
    stale = (survey["slide_hash"] != survey["want_slide_hash"]) | torn
    if retry_failed:
        stale |= survey["status"] == "failed"
    survey["slide_stale"] = removed | stale & ~survey["keep"]
    differs = pd.Series(False, index=survey.index)
    for name, today in METADATA.items():
        wanted, stored = survey[today], survey[f"stored_{name}"]
        differs |= (wanted != stored) & ~(wanted.isna() & stored.isna())
    survey["metadata_stale"] = ~removed & ~survey["slide_stale"] & differs


def _judge_features(survey: pd.DataFrame, features: pd.DataFrame, identity: Identity) -> None:
    wanted_rows = survey["tiles"].where(survey["status"] == "ok", 0)
    moved = survey[survey["slide_stale"]]
    stale_of: dict[str, pd.Series[bool]] = {}
    rows_of: dict[str, pd.Series[int]] = {}
    for encoder in sorted({*identity.encoders, *features.index.get_level_values("encoder")}):
        stored = features_of(features, encoder).reindex(survey.index)
        rows = rows_of[encoder] = pd.to_numeric(stored["feature_rows"]).fillna(0).astype("int64")
        # Rows of an encoder that the settings do not name stay, unless their patient no longer has the image.
        stale = (rows > 0) & (survey["removed"] | (stored["features_patient"] != survey["patient_id"]))
        if encoder in identity.encoders:
            digest_same = stored["features_digest"] == survey["tiles_digest"]
            hash_same = stored["features_hash"] == survey["want_features_hashes"].map(_of(encoder))
            stale = survey["slide_stale"] | ~((rows == wanted_rows) & ((wanted_rows == 0) | (digest_same & hash_same)))
            if identity.draws_tiles:
                # a slide that is added, removed or changed moves the sample of the patient's other slides
                stale |= survey["patient_id"].isin({*moved["patient_id"], *moved["stored_patient_id"]})
        stale_of[encoder] = stale & ~survey["keep"]
    by_image = pd.DataFrame(stale_of)
    survey["stale_encoders"] = [tuple(by_image.columns[row]) for row in by_image.to_numpy(bool)]
    survey["feature_rows"] = (pd.DataFrame(rows_of) * by_image).sum(axis=1).astype("int64")
    survey["features_stale"] = by_image.any(axis=1)
    survey["features_due"] = survey["features_stale"] & ~survey["slide_stale"]


def _of(encoder: str) -> Callable[[Any], str | None]:
    return lambda hashes: hashes.get(encoder) if isinstance(hashes, dict) else None


def _judge_patients(survey: pd.DataFrame, snapshot: Snapshot, identity: Identity) -> None:
    waiting = set(survey.loc[survey["slide_stale"] | survey["features_stale"], "patient_id"])
    ready = survey[~survey["patient_id"].isin(waiting)].drop(columns="feature_rows")
    wrong: set[str] = set()
    for encoder in identity.encoders:
        groups = ready.join(features_of(snapshot.features, encoder)).groupby("patient_id")
        wanted = {str(name): patient_hash(of_patient, identity) for name, of_patient in groups}
        wrong |= {name for name, value in wanted.items() if snapshot.patients.get((name, encoder)) != value}
    survey["patient_stale"] = survey["patient_id"].isin(wrong)


def patient_hash(images: pd.DataFrame, identity: Identity) -> str | None:
    """Return the params_hash of a patient's row for an encoder, from the patient's images (status) and their rows in features of
    this encoder (feature_rows, features_digest, features_hash).

    Returns:
        None if the patient has no tile, and so no row.
    """
    rows = images[~images["removed"]].sort_values("image_id")
    ok = rows["status"] == "ok"
    if not rows.loc[ok, "feature_rows"].sum():
        return None
    parts = [
        (row.image_id, row.status, *((row.features_digest, row.features_hash) if row.status == "ok" else ()))
        for row in rows.itertuples()
    ]
    first = rows.iloc[0]
    label = None if pd.isna(first["label"]) else first["label"]  # some versions of pandas make None NaN
    return identity.patient_hash(first["center_id"], label, parts)


def plan_waves(effort: Mapping[str, float], slides_a_wave: int) -> list[list[str]]:
    """Group patients into waves.

    Args:
        effort: how much work there is on each patient; 1 is a slide that is read.
        slides_a_wave: the most work of a wave; a patient is never split.

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
