"""Published encoders as their model cards run them: by timm or transformers, with the card's transform, to a vector.

Nothing here reads the presets. Depth and weights are the tests': few blocks, all of which matter, with random numbers.
"""

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import timm
import timm.data
import torch
from numpy.typing import NDArray
from PIL import Image
from timm.layers import SwiGLUPacked
from torch import nn
from torchvision import transforms  # type: ignore[import-untyped]
from torchvision.transforms import v2  # type: ignore[import-untyped]
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

from udfs.wsi.weights.filling import NoInitialValues

IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
HALF = (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)
BIOPTIMUS = (0.707223, 0.578729, 0.703617), (0.211883, 0.230117, 0.177517)
HIBOU = (0.7068, 0.5755, 0.722), (0.195, 0.2316, 0.1816)
BICUBIC = transforms.InterpolationMode.BICUBIC
SWIGLU: dict[str, Any] = {"mlp_layer": SwiGLUPacked, "act_layer": nn.SiLU}
Colours = tuple[tuple[float, float, float], tuple[float, float, float]]
Tokens = Callable[[torch.Tensor], torch.Tensor]  # [n, t, dim] to [n, dim]


@dataclass(frozen=True)
class Card:
    """One model's card."""

    build: Callable[[], nn.Module]
    transform: Callable[[Image.Image], torch.Tensor]  # to [3, edge, edge]
    vector: Callable[[nn.Module, torch.Tensor], torch.Tensor]  # [n, 3, edge, edge] to [n, dim]
    save: Callable[[nn.Module, Path], Path]  # as it is published

    def model(self) -> nn.Module:
        """The model with random weights, the same each time."""
        with NoInitialValues():
            model = self.build()
        return randomised(model).eval()

    @torch.inference_mode()
    def vectors(self, model: nn.Module, tiles: NDArray[np.uint8]) -> NDArray[np.float32]:
        """uint8 [n, h, w, 3] to float32 [n, dim]."""
        x = torch.stack([self.transform(Image.fromarray(tile)) for tile in tiles])
        vectors: NDArray[np.float32] = self.vector(model, x).numpy()
        return vectors


def randomised(model: nn.Module) -> nn.Module:
    """Random weights with which each block changes the tokens: as published, layer scales of new models are nearly 0."""
    generator = torch.Generator().manual_seed(5)
    for name, tensor in model.state_dict().items():
        if not tensor.is_floating_point():
            continue
        is_scale = tensor.ndim == 1 and not name.endswith("bias") and "running_mean" not in name
        if is_scale:
            tensor.uniform_(0.5, 1.5, generator=generator)
        else:
            fan_in = tensor[0].numel() if tensor.ndim in (2, 4) else 400
            tensor.normal_(0, fan_in**-0.5, generator=generator)
    return model


def depth_of(architecture: str) -> int:
    """Blocks in the tests: two, of the largest models one, or as many as SLIDELAKE_TEST_DEPTH says.

    A whole ViT-H takes 6 GB and a minute: SLIDELAKE_TEST_DEPTH=32 pytest 'tests/core/test_preset_parity.py' -k virchow2.
    """
    if depth := os.environ.get("SLIDELAKE_TEST_DEPTH"):
        return int(depth)
    return 1 if "giant" in architecture or "huge" in architecture else 2


# Transforms, as the cards write them.


def resized(colours: Colours, px: int = 224, interpolation: Any = None, crop: int | None = None) -> Any:
    """Torchvision's first transforms, on pictures of PIL; no interpolation is torchvision's default, bilinear."""
    how = {"interpolation": interpolation} if interpolation else {}
    steps = [transforms.Resize(px, **how), transforms.ToTensor(), transforms.Normalize(*colours)]
    return transforms.Compose([steps[0], *([transforms.CenterCrop(crop)] if crop else []), *steps[1:]])


def second(colours: Colours) -> Any:
    """Torchvision's second transforms, as kaiko's cards have them."""
    steps = [v2.ToImage(), v2.Resize(size=224), v2.CenterCrop(size=224), v2.ToDtype(torch.float32, scale=True)]
    return v2.Compose([*steps, v2.Normalize(*colours)])


def of_timm(colours: Colours, px: int = 224) -> Any:
    """What timm makes of a config on the hub with bicubic interpolation and no crop."""
    mean, std = colours
    return timm.data.create_transform(
        input_size=(3, px, px), interpolation="bicubic", mean=mean, std=std, crop_pct=1.0, is_training=False
    )


def processed(processor: Any) -> Any:
    """A processor of transformers."""
    return lambda picture: processor(images=picture, return_tensors="pt")["pixel_values"][0]


# Files, as they are published.


def as_bin(model: nn.Module, folder: Path) -> Path:
    torch.save(model.state_dict(), folder / "pytorch_model.bin")
    return folder / "pytorch_model.bin"


def as_safetensors(model: nn.Module, folder: Path) -> Path:
    safetensors.torch.save_file(model.state_dict(), folder / "model.safetensors")
    return folder / "model.safetensors"


def as_transformers(model: Any, folder: Path) -> Path:
    model.save_pretrained(folder)
    return folder / "model.safetensors"


def as_keep(model: nn.Module, folder: Path) -> Path:
    """With the text tower beside the image tower, and the layer scales under another name."""
    state = {name.replace(".gamma", ".weight"): tensor for name, tensor in model.state_dict().items()}
    text = {"text.embeddings.word_embeddings.weight": torch.zeros(9, 4), "logit_scale": torch.ones(())}
    safetensors.torch.save_file(state | text, folder / "model.safetensors")
    return folder / "model.safetensors"


# Models, as the cards build them.


def timm_model(name: str, **kwargs: Any) -> Callable[[], nn.Module]:
    return lambda: timm.create_model(name, pretrained=False, num_classes=0, depth=depth_of(name), **kwargs)


class Keep(nn.Module):
    """The image tower of KEEP."""

    def __init__(self) -> None:
        super().__init__()
        self.visual = timm_model("vit_large_patch16_224", img_size=224, patch_size=16, init_values=1e-5)()
        self.visual_head = nn.Sequential(nn.Linear(1024, 768), nn.GELU(), nn.Linear(768, 768))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.normalize(self.visual_head(self.visual(x)), dim=-1)


class Stem(nn.Module):
    """The stem of CTransPath."""

    def __init__(self, **_: Any) -> None:
        super().__init__()
        self.grid_size, self.num_patches = (56, 56), 56 * 56
        first = [nn.Conv2d(3, 12, 3, 2, 1, bias=False), nn.BatchNorm2d(12), nn.ReLU(inplace=True)]
        then = [nn.Conv2d(12, 24, 3, 2, 1, bias=False), nn.BatchNorm2d(24), nn.ReLU(inplace=True)]
        self.proj = nn.Sequential(*first, *then, nn.Conv2d(24, 96, 1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.einsum("ncij->nijc", self.proj(x))


def ctranspath() -> Any:
    return timm.create_model("swin_tiny_patch4_window7_224", embed_layer=Stem, num_classes=0)


def dinov2(hidden: int, heads: int, image_px: int = 224, patch: int = 14, swiglu: bool = False, depth: int = 2) -> Any:
    config = Dinov2Config(
        hidden_size=hidden,
        num_attention_heads=heads,
        num_hidden_layers=depth,
        image_size=image_px,
        patch_size=patch,
        use_swiglu_ffn=swiglu,
    )
    return lambda: Dinov2Model(config)


def hibou(hidden: int, heads: int) -> Any:
    config = Dinov2WithRegistersConfig(
        hidden_size=hidden,
        num_attention_heads=heads,
        num_hidden_layers=2,
        image_size=224,
        patch_size=14,
        num_register_tokens=4,
        use_swiglu_ffn=True,
    )
    return lambda: Dinov2WithRegistersModel(config)


def phikon() -> nn.Module:
    config = ViTConfig(num_hidden_layers=2, layer_norm_eps=1e-6)  # ViT-B/16 otherwise
    return ViTModel(config, add_pooling_layer=False)


# Vectors, as the cards take them.


def forward(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    vectors: torch.Tensor = model(x)
    return vectors


def of_tokens(tokens: Tokens) -> Callable[[Any, torch.Tensor], torch.Tensor]:
    return lambda model, x: tokens(model.forward_features(x))


def of_last_hidden_state(tokens: Tokens) -> Callable[[Any, torch.Tensor], torch.Tensor]:
    return lambda model, x: tokens(model(x).last_hidden_state)


def cls(tokens: torch.Tensor) -> torch.Tensor:
    return tokens[:, 0]


def cls_and_mean_from(first: int) -> Tokens:
    return lambda tokens: torch.cat([tokens[:, 0], tokens[:, first:].mean(1)], dim=-1)


def of_pooler(model: Any, x: torch.Tensor) -> torch.Tensor:
    pooled: torch.Tensor = model(pixel_values=x).pooler_output
    return pooled


def kaiko(name: str, **kwargs: Any) -> Card:
    return Card(timm_model(name, dynamic_img_size=True, **kwargs), second(HALF), forward, as_safetensors)


def dino(name: str, px: int, **kwargs: Any) -> Card:
    return Card(timm_model(name, **kwargs), of_timm(IMAGENET, px), of_tokens(cls), as_safetensors)


H_OPTIMUS = timm_model("vit_giant_patch14_reg4_dinov2", img_size=224, init_values=1e-5, dynamic_img_size=False)
VIRCHOW = {"img_size": 224, "init_values": 1e-5, "mlp_ratio": 5.3375, **SWIGLU}
UNI2: dict[str, Any] = {
    "img_size": 224,
    "patch_size": 14,
    "num_heads": 24,
    "init_values": 1e-5,
    "embed_dim": 1536,
    "mlp_ratio": 2.66667 * 2,
    "no_embed_class": True,
    "reg_tokens": 8,
    "dynamic_img_size": True,
    **SWIGLU,
}
H0_MINI = {
    "img_size": 224,
    "init_values": 1e-5,
    "reg_tokens": 4,
    "mlp_ratio": 5.33334,
    "dynamic_img_size": True,
    **SWIGLU,
}
PHIKON = ViTImageProcessor(
    size={"height": 224, "width": 224}, resample=2, image_mean=IMAGENET[0], image_std=IMAGENET[1]
)
PHIKON2 = BitImageProcessor(
    size={"shortest_edge": 224},
    crop_size={"height": 224, "width": 224},
    resample=3,
    image_mean=IMAGENET[0],
    image_std=IMAGENET[1],
)

CARDS: dict[str, Card] = {
    "uni": Card(
        timm_model("vit_large_patch16_224", init_values=1e-5, dynamic_img_size=True), resized(IMAGENET), forward, as_bin
    ),
    "uni2-h": Card(timm_model("vit_giant_patch14_224", **UNI2), resized(IMAGENET), forward, as_bin),
    "virchow": Card(
        timm_model("vit_huge_patch14_224", global_pool="", **VIRCHOW),
        of_timm(IMAGENET),
        lambda model, x: cls_and_mean_from(1)(model(x)),
        as_safetensors,
    ),
    "virchow2": Card(
        timm_model("vit_huge_patch14_224", global_pool="", reg_tokens=4, **VIRCHOW),
        of_timm(IMAGENET),
        lambda model, x: cls_and_mean_from(5)(model(x)),
        as_safetensors,
    ),
    "h-optimus-0": Card(H_OPTIMUS, resized(BIOPTIMUS, interpolation=BICUBIC), forward, as_bin),
    "h-optimus-1": Card(H_OPTIMUS, resized(BIOPTIMUS, interpolation=BICUBIC), forward, as_safetensors),
    "h0-mini": Card(
        timm_model("vit_base_patch14_reg4_dinov2", global_pool="", **H0_MINI),
        of_timm(BIOPTIMUS),
        lambda model, x: model(x)[:, 0],
        as_safetensors,
    ),
    "prov-gigapath": Card(
        timm_model("vit_giant_patch14_dinov2", patch_size=16, img_size=224, init_values=1e-5, global_pool="token"),
        resized(IMAGENET, 256, BICUBIC, crop=224),
        forward,
        as_bin,
    ),
    "phikon": Card(phikon, processed(PHIKON), of_last_hidden_state(cls), as_transformers),
    "phikon-v2": Card(dinov2(1024, 16, patch=16), processed(PHIKON2), of_last_hidden_state(cls), as_transformers),
    "midnight-12k": Card(
        dinov2(1536, 24, swiglu=True, depth=1),
        second(HALF),
        of_last_hidden_state(cls_and_mean_from(1)),
        as_transformers,
    ),
    "gpfm": Card(
        timm_model("vit_large_patch14_dinov2", img_size=224, init_values=1e-5),
        resized(IMAGENET, interpolation=BICUBIC),
        forward,
        as_bin,
    ),
    "hibou-b": Card(hibou(768, 12), resized(HIBOU, interpolation=BICUBIC, crop=224), of_pooler, as_transformers),
    "hibou-l": Card(hibou(1024, 16), resized(HIBOU, interpolation=BICUBIC, crop=224), of_pooler, as_transformers),
    "kaiko-vits8": kaiko("vit_small_patch8_224"),
    "kaiko-vits16": kaiko("vit_small_patch16_224"),
    "kaiko-vitb8": kaiko("vit_base_patch8_224"),
    "kaiko-vitb16": kaiko("vit_base_patch16_224"),
    "kaiko-vitl14": kaiko("vit_large_patch14_reg4_dinov2", img_size=518),
    "lunit-vits8": Card(timm_model("vit_small_patch8_224"), of_timm(IMAGENET), forward, as_safetensors),
    "lunit-vits16": Card(timm_model("vit_small_patch16_224"), of_timm(HALF), forward, as_safetensors),
    "retccl": Card(lambda: timm.create_model("resnet50", num_classes=0), resized(IMAGENET, 256), forward, as_bin),
    "ctranspath": Card(ctranspath, of_timm(IMAGENET), forward, as_safetensors),
    "keep": Card(Keep, resized(IMAGENET, interpolation=BICUBIC, crop=224), forward, as_keep),
    "dinov2-s": dino("vit_small_patch14_dinov2", 224, dynamic_img_size=True),
    "dinov2-b": dino("vit_base_patch14_dinov2", 224, dynamic_img_size=True),
    "dinov2-l": dino("vit_large_patch14_dinov2", 224, dynamic_img_size=True),
    "dinov2-g": dino("vit_giant_patch14_dinov2", 224, dynamic_img_size=True),
    "dinov3-s": dino("vit_small_patch16_dinov3", 256),
    "dinov3-b": dino("vit_base_patch16_dinov3", 256),
    "dinov3-l": dino("vit_large_patch16_dinov3", 256),
}
