"""A timm model with its normalisation before and the aggregates behind, as one network that any runtime takes."""

import difflib
from typing import Any, Literal

import timm
import timm.data
import torch
from torch import nn

from udfs.wsi.encoder.batch_size import is_out_of_memory
from udfs.wsi.encoder.encoder_spec import EncoderSpec
from udfs.wsi.store import StorageOptions, public_uri
from udfs.wsi.weights.checkpoint import CheckpointError, StateDict, first_sentence, load_state_dict


class Network(nn.Module):
    """RGB images of 0 to 255 to two vectors."""

    mean: torch.Tensor
    std: torch.Tensor

    def __init__(self, name: str, model: nn.Module, pooling: Literal["map", "pooled"]) -> None:
        """Use `load_network`."""
        super().__init__()
        data: dict[str, Any] = timm.data.resolve_model_data_config(model)
        self.name, self.model, self.pooling = name, model, pooling
        self.own_interpolation = str(data["interpolation"])
        self.is_channels_first = getattr(model, "output_fmt", "NCHW") != "NHWC"
        self.register_buffer("mean", torch.tensor(data["mean"]).view(1, -1, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(data["std"]).view(1, -1, 1, 1), persistent=False)

    def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """float32 [n, h, w, 3] to (mean, max) over the positions of the feature map, or twice the model's own pooled vector:
        each float32 [n, dim].
        """
        x = (images.permute(0, 3, 1, 2) / 255 - self.mean) / self.std
        features = self.model(x).float()
        if self.pooling == "pooled":
            return features, features
        positions = (2, 3) if self.is_channels_first else (1, 2)
        return features.mean(dim=positions), features.amax(dim=positions)


def is_known_to_timm(name: str) -> bool:
    """Whether it is the name of a timm model, with the tag of one of its checkpoints or without."""
    return name in timm.list_models() or name in timm.list_models(pretrained=True)


def load_network(spec: EncoderSpec, storage_options: StorageOptions | None = None) -> Network:
    """The network of a spec in float32, on the CPU.

    Raises:
        CheckpointError: the weights can't be read or do not fit the model.
        ValueError: timm does not know the model, or it does not take `spec.input_px` or yield what `spec.pooling` needs.
    """
    if not timm.is_model(spec.name.split(".")[0]):
        close = ", ".join(difflib.get_close_matches(spec.name, timm.list_models(), n=3))
        raise ValueError(f"encoder.name = {spec.name} is no timm model{f': did you mean {close}?' if close else ''}")
    tensors = load_state_dict(spec.weights, storage_options) if spec.weights else None
    if spec.pooling != "pooled":
        # global_pool="" and no classifier: the forward pass then ends with the feature map. First without weights, for models
        # that pool in another way may have others in this form.
        options = {"global_pool": ""}
        shape = _output_shape(_new_model(spec, options), spec)
        if len(shape) == 4:
            return Network(spec.name, _load_model(spec, tensors, options), "map").eval().requires_grad_(False)
        if spec.pooling == "map":
            raise ValueError(
                f"encoder.name = {spec.name} yields {list(shape)}, not a feature map [n, dim, h, w]: set encoder.pooling to "
                "auto, or choose a convolutional model, for example efficientnet_b0 or resnet50"
            )
    model = _load_model(spec, tensors, {})
    shape = _output_shape(model, spec)
    if len(shape) != 2:
        raise ValueError(
            f"encoder.name = {spec.name} yields {list(shape)}, not one vector a tile: choose another model"
        )
    return Network(spec.name, model, "pooled").eval().requires_grad_(False)


@torch.inference_mode()
def _output_shape(model: nn.Module, spec: EncoderSpec) -> tuple[int, ...]:
    """For one image.

    Raises:
        ValueError: the model does not take images of `spec.input_px`.
    """
    edge = spec.input_px
    try:
        return tuple(model(torch.zeros(1, 3, edge, edge)).shape)
    except Exception as error:  # an assertion or whatever a layer raises
        if is_out_of_memory(error):
            raise
        own = timm.data.resolve_model_data_config(model)["input_size"][-1]
        remedy = f"set encoder.input_px to {own}" if own != edge else "choose another size or model"
        raise ValueError(
            f"encoder.input_px = {edge}, and {spec.name} does not take images of {edge} x {edge} px "
            f"({first_sentence(error)}): {remedy}"
        ) from None


def _new_model(spec: EncoderSpec, options: dict[str, Any]) -> nn.Module:
    """With random weights."""
    try:
        model: nn.Module = timm.create_model(spec.name, pretrained=False, num_classes=0, **options)
    except RuntimeError as error:  # a name that timm knows with a variant that it does not
        raise ValueError(f"encoder.name = {spec.name}: {error}") from None
    return model.eval()


def _load_model(spec: EncoderSpec, tensors: StateDict | None, options: dict[str, Any]) -> nn.Module:
    if tensors is None:
        try:
            model: nn.Module = timm.create_model(spec.name, pretrained=True, num_classes=0, **options)
        except Exception as error:
            raise CheckpointError(
                f"pretrained weights of {spec.name} can't be had from the hub ({type(error).__name__}): set encoder.weights "
                "to the URI of a checkpoint"
            ) from None
        return model.eval()
    model = _new_model(spec, options)
    classifier: Any = getattr(model, "pretrained_cfg", {}).get("classifier") or ()
    heads = tuple(f"{name}." for name in ((classifier,) if isinstance(classifier, str) else classifier))
    tensors = {name: tensor for name, tensor in tensors.items() if not name.startswith(heads or ("\0",))}
    try:
        model.load_state_dict(tensors)
    except RuntimeError as error:
        lines = [line.strip() for line in str(error).splitlines()[1:3]]
        raise CheckpointError(
            f"{public_uri(spec.weights or '')} does not fit {spec.name}: {' '.join(lines)[:300]}; give the checkpoint of "
            "that model"
        ) from None
    return model.eval()
