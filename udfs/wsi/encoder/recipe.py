"""How an encoder is built and fed: what the settings say, else its preset, else the defaults."""

from dataclasses import dataclass
from typing import Any, Literal

import timm
from torch import nn

from udfs.wsi.colour import Colour
from udfs.wsi.encoder.arguments import check_arguments
from udfs.wsi.encoder.described import preset_of, published_weights
from udfs.wsi.encoder.encoder_spec import INPUT_PX, Argument, EncoderSpec, Interpolation, Pooling
from udfs.wsi.encoder.layers import UnitProjection, layer_named
from udfs.wsi.encoder.preset import OF_TRANSFORMERS, Preset
from udfs.wsi.weights.checkpoint import first_sentence
from udfs.wsi.weights.filling import NoInitialValues

GlobalPool = Literal["", "own"]
"""Whether a model ends with its feature map or tokens, or with its own pooled vector."""


@dataclass(frozen=True)
class Recipe:
    """A model of timm and its images. None: the model's own."""

    name: str
    architecture: str
    kwargs: dict[str, Argument]
    input_px: int  # edge to which a tile is resized
    edge: int  # of the centre that the model sees
    interpolation: Interpolation
    pooling: Pooling
    mean: Colour | None
    std: Colour | None
    preset: Preset | None

    @property
    def details(self) -> tuple[str, ...]:
        """What shapes the vectors beside the name, the weights and the colours, each as ``name=value``."""
        margin = self.input_px - self.edge
        # The position is named only where it was once another, so that other rows stay as they are.
        from_ = f" from {self.crop_from_px}" if self.crop_from_px != margin // 2 else ""
        build = {**self.kwargs, "architecture": self.architecture} if self.preset else self.kwargs
        return (
            *([f"crop={self.edge} px{from_}"] if self.edge != self.input_px else []),
            *([f"build={sorted(build.items())}"] if build else []),
        )

    @property
    def crop_from_px(self) -> int:
        """Position of the centre's first row and column: transformers rounds a half down, torchvision to even."""
        margin = self.input_px - self.edge
        is_of_transformers = self.preset is not None and self.preset.layout in OF_TRANSFORMERS
        return margin // 2 if is_of_transformers else round(margin / 2)

    @property
    def takes_other_grid(self) -> bool:
        """Whether weights of another input size are meant to be resampled to this one."""
        return "img_size" in self.kwargs

    @property
    def weights(self) -> str | None:
        """Where the published weights are; None: where timm says."""
        return published_weights(self.name, self.preset) if self.preset else None

    def new_model(self, pool: GlobalPool, **other: Any) -> nn.Module:
        """Build the model without a classifier.

        Raises:
            ValueError: timm does not build it.
        """
        options: dict[str, Any] = {
            name: layer_named(value, name) if name.endswith("_layer") and isinstance(value, str) else value
            for name, value in self.kwargs.items()
        }
        if not pool:
            options["global_pool"] = ""
        try:
            model: nn.Module = timm.create_model(self.architecture, num_classes=0, **options, **other)
        except (RuntimeError, TypeError) as error:  # an unknown variant of a known name; an unknown argument
            raise ValueError(f"encoder {self.name}: {first_sentence(error)}") from None
        if self.preset and self.preset.projection:
            model.head = UnitProjection(int(getattr(model, "num_features")), self.preset.projection)  # noqa: B009
        return model.eval()

    def empty_model(self, pool: GlobalPool) -> nn.Module:
        """Build the model; what its parameters hold is arbitrary."""
        with NoInitialValues():
            return self.new_model(pool, pretrained=False)


def recipe_of(spec: EncoderSpec) -> Recipe:
    """Return how the encoder of a spec is built and fed.

    Raises:
        CheckpointError: the hub does not give the description of a model.
        ValueError: its preset cannot be run, or the settings contradict each other.
    """
    try:
        check_arguments(name for name, _ in spec.kwargs)
    except ValueError as error:
        raise ValueError(f"encoder {spec.name}: its kwargs have {error}") from None
    preset = preset_of(spec)
    if preset and preset.unavailable:
        raise ValueError(f"encoder {spec.name} cannot be run: {preset.unavailable}. Choose another encoder")
    input_px = spec.input_px if spec.input_px is not None else preset.input_px if preset else INPUT_PX
    edge = spec.crop_px or (preset.crop_px if preset else None) or input_px
    if edge > input_px:
        raise ValueError(
            f"encoder {spec.name}: crop_px = {edge} is larger than input_px = {input_px}: set crop_px to {input_px} or less"
        )
    kwargs = dict(preset.kwargs) if preset else {}
    if "img_size" in kwargs:
        kwargs["img_size"] = edge
    interpolation = spec.interpolation or (preset.interpolation if preset else "area")
    pooling = spec.pooling
    if preset:
        interpolation = preset.interpolation if interpolation == "model" else interpolation
        pooling = preset.pooling if pooling == "auto" else pooling
    return Recipe(
        name=spec.name,
        architecture=preset.architecture if preset else spec.name,
        kwargs=kwargs | dict(spec.kwargs),
        input_px=input_px,
        edge=edge,
        interpolation=interpolation,
        pooling=pooling,
        mean=spec.mean or (preset.mean if preset else None),
        std=spec.std or (preset.std if preset else None),
        preset=preset,
    )
