"""A small cohort and the tables that runs leave of it, without Spark: what the survey sees."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import pandas as pd

from jobs.runtime.cohort.locating import Located
from jobs.runtime.cohort.patient_csv import Image
from jobs.runtime.run.survey import (
    FEATURES_COLUMNS,
    FEATURES_KEY,
    SLIDES_COLUMNS,
    TILES_COLUMNS,
    Snapshot,
    features_of,
    patient_hash,
    take_survey,
)
from jobs.runtime.settings.config import Config
from jobs.runtime.settings.identity import Identity, row_hash
from udfs.wsi import ErrorCode, SlideError
from udfs.wsi.store import FileInfo, StoreUri, public_uri

Corner = tuple[int, int]
CORNERS: tuple[Corner, ...] = ((0, 0), (448, 0), (0, 448))
ENCODER = "efficientnet_b0"
CONFIG = Config.model_validate(
    {
        "patients": "p.csv",
        "output": {"root": "tables"},
        "tiling": {"max_tiles_per_patient": 4},
        "encoders": {ENCODER: {"weights": "encoder.pth"}},
        "inference": {"precision": "bf16"},
        "stain": {"weights": "stain.pth"},
    }
)
COMMITS = ("tiles", "indexes", "slides", "features", "patients")  # of a wave, in order


def image(image_id: str, patient_id: str, label: str | None = "CE", mpp: float | None = None) -> Image:
    """A row of the CSV."""
    return Image(image_id, "north", patient_id, 0, label, None, mpp)


def file_of(image_id: str, version: str = "1") -> Located:
    """A file that is there."""
    return Located(StoreUri(f"/slides/{image_id}.tif"), FileInfo(9, version), None)


def lost(code: ErrorCode) -> Located:
    """A file that cannot be reached."""
    return Located(None, None, SlideError(code, "why"))


def models_of(config: Config, name: str = ENCODER) -> dict[str, str]:
    """What the models add to the identity of an encoder, if files at other URIs hold other numbers."""
    encoder, inference = config.encoders[name], config.inference
    return {
        "encoder.model": encoder.model or name,
        "encoder.weights": row_hash(encoder.weights),
        "encoder.outputs": "embedding 8, embedding_max 8" if encoder.pooling in ("auto", "map") else "embedding 8",
        "encoder.pooling": encoder.pooling,
        "encoder.images": f"{encoder.input_px or 224} px by {encoder.interpolation or 'area'}",
        "encoder.crop": f"{encoder.crop_px or encoder.input_px or 224} px",
        "encoder.mean": str(encoder.mean),
        "encoder.std": str(encoder.std),
        "encoder.build": str(encoder.kwargs),
        "encoder.precision": "fp32"
        if inference.precision in (None, "fp32")
        else f"{inference.precision} by {inference.runtime}",
        "stain.weights": row_hash(config.stain.weights),
    }


def identity_of(config: Config) -> Identity:
    """What shapes rows under these settings."""
    return Identity(config, {name: models_of(config, name) for name in config.encoders})


@dataclass(frozen=True)
class World:
    """What a run finds: settings, the CSV and the files; by default four slides of three patients, one of them missing."""

    config: Config = CONFIG
    images: tuple[Image, ...] = (image("a1", "A"), image("a2", "A"), image("b1", "B"), image("c1", "C", None))
    files: Mapping[str, Located] = field(
        default_factory=lambda: (
            {name: file_of(name) for name in ("a1", "a2", "b1")} | {"c1": lost(ErrorCode.FILE_MISSING)}
        )
    )
    corners: Mapping[str, tuple[Corner, ...]] = field(default_factory=dict)  # of the tiles; of others `CORNERS`

    def change(self, *images: Image, remove: str = "", **files: Located) -> "World":
        """Other rows of the CSV, a row less, other files."""
        rows = {row.image_id: row for row in (*self.images, *images) if row.image_id != remove}
        return replace(self, images=tuple(rows.values()), files=dict(self.files) | files)


Stored = dict[
    str, dict[Any, Any]
]  # by table, then by image_id or (patient_id, encoder); of features by (image_id, encoder)


def stored_by(world: World) -> Stored:
    """The rows that a run on empty tables leaves."""
    identity, limit = identity_of(world.config), world.config.tiling.max_tiles_per_patient
    stored: Stored = {name: {} for name in COMMITS}
    for row in world.images:
        info, error = world.files[row.image_id].info, world.files[row.image_id].error
        version = info.version if info else error.code.value if error else None
        made = identity.slide_hash(row.patient_id, version, row.mpp)
        status = "failed" if error else "ok"
        uri = world.files[row.image_id].uri
        shown = public_uri(uri) if uri else None
        stored["slides"][row.image_id] = dict(
            zip(
                SLIDES_COLUMNS,
                (status, made, row.patient_id, info and info.version, row.center_id, row.label, row.image_num, shown),
                strict=True,
            )
        )
        if not error:
            stored["indexes"][row.image_id] = True
            stored["tiles"][row.image_id] = made, row.patient_id, world.corners.get(row.image_id, CORNERS)
    selected = _selected(stored, limit, world.config.tiling.seed)
    for row in world.images:
        if chosen := selected.get(row.image_id):
            version = stored["slides"][row.image_id]["stored_file_version"]
            for encoder, made_of in identity.features_hashes(row.patient_id, version, row.mpp).items():
                stored["features"][row.image_id, encoder] = made_of, row.patient_id, chosen
    survey = survey_of(world, stored).drop(columns="feature_rows")
    for encoder in identity.encoders:
        for patient, rows in survey.join(features_of(_features(stored), encoder)).groupby("patient_id"):
            if value := patient_hash(rows, identity):
                stored["patients"][str(patient), encoder] = value
    return stored


def _features(stored: Stored) -> pd.DataFrame:
    """The digest of table features."""
    rows = [
        (*key, len(corners), _digest(corners), made, patient)
        for key, (made, patient, corners) in stored["features"].items()
    ]
    return pd.DataFrame(rows, columns=[*FEATURES_KEY, *FEATURES_COLUMNS]).set_index(FEATURES_KEY)


def _selected(stored: Stored, limit: int | None, seed: int) -> dict[str, tuple[Corner, ...]]:
    """By image, the corners that are drawn."""
    places = [(name, corner) for name, (_, _, corners) in stored["tiles"].items() for corner in corners]
    owner = {name: patient for name, (_, patient, _) in stored["tiles"].items()}
    drawn: dict[str, list[tuple[str, Corner]]] = {}
    for place in sorted(places, key=lambda place: row_hash(seed, owner[place[0]], *place)):
        drawn.setdefault(owner[place[0]], []).append(place)
    chosen = {place for of_patient in drawn.values() for place in of_patient[:limit]}
    return {
        name: tuple(corner for corner in corners if (name, corner) in chosen)
        for name, (_, _, corners) in stored["tiles"].items()
    }


def survey_of(world: World, stored: Stored, *, retry_failed: bool = False, identity: Identity | None = None) -> Any:
    """The survey of the world against tables with these rows."""
    limit, seed = world.config.tiling.max_tiles_per_patient, world.config.tiling.seed
    selected = _selected(stored, limit, seed)
    tiles = {
        name: (len(corners), made, patient, len(selected[name]), _digest(selected[name]))
        for name, (made, patient, corners) in stored["tiles"].items()
    }
    snapshot = Snapshot(
        pd.DataFrame.from_dict(stored["slides"], orient="index", columns=SLIDES_COLUMNS),
        pd.DataFrame.from_dict(tiles, orient="index", columns=TILES_COLUMNS),
        _features(stored),
        frozenset(stored["indexes"]),
        stored["patients"],
    )
    return take_survey(
        world.images, world.files, snapshot, identity or identity_of(world.config), retry_failed=retry_failed
    )


def _digest(corners: tuple[Corner, ...]) -> str | None:
    return str(sorted(corners)) if corners else None


def stale_in(survey: pd.DataFrame) -> dict[str, set[str]]:
    """What is stale: images by kind, and patients; kinds of which none is stale are left out."""
    found = {kind: set(survey.index[survey[f"{kind}_stale"]]) for kind in ("slide", "metadata", "features", "patient")}
    return {kind: names for kind, names in found.items() if names}
