"""Any timm model as an encoder: its own normalisation, and the mean and maximum of its feature map, or its pooled vector."""

import difflib
from typing import Any

import timm
import timm.data
import torch
from torch import nn

from udfs.wsi.encoder.batch_size import is_out_of_memory
from udfs.wsi.encoder.encoder_spec import EncoderSpec
from udfs.wsi.encoder.network import Network, encoder_named
from udfs.wsi.store import StorageOptions
from udfs.wsi.weights.checkpoint import (
    Checkpoint,
    CheckpointError,
    fingerprint,
    fingerprint_once,
    first_sentence,
    open_checkpoint,
)
from udfs.wsi.weights.filling import NoInitialValues, fill


class TimmNetwork(Network):
    """A timm model without its classifier."""

    mean: torch.Tensor
    std: torch.Tensor

    def __init__(self, spec: EncoderSpec, model: nn.Module, shape: tuple[int, ...], weights: str) -> None:
        """`shape`: of what the model yields for one image: a feature map, or one vector. `weights`: their fingerprint."""
        data: dict[str, Any] = timm.data.resolve_model_data_config(model)
        layout = "NC" if len(shape) == 2 else "NHWC" if getattr(model, "output_fmt", "NCHW") == "NHWC" else "NCHW"
        dim = shape[layout.index("C")]
        super().__init__(
            spec,
            (("avg", dim), ("max", dim)) if len(shape) == 4 else (("avg", dim),),
            weights,
            f"mean={data['mean']}",
            f"std={data['std']}",
            f"pooling={'map' if len(shape) == 4 else 'pooled'} {layout}",
            own_interpolation=str(data["interpolation"]),
        )
        self.model, self._layout = model, layout
        self.register_buffer("mean", torch.tensor(data["mean"]).view(1, -1, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(data["std"]).view(1, -1, 1, 1), persistent=False)

    def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """See `Network`."""
        x = (images.permute(0, 3, 1, 2) / 255 - self.mean) / self.std
        features = self.model(x).float()
        if self._layout == "NC":
            return (features,)
        positions = (self._layout.index("H"), self._layout.index("W"))
        return features.mean(dim=positions), features.amax(dim=positions)


def is_known_to_timm(name: str) -> bool:
    """Whether it is the name of a timm model, with the tag of one of its checkpoints or without."""
    return name in timm.list_models() or name in timm.list_models(pretrained=True)


@encoder_named(None)
def load_timm_network(spec: EncoderSpec, storage_options: StorageOptions | None = None) -> TimmNetwork:
    """Load a timm model.

    Raises:
        CheckpointError: the weights can't be read or do not fit the model.
        ValueError: timm does not know the model, or it does not take `spec.input_px` or yield what `spec.pooling` needs.
    """
    if not timm.is_model(spec.name.split(".")[0]):
        close = ", ".join(difflib.get_close_matches(spec.name, timm.list_models(), n=3))
        raise ValueError(f"encoder.name = {spec.name} is no timm model{f': did you mean {close}?' if close else ''}")
    checkpoint = open_checkpoint(spec.weights, storage_options) if spec.weights else None
    # global_pool="" and no classifier: the forward pass then ends with the feature map.
    feature_map, pooled = {"global_pool": ""}, dict[str, str]()
    for options in {"map": [feature_map], "pooled": [pooled], "auto": [feature_map, pooled]}[spec.pooling]:
        # First without weights: models that pool in another way may have others in this form.
        model = _new_model(spec, options)
        shape = _output_shape(model, spec)
        if len(shape) == (4 if options else 2):
            model = _with_weights(model, spec, checkpoint, options)
            state = model.state_dict()
            weights = fingerprint_once(state, checkpoint.file) if checkpoint else fingerprint(state)
            return TimmNetwork(spec, model, shape, weights)
    if spec.pooling == "map":
        raise ValueError(
            f"encoder.name = {spec.name} yields {list(shape)}, not a feature map [n, dim, h, w]: set encoder.pooling to "
            "auto, or choose a convolutional model, for example efficientnet_b0 or resnet50"
        )
    raise ValueError(f"encoder.name = {spec.name} yields {list(shape)}, not one vector per tile: choose another model")


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


def _new_model(spec: EncoderSpec, options: dict[str, str]) -> nn.Module:
    """With no weights yet: what its parameters hold is arbitrary."""
    try:
        with NoInitialValues():
            model: nn.Module = timm.create_model(spec.name, pretrained=False, num_classes=0, **options)
    except RuntimeError as error:  # a name that timm knows with a variant that it does not
        raise ValueError(f"encoder.name = {spec.name}: {error}") from None
    return model.eval()


def _with_weights(
    model: nn.Module, spec: EncoderSpec, checkpoint: Checkpoint | None, options: dict[str, str]
) -> nn.Module:
    """The model with these weights; None: with those of the hub, which timm makes another model for."""
    if checkpoint is None:
        try:
            model = timm.create_model(spec.name, pretrained=True, num_classes=0, **options)
        except Exception as error:
            raise CheckpointError(
                f"pretrained weights of {spec.name} can't be had from the hub ({type(error).__name__}): set encoder.weights "
                "to the URI of a checkpoint"
            ) from None
        return model.eval()
    classifier: Any = getattr(model, "pretrained_cfg", {}).get("classifier") or ()
    heads = tuple(f"{name}." for name in ((classifier,) if isinstance(classifier, str) else classifier))
    try:
        fill(model, {name: each for name, each in checkpoint.tensors.items() if not name.startswith(heads)})
    except RuntimeError as error:
        lines = [line.strip() for line in str(error).splitlines()[1:3]]
        raise CheckpointError(
            f"{checkpoint.name} does not fit {spec.name}: {' '.join(lines)[:300]}; give the checkpoint of that model"
        ) from None
    return model
