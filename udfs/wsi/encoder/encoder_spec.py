"""Which encoder, and how it runs."""

from dataclasses import dataclass
from typing import Literal

from udfs.wsi.colour import Colour

Resampling = Literal["area", "bilinear", "bicubic"]
Interpolation = Literal["area", "bilinear", "bicubic", "model"]
Pooling = Literal["auto", "map", "pooled", "cls", "mean", "cls_mean"]
Runtime = Literal["torch", "openvino"]
Precision = Literal["fp32", "bf16", "fp16"]
Device = Literal["auto", "cpu", "cuda"]
Argument = bool | int | float | str | None  # of a timm model; a layer by its name

INPUT_PX = 224  # unless settings or a preset say otherwise


@dataclass(frozen=True)
class EncoderSpec:
    """Settings of an encoder. Hashable: workers keep one encoder per spec."""

    name: str  # a preset or a timm model
    weights: str | None  # URI of a checkpoint, None for the hub's pretrained weights
    input_px: int | None = None  # edge to which a tile is resized; None: the preset's, else INPUT_PX
    interpolation: Interpolation | None = None  # how; None: the preset's, else area average
    batch_size: int | None = None  # tiles per forward pass; None: found by measuring
    device: Device = "auto"
    runtime: Runtime = "torch"
    precision: Precision = "fp32"
    pooling: Pooling = (
        "auto"  # how a tile's features become its vector; auto: the preset's, else a feature map if there is one
    )
    crop_px: int | None = None  # edge of the centre that the model sees; None: the preset's, else all of it
    mean: Colour | None = None  # of the model's training images; None: the preset's, else the model's own
    std: Colour | None = None
    kwargs: tuple[tuple[str, Argument], ...] = ()  # for timm's model, beside the preset's
