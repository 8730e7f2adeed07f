"""ViT and DINOv2 that transformers saved are what transformers makes of them, from the tile to the vector."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import (
    BitImageProcessor,
    Dinov2Config,
    Dinov2Model,
    Dinov2WithRegistersConfig,
    Dinov2WithRegistersModel,
    ViTConfig,
    ViTImageProcessor,
    ViTModel,
)

from tests.slides.make import Pixels
from udfs.wsi.encoder import Encoder, EncoderSpec
from udfs.wsi.encoder.network import load_network

COLOURS: dict[str, Any] = {"image_mean": [0.7, 0.6, 0.5], "image_std": [0.2, 0.25, 0.3]}
SHAPE: dict[str, Any] = {"hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 3, "image_size": 56}
DINOV2 = SHAPE | {"patch_size": 14, "layerscale_value": 0.7}
CROPPED: Any = BitImageProcessor(
    size={"shortest_edge": 64}, crop_size={"height": 56, "width": 56}, resample=3, **COLOURS
)
ODD: Any = BitImageProcessor(size={"shortest_edge": 67}, crop_size={"height": 56, "width": 56}, resample=3, **COLOURS)
MODELS: dict[str, Any] = {
    "vit": (
        ViTModel(ViTConfig(patch_size=8, intermediate_size=96, **SHAPE), add_pooling_layer=False),
        ViTImageProcessor(size={"height": 56, "width": 56}, **COLOURS),
    ),
    "dinov2": (Dinov2Model(Dinov2Config(**DINOV2)), CROPPED),
    "eps": (Dinov2Model(Dinov2Config(layer_norm_eps=0.5, **DINOV2)), CROPPED),
    "odd margin": (Dinov2Model(Dinov2Config(**DINOV2)), ODD),
    "swiglu": (Dinov2Model(Dinov2Config(use_swiglu_ffn=True, **DINOV2)), CROPPED),
    "registers": (Dinov2WithRegistersModel(Dinov2WithRegistersConfig(num_register_tokens=3, **DINOV2)), CROPPED),
}


@pytest.mark.parametrize("kind", MODELS)
def test_a_folder_of_transformers_gives_its_class_token(tmp_path: Path, pixels: Pixels, kind: str) -> None:
    model, processor = MODELS[kind]
    torch.manual_seed(4)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape) / 5)
    model.eval().save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    tiles = np.stack([pixels[896:1120, 896:1120], pixels[1344:1568, 1800:2024]])
    images = processor(images=[Image.fromarray(tile) for tile in tiles], return_tensors="pt")["pixel_values"]
    with torch.inference_mode():
        expected = model(images).last_hidden_state[:, 0]
    [found] = Encoder(EncoderSpec(f"local-dir:{tmp_path}", None, batch_size=2, device="cpu")).embed(tiles)
    assert torch.cosine_similarity(torch.from_numpy(found), expected).min() >= 0.9999


def saved(folder: Path, kind: str, config: dict[str, Any], images: dict[str, Any]) -> str:
    """The name of a model as transformers saved it, with some values changed, and left out if they are None."""
    for part, file, changes in zip(
        MODELS[kind], ("config.json", "preprocessor_config.json"), (config, images), strict=True
    ):
        part.save_pretrained(folder)
        content = json.loads((folder / file).read_text()) | changes
        (folder / file).write_text(json.dumps({key: value for key, value in content.items() if value is not None}))
    return f"local-dir:{folder}"


@pytest.mark.parametrize(
    ("config", "images", "reason"),
    [
        ({"hidden_act": "relu"}, {}, "hidden_act is relu, not gelu"),
        ({"hidden_act": "gelu_new"}, {}, "hidden_act is gelu_new, not gelu"),
        ({}, {"do_normalize": False}, r"do_normalize is false in its preprocessor_config\.json, not true"),
        ({}, {"do_rescale": False}, r"do_rescale is false in its preprocessor_config\.json, not true"),
        ({}, {"rescale_factor": 1.0}, r"rescale_factor is 1 in .*, not 1/255"),
        ({}, {"rescale_factor": 1 / 127.5}, r"rescale_factor is 0\.00784314 in .*, not 1/255"),
        ({}, {"resample": 0}, r"resample is 0 in .*, not 2 \(bilinear\) or 3 \(bicubic\)"),
        ({}, {"resample": 1}, "resample is 1 in"),
    ],
)
@pytest.mark.parametrize("kind", ["vit", "dinov2", "registers"])
def test_settings_of_transformers_that_slidelake_does_not_follow_are_refused(
    tmp_path: Path, kind: str, config: dict[str, Any], images: dict[str, Any], reason: str
) -> None:
    with pytest.raises(ValueError, match=reason):
        load_network(EncoderSpec(saved(tmp_path, kind, config, images), None, device="cpu"))


@pytest.mark.parametrize(("kind", "interpolation", "input_px"), [("vit", "bilinear", 56), ("dinov2", "bicubic", 64)])
def test_what_a_processor_leaves_out_is_its_default(
    tmp_path: Path, kind: str, interpolation: str, input_px: int
) -> None:
    left_out = dict.fromkeys(("resample", "do_rescale", "do_normalize", "rescale_factor", "do_center_crop"))
    whole = load_network(EncoderSpec(saved(tmp_path, kind, {}, {}), None, device="cpu"))
    for images in (left_out, left_out | {"image_processor_type": None}):
        network = load_network(EncoderSpec(saved(tmp_path, kind, {}, images), None, device="cpu"))
        assert (network.interpolation, network.input_px) == (interpolation, input_px)
        assert network.identity == whole.identity
