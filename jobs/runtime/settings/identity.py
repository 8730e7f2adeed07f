"""What shapes the rows of the tables, by name, and its hashes: settings, weights, file versions and code versions.

A setting says beside its definition which rows it shapes (`Shapes`). The survey, the record of a run, the properties of tables
and the check of job predict derive from this module.
"""

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from jobs.runtime.settings.config import EACH, Config, settings_by_key
from jobs.runtime.settings.setting import at_key, shapes_of
from udfs import bag_patients, encode_tiles, find_tissue
from udfs.wsi.encoder.provenance import PROVENANCE
from udfs.wsi.quality.mask_metric import MaskMetric
from udfs.wsi.quality.pixel_metric import PixelMetric
from udfs.wsi.quality.tile_metrics.background_fraction import BackgroundFraction

Recipe = dict[str, str]  # the value of each thing that shapes rows, by name
_SHAPES = {key: shapes for key, info in settings_by_key() if (shapes := shapes_of(info))}
_HASH = 16  # characters of a hash


class Identity:
    """What shapes rows under some settings.

    Attributes:
        encoders: the names of the encoders.
        models: by encoder, what the loaded models add to the settings, weights by the hash of their numbers; it lacks encoders of
            which this is not known.
        slides: what shapes the rows of slides, tiles and indexes, beside the image's own file and patient.
        selection: what decides which tiles have a row in features.
        draws_tiles: whether these tiles are drawn: then each slide of a patient affects the tiles of the others.
        features: what shapes the rows of features of any encoder, beside the image's own file and patient and the models; not
            which rows exist.
        patients: what shapes the rows of patients, beside their features.
    """

    def __init__(self, config: Config, models: Mapping[str, Recipe] | None = None) -> None:
        """Takes what shapes rows from settings and models; features of encoders that `models` lacks have no hash."""
        self.encoders, self.models = tuple(config.encoders), dict(models or {})
        # Of the tissue methods, only the chosen one shapes masks.
        self.slides = {key: value for key, value in _values(config, "slides").items() if not key.startswith("tissue.")}
        self.slides |= {f"tissue.{key}": json.dumps(value) for key, value in config.tissue_method.identity.items()}
        self.slides |= {"code.slides": str(find_tissue.VERSION), "code.background": str(BackgroundFraction.version)}
        self.selection = _values(config, "selection")
        self.draws_tiles = config.tiling.max_tiles_per_patient is not None
        if not self.draws_tiles:
            del self.selection["tiling.seed"]
        self.features = _values(config, "features") | {"code.features": str(encode_tiles.VERSION)}
        self.patients = _values(config, "patients") | {"code.patients": str(bag_patients.VERSION)}
        self._is_resampled = config.tiling.mpp is not None
        # metrics are columns of tiles and features, not of bags
        self._of_slides = row_hash(self.slides, {metric.column: metric.version for metric in MaskMetric.defined()})
        of_pixels = {f"metric.{metric.column}": metric.version for metric in PixelMetric.defined()}
        self._of_features = {
            encoder: row_hash(self.features | of_models | of_pixels) for encoder, of_models in self.models.items()
        }

    def recipe(self, encoder: str) -> Recipe:
        """Returns what shapes a bag, except for its dtype: a model is good for bags of the recipe that it learned from.

        A row's params_hash does not say this, because it also covers the row's own file and patient.
        """
        code = {"code.patients": self.patients["code.patients"]}
        return self.slides | self.selection | self.features | self.models.get(encoder, {}) | code

    def slide_hash(self, patient_id: str, file_version: str | None, mpp: float | None) -> str:
        """Returns the params_hash of an image's rows in slides, tiles and indexes; `mpp` is that of the CSV."""
        return row_hash(self._of_slides, patient_id, file_version, mpp)

    def features_hashes(self, patient_id: str, file_version: str | None, mpp: float | None) -> dict[str, str]:
        """Returns the params_hash of an image's rows in features, by encoder; it lacks encoders whose models are not known.

        The hash leaves out what decides where tiles lie: a tile that stays where it was is not encoded again.
        """
        # mpp of the CSV moves tiles only if they are read at a target mpp
        file = patient_id, file_version, mpp if self._is_resampled else None
        return {encoder: row_hash(of_rows, *file) for encoder, of_rows in self._of_features.items()}

    def patient_hash(self, center_id: str, label: str | None, images: Sequence[Any]) -> str:
        """Returns the params_hash of a patient's row for an encoder; `images` are the plain values that tell its images apart."""
        return row_hash(self.patients, center_id, label, images)


def row_hash(*values: Any) -> str:
    """Returns a short hash of plain values, the same in every process and on every machine."""
    text = json.dumps(values, sort_keys=True, separators=(",", ":"), default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:_HASH]


def recorded_models(
    config: Config, encoder: str, runs: Iterable[tuple[str, Mapping[str, Mapping[str, str]]]]
) -> Recipe | None:
    """Returns what the models of an encoder added to the settings in the first of some runs that had the same settings of it.

    Args:
        config: the settings now.
        encoder: its name.
        runs: columns config and features of table runs, newest first.

    Returns:
        None if no run had these settings.
    """
    wanted = _of_features(config.masked(), encoder)
    # Settings that only the recorded run had, such as the seed of a draw, are no part of the models.
    known = {*Identity(config).recipe(encoder), *PROVENANCE}
    known |= {key for key, shapes in _SHAPES.items() if not shapes.by_content}
    for settings, recipes in runs:
        if encoder in recipes and _of_features(json.loads(settings), encoder) == wanted:
            return {key: value for key, value in recipes[encoder].items() if key not in known}
    return None


def differences(now: Mapping[str, str], known: Sequence[Mapping[str, str]]) -> list[str]:
    """Returns how `now` differs from the nearest of the known recipes, one text per value; empty if one agrees."""

    def differing(recipe: Mapping[str, str]) -> list[str]:
        # a value that one of them lacks does not count: tiling.seed if no tiles are drawn
        return [f"{key} is {value}, not {recipe[key]}" for key, value in now.items() if recipe.get(key, value) != value]

    return min((differing(recipe) for recipe in known), key=len, default=[])


def settings_of(config: Config, table: str) -> dict[str, Any]:
    """Returns the settings that shape a table's rows by their value, by dotted key."""
    return {
        key: value
        for key, info, value in config.each()
        if (shapes := shapes_of(info)) and table in shapes.tables and not shapes.by_content
    }


def _values(config: Config, table: str) -> Recipe:
    found = {key: json.dumps(value) for key, value in settings_of(config, table).items()}
    if table == "features" and config.stain.weights is None:
        found["stain.weights"] = "null"
    return found


def _of_features(settings: Mapping[str, Any], encoder: str) -> dict[str, Any]:
    """The settings that shape features of an encoder, as they are written."""
    inference = settings.get("inference", {})
    precision = inference.get("precision") or ("the preset's" if inference.get("device") == "cuda" else "fp32")
    own = dict(settings) | {"encoders": {EACH: settings.get("encoders", {}).get(encoder)}}
    own |= {"inference": inference | {"precision": precision}}
    return {key: at_key(own, key) for key, shapes in _SHAPES.items() if "features" in shapes.tables}
