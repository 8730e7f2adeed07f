"""Which encoder, and how it runs."""

from dataclasses import dataclass
from typing import Literal

Interpolation = Literal["area", "model"]
Resampling = Literal["area", "bilinear", "bicubic"]
Pooling = Literal["auto", "map", "pooled", "cls", "mean", "cls_mean"]
Colour = tuple[float, float, float]  # red, green, blue; 1 is full intensity
Runtime = Literal["torch", "openvino"]
Precision = Literal["fp32", "bf16", "fp16"]
Device = Literal["auto", "cpu", "cuda"]


@dataclass(frozen=True)
class EncoderSpec:
    """Settings of an encoder. Hashable: workers keep one encoder a spec."""

    name: str  # a timm model
    weights: str | None  # URI of a checkpoint, None for the hub's pretrained weights
    input_px: int  # edge of what the model sees
    interpolation: Interpolation = "area"  # how a tile is brought to input_px: area average, or the model's own
    batch_size: int | None = None  # tiles a forward pass; None: found by measuring
    device: Device = "auto"
    runtime: Runtime = "torch"
    precision: Precision = "fp32"
    pooling: Pooling = "auto"  # mean and max of a feature map, or the model's own pooled vector for both
