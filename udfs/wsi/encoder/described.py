"""Models that a folder or a repository on the hub describes: a config.json as timm writes it, and the weights beside it."""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from udfs.wsi.encoder.encoder_spec import INPUT_PX, Argument
from udfs.wsi.encoder.preset import IMAGENET_MEAN, IMAGENET_STD, Licence, Preset
from udfs.wsi.encoder.presets import PRESETS
from udfs.wsi.weights.checkpoint import CheckpointError
from udfs.wsi.weights.hub import FILE, REPOSITORY, WEIGHTS, HubReference, hub_file

FOLDER = "local-dir:"
_CONFIG = "config.json"
_CROP_PCT = 0.875  # timm's, if a model does not say
_LICENCE = Licence("not known", is_commercial=False)


def preset_of(name: str) -> Preset | None:
    """Return the preset of a name, or the one that a folder or repository describes; None for a model of timm.

    Raises:
        CheckpointError: the hub does not give the description.
        ValueError: the name begins as one of a folder or repository, and nothing there describes a model of timm.
    """
    if name.startswith(FOLDER):
        path = Path(name.removeprefix(FOLDER)) / _CONFIG
        if not path.is_file():
            raise ValueError(f"encoder.name = {name}: the folder has no {_CONFIG}: give one that timm or a hub wrote")
        return _described(name, path)
    try:
        reference = HubReference.parse(name)
    except ValueError as error:
        raise ValueError(f"encoder.name = {name}: {error}") from None
    return _described(name, hub_file(reference, [_CONFIG])) if reference else PRESETS.get(name)


def published_weights(name: str, preset: Preset) -> str:
    """Return where the weights of a preset are, as `udfs.wsi.weights.sources.open_weights` takes it."""
    if name.startswith(FOLDER):
        folder = Path(name.removeprefix(FOLDER))
        found = next((folder / file for file in WEIGHTS if (folder / file).is_file()), None)
        if not found:
            raise CheckpointError(f"{folder} has no {' or '.join(WEIGHTS)}: put one there, or set encoder.weights")
        return str(found)
    if name.startswith(REPOSITORY):
        return name
    revision = f"@{preset.revision}" if preset.revision else ""
    return f"{FILE}{preset.repository}{revision}/{preset.file}"


def _described(name: str, path: Path) -> Preset:
    try:
        config = json.loads(path.read_text())
        if "model_type" in config:
            raise ValueError(f"it is of {config['model_type']} of transformers")
        architecture = config["architecture"]
        data = config.get("pretrained_cfg", config)
        arguments = config.get("model_args") or {}
        edge = _edge(arguments.get("img_size") or data.get("input_size", [3, INPUT_PX])[-1])
        interpolation = data.get("interpolation")
        return Preset(
            name=name,
            architecture=str(architecture),
            kwargs=_kwargs(arguments),
            repository=name.removeprefix(REPOSITORY),
            mean=_colour(data.get("mean", IMAGENET_MEAN)),
            std=_colour(data.get("std", IMAGENET_STD)),
            input_px=math.floor(edge / data.get("crop_pct", _CROP_PCT)),
            crop_px=edge,
            interpolation="bilinear" if interpolation == "bilinear" else "bicubic",
            pooling="auto",
            dim=int(config.get("num_features") or 0),
            mpp=None,
            licence=_LICENCE,
            sources=(),
        )
    except (ValueError, KeyError, TypeError, AttributeError, ZeroDivisionError, OSError) as error:
        raise ValueError(
            f"encoder.name = {name}: its {_CONFIG} does not describe a model of timm ({type(error).__name__}: {error}): set "
            "encoder.name to a preset or a timm model of the same shape, and encoder.weights to the file of weights"
        ) from None


def _kwargs(arguments: Mapping[str, Any]) -> dict[str, Argument]:
    """What the model is built with, beside its output, which slidelake chooses."""
    return {
        key: _edge(value) if key == "img_size" else value
        for key, value in arguments.items()
        if key not in ("num_classes", "in_chans", "drop_rate", "drop_path_rate")
    }


def _edge(size: Any) -> int:
    """Of a square image, which configurations give as one number or as two."""
    height, width = (size, size) if isinstance(size, int) else size
    if height != width:
        raise ValueError(f"images of {height} x {width} px are not square")
    return int(height)


def _colour(values: Any) -> tuple[float, float, float]:
    red, green, blue = map(float, values)
    return red, green, blue
