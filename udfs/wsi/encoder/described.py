"""Models that a folder or a repository on the hub describes: a config.json of timm or transformers, and the weights beside it."""

import json
import math
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from udfs.wsi.colour import Colour, checked_mean, checked_std
from udfs.wsi.encoder.arguments import check_arguments
from udfs.wsi.encoder.encoder_spec import INPUT_PX, Argument, EncoderSpec, Resampling
from udfs.wsi.encoder.preset import IMAGENET_MEAN, IMAGENET_STD, Layout, Licence, Preset
from udfs.wsi.encoder.presets import PRESETS
from udfs.wsi.store import absolute_uri
from udfs.wsi.weights.checkpoint import CheckpointError
from udfs.wsi.weights.hub import FILE, REPOSITORY, WEIGHTS, HubReference, hub_file

FOLDER = "local-dir:"
_CONFIG, _PROCESSOR = "config.json", "preprocessor_config.json"
_CROP_PCT = 0.875  # timm's, if a model does not say
_LICENCE = Licence("not known", is_commercial=False)
_RESAMPLINGS: Mapping[Any, Resampling] = {2: "bilinear", 3: "bicubic"}  # by Pillow's number, which transformers writes
_EPS = 1e-6  # of timm's layer normalisation
_OF_CLASSIFIER_AND_TRAINING = ("num_classes", "in_chans", "drop_rate", "drop_path_rate")
_LAYOUTS: Mapping[str, Layout] = {
    "vit": "ViT",
    "dinov2": "Dinov2",
    "dinov2_with_registers": "Dinov2WithRegisters",
}

Read = Callable[[str], dict[str, Any]]
"""The content of a JSON file of a folder or repository, by its name."""


def preset_of(spec: EncoderSpec) -> Preset | None:
    """Return the preset of an encoder, or the one that a folder or repository describes; None for a model of timm.

    Raises:
        CheckpointError: the hub does not give the description.
        ValueError: the name begins as one of a folder or repository, and nothing there describes a model; or the repository is
            that of a preset, which says more than its description.
    """
    name = spec.name
    if name.startswith(FOLDER):
        folder = Path(name.removeprefix(FOLDER))
        if not (folder / _CONFIG).is_file():
            raise ValueError(f"encoder {name}: the folder has no {_CONFIG}: give one that timm or a hub wrote")
        return _described(name, lambda file: _json(folder / file))
    try:
        reference = HubReference.parse(name)
    except ValueError as error:
        raise ValueError(f"encoder {name}: {error}") from None
    if reference is None:
        return PRESETS.get(name)
    _check_no_preset(spec, reference)
    return _described(name, lambda file: _json(hub_file(reference, [file])))


def _check_no_preset(spec: EncoderSpec, reference: HubReference) -> None:
    """Refuse the repository of a preset unless the settings say how it is run. The hub does not tell capitals apart."""
    if spec.mean and spec.std and spec.pooling != "auto":
        return
    for preset in PRESETS.values():
        if preset.repository.lower() == reference.repository.lower():
            raise ValueError(
                f"encoder {spec.name} is the repository of preset {preset.name}, which has its crop, pooling, revision, "
                f"licence and um/px: set its model to {preset.name}, or set its mean, std and pooling too"
            )


def absolute_name(name: str) -> str:
    """The name of an encoder for processes that run elsewhere: the path of a folder made absolute, ``~`` the driver's home."""
    if not name.startswith(FOLDER):
        return name
    return FOLDER + absolute_uri(os.path.expanduser(name.removeprefix(FOLDER)))  # noqa: PTH111 - Path's own refuses a folder ~x


def published_weights(name: str, preset: Preset) -> str:
    """Return where the weights of a preset are, as `udfs.wsi.weights.sources.open_weights` takes it."""
    if name.startswith(FOLDER):
        folder = Path(name.removeprefix(FOLDER))
        found = next((folder / file for file in WEIGHTS if (folder / file).is_file()), None)
        if not found:
            raise CheckpointError(f"{folder} has no {' or '.join(WEIGHTS)}: put one there, or set its weights")
        return str(found)
    if name.startswith(REPOSITORY):
        return name
    revision = f"@{preset.revision}" if preset.revision else ""
    return f"{FILE}{preset.repository}{revision}/{preset.file}"


def _json(path: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(path.read_text())
    return content


def _described(name: str, read: Read) -> Preset:
    try:
        config = read(_CONFIG)
        if "model_type" in config:
            return _by_transformers(name, config, read)
        return _by_timm(name, config)
    except (ValueError, KeyError, TypeError, AttributeError, ZeroDivisionError, OSError) as error:
        raise ValueError(
            f"encoder {name}: its {_CONFIG} does not describe a model that slidelake builds ({type(error).__name__}: "
            f"{error}): set its model to a preset or a timm model of the same shape, and its weights to the file"
        ) from None


def _by_timm(name: str, config: Mapping[str, Any]) -> Preset:
    """Of ``architecture``, ``model_args`` and ``pretrained_cfg``; files of old versions have all in one mapping."""
    data = config.get("pretrained_cfg", config)
    arguments = config.get("model_args") or {}
    edge = _edge(arguments.get("img_size") or data.get("input_size", [3, INPUT_PX])[-1])
    return Preset(
        name=name,
        architecture=str(config["architecture"]),
        kwargs=_kwargs(arguments),
        repository=name.removeprefix(REPOSITORY),
        mean=checked_mean(_colour(data.get("mean", IMAGENET_MEAN))),
        std=checked_std(_colour(data.get("std", IMAGENET_STD))),
        input_px=math.floor(edge / data.get("crop_pct", _CROP_PCT)),
        crop_px=edge,
        interpolation="bilinear" if data.get("interpolation") == "bilinear" else "bicubic",
        pooling="auto",
        dim=int(config.get("num_features") or 0),
        mpps=(),
        licence=_LICENCE,
        sources=(),
    )


def _by_transformers(name: str, config: Mapping[str, Any], read: Read) -> Preset:
    """Of a ViT or DINOv2, whose vector is the class token. What a file leaves out is transformers' default."""
    layout = _LAYOUTS.get(config["model_type"])
    if layout is None:
        raise ValueError(f"it is of {config['model_type']} of transformers, not of {', '.join(_LAYOUTS)}")
    dim = int(config["hidden_size"])
    ratio = config["intermediate_size"] / dim if layout == "ViT" else config["mlp_ratio"]
    kwargs: dict[str, Argument] = {
        "patch_size": config["patch_size"],
        "embed_dim": dim,
        "depth": config["num_hidden_layers"],
        "num_heads": config["num_attention_heads"],
        "qkv_bias": config.get("qkv_bias", True),
    }
    eps = config.get("layer_norm_eps", 1e-12 if layout == "ViT" else _EPS)
    if eps != _EPS:
        kwargs["norm_layer"] = f"LayerNorm(eps={eps:g})"
    if layout != "ViT":
        kwargs["init_values"] = config["layerscale_value"]
    if config.get("use_swiglu_ffn"):  # its width is two thirds, in steps of 8, of each of two halves
        width = (int(int(dim * ratio) * 2 / 3) + 7) // 8 * 8
        ratio = 2 * width / dim
        kwargs |= {"mlp_layer": "SwiGLUPacked", "act_layer": "SiLU"}
    elif config.get("hidden_act", "gelu") != "gelu":
        raise ValueError(f"its hidden_act is {config['hidden_act']}, not gelu")
    if layout == "Dinov2WithRegisters":
        kwargs |= {"reg_tokens": config["num_register_tokens"], "no_embed_class": True}
    images = read(_PROCESSOR)
    resized = _size(images["size"])
    is_cropped = images.get("do_center_crop", _is_bit(images, layout))
    edge = _size(images.get("crop_size", INPUT_PX)) if is_cropped else resized
    _check_colours(images)
    resampling = images.get("resample", 3 if _is_bit(images, layout) else 2)
    if resampling not in _RESAMPLINGS:
        raise ValueError(f"resample is {resampling} in its {_PROCESSOR}, not 2 (bilinear) or 3 (bicubic)")
    return Preset(
        name=name,
        architecture="vit_base_patch16_224",
        kwargs=kwargs | {"mlp_ratio": ratio, "img_size": edge},
        repository=name.removeprefix(REPOSITORY),
        layout=layout,
        mean=checked_mean(_colour(images["image_mean"])),
        std=checked_std(_colour(images["image_std"])),
        input_px=resized,
        crop_px=edge,
        interpolation=_RESAMPLINGS[resampling],
        dim=dim,
        mpps=(),
        licence=_LICENCE,
        sources=(),
    )


def _is_bit(images: Mapping[str, Any], layout: Layout) -> bool:
    """Whether the processor is that of BiT, which is DINOv2's: other than ViT's, it crops and resizes bicubically by default."""
    name = images.get("image_processor_type") or images.get("feature_extractor_type")
    return name.startswith("Bit") if isinstance(name, str) else layout != "ViT"


def _check_colours(images: Mapping[str, Any]) -> None:
    """Refuse a processor that does not divide by 255 and normalise, as slidelake does."""
    for step in ("do_rescale", "do_normalize"):
        if images.get(step, True) is not True:
            raise ValueError(f"{step} is {json.dumps(images[step])} in its {_PROCESSOR}, not true")
    factor = images.get("rescale_factor", 1 / 255)
    if not math.isclose(factor, 1 / 255, rel_tol=1e-4):
        raise ValueError(f"rescale_factor is {factor:g} in its {_PROCESSOR}, not 1/255")


def _kwargs(arguments: Mapping[str, Any]) -> dict[str, Argument]:
    """What a timm model is built with, without what concerns the classifier, which is left out, and training."""
    if arguments.get("in_chans", 3) != 3:
        raise ValueError(f"its images have {arguments['in_chans']} channels, not 3")
    own = {key: value for key, value in arguments.items() if key not in _OF_CLASSIFIER_AND_TRAINING}
    try:
        check_arguments(own)
    except ValueError as error:
        raise ValueError(f"model_args has {error}") from None
    return {key: _edge(value) if key == "img_size" else value for key, value in own.items()}


def _edge(size: Any) -> int:
    """Of a square image, which configurations give as one number or as two."""
    height, width = (size, size) if isinstance(size, int) else size
    if height != width:
        raise ValueError(f"images of {height} x {width} px are not square")
    return int(height)


def _size(size: Any) -> int:
    """The same of a processor of transformers."""
    if not isinstance(size, Mapping):
        return _edge(size)
    return int(size["shortest_edge"]) if "shortest_edge" in size else _edge([size["height"], size["width"]])


def _colour(values: Any) -> Colour:
    red, green, blue = map(float, values)
    return red, green, blue
