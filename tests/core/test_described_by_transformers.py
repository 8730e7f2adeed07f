"""ViT and DINOv2 that transformers saved are what transformers makes of them, from the tile to the vector."""

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
