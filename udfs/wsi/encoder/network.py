"""What an encoder is, whatever runs it: a network that says what it yields and what shapes that; and how one is found by name.

A module of this folder adds an encoder: a subclass of `Network` under `encoder_named`. Nothing else names it.
"""

from collections.abc import Callable
from typing import TypeVar

import torch
from torch import nn

from udfs.wsi.encoder.described import FOLDER
from udfs.wsi.encoder.encoder_spec import INPUT_PX, EncoderSpec
from udfs.wsi.registry import import_modules
from udfs.wsi.store import StorageOptions

Outputs = tuple[tuple[str, int], ...]
"""(name, dim) of each vector per tile. The name is a column of table features; the first is `embedding`."""


class Network(nn.Module):
    """RGB images to vectors, in float32 on the CPU until a runtime takes it."""

    def __init__(
        self,
        spec: EncoderSpec,
        outputs: Outputs,
        weights: str,
        *details: str,
        input_px: int | None = None,
        interpolation: str = "area",
    ) -> None:
        """Declare what all encoders declare.

        Args:
            spec: the settings.
            outputs: what `forward` returns.
            weights: fingerprint of the weights.
            details: what else shapes the vectors, each as ``name=value``.
            input_px: edge to which tiles are resized; None: of the settings.
            interpolation: how, see `udfs.wsi.encoder.resize`.
        """
        super().__init__()
        self.name, self.outputs, self.weights = spec.name, outputs, weights
        self.input_px = next(px for px in (input_px, spec.input_px, INPUT_PX) if px is not None)
        self.interpolation = interpolation
        self.identity = (
            # A folder may lie elsewhere; what it holds is told by the weights and the details.
            f"model={FOLDER.removesuffix(':') if spec.name.startswith(FOLDER) else spec.name}",
            f"weights={weights[:16]}",
            f"images={self.input_px} px by {self.interpolation}{'' if interpolation == 'area' else ', 8 bit'}",
            f"outputs={', '.join(f'{name} {dim}' for name, dim in outputs)}",
            *details,
            # Every runtime's fp32 is the same but for rounding.
            "precision=fp32" if spec.precision == "fp32" else f"precision={spec.precision} by {spec.runtime}",
        )
        """All that shapes the vectors of a tile, each as ``name=value``: encoders that share it give the same rows."""
        self.origin: dict[str, str] = {}
        """What is known of the weights beside their numbers, by names of `udfs.wsi.encoder.provenance.PROVENANCE`."""

    @property
    def dim(self) -> int:
        """Length of the first vector."""
        return self.outputs[0][1]

    def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """float32 [n, input_px, input_px, 3], 0 to 255, to a float32 [n, dim] for each of `outputs`."""
        raise NotImplementedError


Loader = Callable[[EncoderSpec, StorageOptions | None], Network]
AnyLoader = TypeVar("AnyLoader", bound=Loader)
_loaders: dict[str | None, Loader] = {}


def encoder_named(name: str | None) -> Callable[[AnyLoader], AnyLoader]:
    """Register what loads the encoder of this name; None: every encoder that has no loader of its own."""

    def register(loader: AnyLoader) -> AnyLoader:
        _loaders[name] = loader
        return loader

    return register


def load_network(spec: EncoderSpec, storage_options: StorageOptions | None = None) -> Network:
    """Load the network of a spec.

    Raises:
        CheckpointError: the weights cannot be read or do not fit the model.
        ValueError: no encoder has this name, or it does not do what the spec says.
    """
    import_modules(__package__)
    load = _loaders.get(spec.name) or _loaders[None]
    return load(spec, storage_options).eval().requires_grad_(False)
