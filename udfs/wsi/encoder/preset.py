"""What a preset says of a model: how it is built, fed and pooled, where its weights are, and under which licence."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Literal

from udfs.wsi.colour import Colour
from udfs.wsi.encoder.encoder_spec import INPUT_PX, Argument, Pooling, Precision, Resampling

Layout = Literal["timm", "ViT", "Dinov2", "Dinov2WithRegisters", "KEEP", "other"]
"""How a checkpoint names its tensors: as timm, as transformers' model of this name, as the authors of KEEP, or in another way."""
OF_TRANSFORMERS: tuple[Layout, ...] = ("ViT", "Dinov2", "Dinov2WithRegisters")

IMAGENET_MEAN: Colour = (0.485, 0.456, 0.406)
IMAGENET_STD: Colour = (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class Licence:
    """The terms of a model's weights."""

    name: str
    is_commercial: bool  # whether they allow commercial use


@dataclass(frozen=True, kw_only=True)
class Preset:
    """How a published model is run."""

    name: str
    architecture: str  # of timm
    kwargs: Mapping[str, Argument] = field(default_factory=lambda: MappingProxyType({}))  # of timm; layers by name
    repository: str  # on the Hugging Face hub
    revision: str | None = None  # commit of the repository
    file: str = "model.safetensors"  # in the repository
    sha256: str | None = None  # of the file
    layout: Layout = "timm"  # of the file
    mean: Colour = IMAGENET_MEAN
    std: Colour = IMAGENET_STD
    input_px: int = INPUT_PX  # edge to which a tile is resized
    crop_px: int | None = None  # edge of the centre that the model sees; None: all of it
    interpolation: Resampling = "bicubic"
    pooling: Pooling = "cls"
    projection: int | None = None  # width of the projection behind the pooled vector, None: there is none
    dim: int  # of the vector
    mpps: tuple[float, ...] = (0.5,)  # um/px that the authors name, the recommended one first; empty: they name none
    tile_px: int = 224  # recommended edge of a tile at each of them
    precision: Precision = "fp16"  # recommended on a GPU
    licence: Licence
    is_gated: bool = False  # whether the hub gives the file only to accounts that accepted the terms
    unavailable: str | None = None  # why it cannot be run; None: it can
    sources: tuple[str, ...]  # GitHub repositories that the row was compared with, beside the model's card

    @property
    def mpp(self) -> float | None:
        """The recommended um/px of a tile; None: the authors name none."""
        return self.mpps[0] if self.mpps else None
