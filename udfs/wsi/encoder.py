"""Tiles to embeddings: a timm model's feature map, averaged and maximised over its positions."""

import difflib
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import numpy as np
import timm
import timm.data
import torch
from numpy.typing import NDArray
from torch import nn
from torch.nn import functional

from udfs.wsi.checkpoint import CheckpointError, fingerprint, load_state_dict
from udfs.wsi.store import StorageOptions, public_uri

Interpolation = Literal["area", "model"]
Device = Literal["auto", "cpu", "cuda"]


@dataclass(frozen=True)
class EncoderSpec:
    """Which encoder, and how it is fed. Hashable: workers keep one encoder a spec."""

    name: str  # a timm model
    weights: str | None  # URI of a checkpoint, None for the hub's pretrained weights
    input_px: int  # edge of what the model sees
    interpolation: Interpolation  # how a tile is brought to input_px: area average, or the model's own
    batch_size: int  # tiles a forward pass
    device: Device


class Encoder:
    """A loaded encoder on its device."""

    def __init__(self, spec: EncoderSpec, storage_options: StorageOptions | None = None) -> None:
        """Load the model.

        Raises:
            CheckpointError: the weights can't be read or do not fit the model.
            ValueError: timm does not know the model, or it yields no feature map.
        """
        self.spec = spec
        self.device = torch.device(_resolve(spec.device))
        self._model: nn.Module = (
            _load_model(spec, storage_options).to(self.device).to(memory_format=torch.channels_last)
        )
        data: dict[str, Any] = timm.data.resolve_model_data_config(self._model)
        self._mean = torch.tensor(data["mean"], device=self.device).view(1, -1, 1, 1)
        self._std = torch.tensor(data["std"], device=self.device).view(1, -1, 1, 1)
        self._own_interpolation = str(data["interpolation"])
        features = self._features(torch.zeros(1, 3, spec.input_px, spec.input_px, device=self.device))
        if features.ndim != 4:
            raise ValueError(
                f"encoder.name = {spec.name} yields {list(features.shape)}, not a feature map [n, dim, h, w]: "
                "choose a convolutional model, for example efficientnet_b0 or resnet50"
            )
        self.dim = int(features.shape[1])

    @cached_property
    def fingerprint(self) -> str:
        """Hash of the weights."""
        return fingerprint(self._model.state_dict())

    def embed(self, tiles: NDArray[np.uint8]) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """Embed tiles.

        Each is brought to ``input_px`` and normalised by the model's own mean and std.

        Args:
            tiles: uint8 [n, h, w, 3], RGB.

        Returns:
            (mean, max) over the positions of the feature map, each float32 [n, dim].
        """
        means, maxima = [], []
        for start in range(0, len(tiles), self.spec.batch_size):
            batch = torch.from_numpy(np.ascontiguousarray(tiles[start : start + self.spec.batch_size]))
            x = self._resize(batch.to(self.device).permute(0, 3, 1, 2).float())
            features = self._features((x / 255 - self._mean) / self._std)
            means.append(features.mean(dim=(2, 3)).float().cpu().numpy())
            maxima.append(features.amax(dim=(2, 3)).float().cpu().numpy())
        empty = [np.zeros((0, self.dim), np.float32)]
        return np.concatenate(means or empty), np.concatenate(maxima or empty)

    @torch.inference_mode()
    def _features(self, x: torch.Tensor) -> torch.Tensor:
        features: torch.Tensor = self._model(x.contiguous(memory_format=torch.channels_last))
        return features

    def _resize(self, x: torch.Tensor) -> torch.Tensor:
        edge = self.spec.input_px
        if x.shape[-1] == edge and x.shape[-2] == edge:
            return x
        if self.spec.interpolation == "area":
            return functional.interpolate(x, size=(edge, edge), mode="area")
        resized = functional.interpolate(x, size=(edge, edge), mode=self._own_interpolation, antialias=True)
        return resized.clamp_(0, 255)


def _resolve(device: Device) -> str:
    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    return device


def _load_model(spec: EncoderSpec, storage_options: StorageOptions | None) -> nn.Module:
    # global_pool="" and no classifier: the forward pass then ends with the feature map
    options: dict[str, Any] = {"num_classes": 0, "global_pool": ""}
    if not timm.is_model(spec.name.split(".")[0]):
        close = ", ".join(difflib.get_close_matches(spec.name, timm.list_models(), n=3))
        raise ValueError(f"encoder.name = {spec.name} is no timm model{f': did you mean {close}?' if close else ''}")
    if spec.weights is None:
        try:
            model: nn.Module = timm.create_model(spec.name, pretrained=True, **options)
        except Exception as error:
            raise CheckpointError(
                f"pretrained weights of {spec.name} can't be had from the hub ({type(error).__name__}): set encoder.weights "
                "to the URI of a checkpoint"
            ) from None
        return model.eval().requires_grad_(False)
    try:
        model = timm.create_model(spec.name, pretrained=False, **options)
    except RuntimeError as error:  # a name that timm knows with a variant that it does not
        raise ValueError(f"encoder.name = {spec.name}: {error}") from None
    tensors = load_state_dict(spec.weights, storage_options)
    classifier: Any = getattr(model, "pretrained_cfg", {}).get("classifier") or ()
    heads = tuple(f"{name}." for name in ((classifier,) if isinstance(classifier, str) else classifier))
    tensors = {name: tensor for name, tensor in tensors.items() if not name.startswith(heads or ("\0",))}
    try:
        model.load_state_dict(tensors)
    except RuntimeError as error:
        lines = [line.strip() for line in str(error).splitlines()[1:3]]
        raise CheckpointError(
            f"{public_uri(spec.weights)} does not fit {spec.name}: {' '.join(lines)[:300]}; give the checkpoint of that model"
        ) from None
    return model.eval().requires_grad_(False)
