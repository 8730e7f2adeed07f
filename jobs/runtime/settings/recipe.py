"""What features are made with: every setting, weight file and code version that shapes a bag, by name, to compare runs by.

A model is good for features of the recipe that it learned from. A row's params_hash can't tell that, for it holds the
row's own file and patient too.
"""

import json
from collections.abc import Mapping, Sequence

from jobs.runtime.settings.config import Config
from udfs import bag_patients as patients
from udfs import encode_tiles as features
from udfs import find_tissue as slides
from udfs.encode_tiles import Models
from udfs.wsi.encoder.network import Network

Recipe = dict[str, str]
_SETTINGS = (
    "tiling.tile_px",
    "tiling.mpp",
    "tiling.mask_downsample",
    "tiling.background_brightness",
    "tiling.max_background",
    "tiling.max_tiles_per_patient",
    "tiling.seed",
    "encoder.name",
    "encoder.input_px",
    "encoder.interpolation",
    "histogram.bins",
)


def settings_recipe(config: Config) -> Recipe:
    """The part that the settings alone tell."""
    sections = config.model_dump(mode="json")
    found = {key: json.dumps(sections[key.partition(".")[0]][key.partition(".")[2]]) for key in _SETTINGS}
    if config.tiling.max_tiles_per_patient is None:
        del found["tiling.seed"]  # nothing is drawn
    if config.stain.weights is None:
        found["stain.weights"] = "null"
    return found


def full_recipe(config: Config, models: Models[Network]) -> Recipe:
    """All of it; weights by the hash of their numbers, so that they may lie elsewhere."""
    return settings_recipe(config) | {
        **dict(part.split("=", 1) for part in models.identity),
        "code": f"slides {slides.VERSION}, features {features.VERSION}, patients {patients.VERSION}",
    }


def differences(now: Mapping[str, str], known: Sequence[Mapping[str, str]]) -> list[str]:
    """What in `now`, as far as it goes, differs from the nearest of the known recipes; nothing where one is the same."""

    def differing(recipe: Mapping[str, str]) -> list[str]:
        # a setting that one of them does not have says nothing: tiling.seed where no tiles are drawn
        return [f"{key} is {value}, not {recipe[key]}" for key, value in now.items() if recipe.get(key, value) != value]

    return min((differing(recipe) for recipe in known), key=len, default=[])
