"""Presets and other timm models as encoders: their normalisation, and one vector or the mean and maximum of a feature map."""

import difflib
from contextlib import suppress
from typing import Any

import timm
import timm.data
import torch
from torch import nn

from udfs.wsi.encoder.batch_size import is_out_of_memory
from udfs.wsi.encoder.checkpoint_layouts import to_timm
from udfs.wsi.encoder.encoder_spec import EncoderSpec
from udfs.wsi.encoder.network import Network, encoder_named
from udfs.wsi.encoder.presets import PRESETS
from udfs.wsi.encoder.provenance import origin_of, refuse_weights_of_another_preset
from udfs.wsi.encoder.recipe import GlobalPool, Recipe, recipe_of
from udfs.wsi.store import StorageOptions
from udfs.wsi.weights.checkpoint import (
    Checkpoint,
    CheckpointError,
    StateDict,
    fingerprint_once,
    first_sentence,
)
from udfs.wsi.weights.filling import differences_of, fill
from udfs.wsi.weights.sources import open_weights, published_checkpoint

_OF_TOKENS = ("cls", "mean", "cls_mean")  # the poolings that need a model that yields tokens
_DIFFERENCES_NAMED, _PRESETS_NAMED = 3, 3  # in messages


class TimmNetwork(Network):
    """A timm model without its classifier."""

    mean: torch.Tensor
    std: torch.Tensor

    def __init__(
        self, spec: EncoderSpec, recipe: Recipe, model: nn.Module, shape: tuple[int, ...], weights: str
    ) -> None:
        """Wrap a model.

        Args:
            spec: the settings.
            recipe: made of them.
            model: with its weights.
            shape: of what the model yields for one image: a feature map, tokens, or one vector.
            weights: their fingerprint.
        """
        data: dict[str, Any] = timm.data.resolve_model_data_config(model)
        mean, std = recipe.mean or data["mean"], recipe.std or data["std"]
        self._kind, dim = _pooling_of(recipe, model, shape)
        super().__init__(
            spec,
            (("embedding", dim), ("embedding_max", dim)) if self._kind.startswith("map") else (("embedding", dim),),
            weights,
            f"mean={mean}",
            f"std={std}",
            f"pooling={self._kind}",
            *recipe.details,
            input_px=recipe.input_px,
            interpolation=str(data["interpolation"]) if recipe.interpolation == "model" else recipe.interpolation,
        )
        self.model, self._is_cropped = model, recipe.edge != recipe.input_px
        self._centre = slice(recipe.crop_from_px, recipe.crop_from_px + recipe.edge)
        self._n_prefix = int(getattr(model, "num_prefix_tokens", 0))
        self.register_buffer("mean", torch.tensor(mean).view(1, -1, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(1, -1, 1, 1), persistent=False)

    def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """See `Network`."""
        if self._is_cropped:
            images = images[:, self._centre, self._centre]
        x = (images.permute(0, 3, 1, 2) / 255 - self.mean) / self.std
        features = self.model(x).float()
        match self._kind:
            case "map NCHW":
                return features.mean(dim=(2, 3)), features.amax(dim=(2, 3))
            case "map NHWC":
                return features.mean(dim=(1, 2)), features.amax(dim=(1, 2))
            case "cls":
                return (features[:, 0],)
            case "mean":
                return (features[:, self._n_prefix :].mean(dim=1),)
            case "cls_mean":
                return (torch.cat([features[:, 0], features[:, self._n_prefix :].mean(dim=1)], dim=1),)
        return (features,)


def _pooling_of(recipe: Recipe, model: nn.Module, shape: tuple[int, ...]) -> tuple[str, int]:
    """How the output of this shape becomes a vector, and how long that is."""
    if len(shape) == 4:
        layout = "NHWC" if getattr(model, "output_fmt", "NCHW") == "NHWC" else "NCHW"
        return f"map {layout}", shape[layout.index("C")]
    if len(shape) == 3:
        return recipe.pooling, shape[2] * (2 if recipe.pooling == "cls_mean" else 1)
    return "pooled NC", shape[1]


def is_known_to_timm(name: str) -> bool:
    """Whether it is the name of a timm model, with the tag of one of its checkpoints or without."""
    return name in timm.list_models() or name in timm.list_models(pretrained=True)


@encoder_named(None)
def load_timm_network(spec: EncoderSpec, storage_options: StorageOptions | None = None) -> TimmNetwork:
    """Load a preset or a timm model.

    Raises:
        CheckpointError: the weights cannot be read, do not fit the model, or are those of another preset.
        ValueError: the model is not known, or it does not take `spec.input_px` or yield what `spec.pooling` needs.
    """
    recipe = recipe_of(spec)
    if not timm.is_model(recipe.architecture.split(".")[0]):
        close = ", ".join(difflib.get_close_matches(spec.name, [*PRESETS, *timm.list_models()], n=3))
        raise ValueError(
            f"encoder {spec.name} is neither a preset nor a timm model{f': did you mean {close}?' if close else ''}"
        )
    source = spec.weights or recipe.weights
    given = open_weights(source, storage_options) if source else None
    if given and spec.name in PRESETS:
        refuse_weights_of_another_preset(given, spec.name, is_published=spec.weights is None)
    model, pool, shape = _without_weights(spec, recipe)
    if given:
        checkpoint = given
        _fill(model, recipe, checkpoint)
    else:
        checkpoint = published_checkpoint(model.pretrained_cfg, spec.name)
        model = _with_timms_weights(model, recipe, checkpoint, pool)
    weights = fingerprint_once(model.state_dict(), checkpoint.file)
    network = TimmNetwork(spec, recipe, model, shape, weights)
    network.origin = origin_of(spec, checkpoint)
    return network


def random_network(spec: EncoderSpec) -> TimmNetwork:
    """Build a preset or a timm model with random weights; raises ValueError as `load_timm_network`."""
    recipe = recipe_of(spec)
    _, pool, shape = _without_weights(spec, recipe)
    return TimmNetwork(spec, recipe, recipe.new_model(pool, pretrained=False), shape, "random")


def _without_weights(spec: EncoderSpec, recipe: Recipe) -> tuple[Any, GlobalPool, tuple[int, ...]]:
    """The model, how it ends, and the shape of what it yields for one image."""
    pools: dict[str, tuple[GlobalPool, ...]] = {"pooled": ("own",), "auto": ("", "own")}
    for pool in pools.get(recipe.pooling, ("",)):
        # First without weights: models that pool in another way may have others in this form.
        shape = _output_shape(recipe, pool)
        if len(shape) == _n_axes(recipe, pool):
            model = recipe.empty_model(pool)
            if recipe.pooling in ("cls", "cls_mean") and getattr(model, "cls_token", None) is None:
                raise ValueError(
                    f"encoder {spec.name} has no class token: set its pooling to mean, not {recipe.pooling}"
                )
            return model, pool, shape
    raise ValueError(f"encoder {spec.name} yields {list(shape)}, not {_wanted(recipe, shape)}")


def _n_axes(recipe: Recipe, pool: GlobalPool) -> int:
    """Of what a model must yield."""
    return 2 if pool == "own" else 3 if recipe.pooling in _OF_TOKENS else 4


def _wanted(recipe: Recipe, shape: tuple[int, ...]) -> str:
    """What the pooling needs, and the remedy."""
    if recipe.pooling in _OF_TOKENS:
        return "tokens [n, t, dim]: set its pooling to auto, or choose a transformer, for example vit_small_patch16_224"
    if recipe.pooling == "map":
        return (
            "a feature map [n, dim, h, w]: set its pooling to auto, or choose a convolutional model, for example "
            "efficientnet_b0 or resnet50"
        )
    pooling = {3: "cls", 4: "map"}.get(len(shape))  # of tokens; of a feature map
    return f"one vector per tile: {f'set its pooling to {pooling}' if pooling else 'choose another model'}"


@torch.inference_mode()
def _output_shape(recipe: Recipe, pool: GlobalPool) -> tuple[int, ...]:
    """For one image. Without numbers if the model runs without: on a processor, ViT-g takes seconds for them.

    Raises:
        ValueError: the model does not take images of this size.
    """
    edge = recipe.edge
    with suppress(Exception), torch.device("meta"):  # what this raises is raised below too, if it is not of the device
        return tuple(recipe.empty_model(pool)(torch.zeros(1, 3, edge, edge)).shape)
    model = recipe.empty_model(pool)
    try:
        return tuple(model(torch.zeros(1, 3, edge, edge)).shape)
    except Exception as error:  # an assertion or whatever a layer raises
        if is_out_of_memory(error):
            raise
        setting = "input_px" if edge == recipe.input_px else "crop_px"
        own = timm.data.resolve_model_data_config(model)["input_size"][-1]
        remedy = f"set its {setting} to {own}" if own != edge else "choose another size or model"
        if hasattr(model, "set_input_size") and own != edge:
            remedy += f", or its kwargs to {{img_size: {edge}}}, which resamples the position embeddings"
        raise ValueError(
            f"encoder {recipe.name} does not take images of {edge} x {edge} px ({first_sentence(error)}): {remedy}"
        ) from None


def _fill(model: nn.Module, recipe: Recipe, checkpoint: Checkpoint) -> None:
    """Give a model the weights of a checkpoint; raises CheckpointError if they are of another."""
    tensors = to_timm(checkpoint.tensors, model, other_grid=recipe.takes_other_grid)
    differences = list(differences_of(tensors, model.state_dict()))
    if differences:
        named = "; ".join(differences[:_DIFFERENCES_NAMED])
        more = f"; and {len(differences) - _DIFFERENCES_NAMED:,} more" if len(differences) > _DIFFERENCES_NAMED else ""
        fitting = _presets_of(checkpoint.tensors)[:_PRESETS_NAMED]
        remedy = f"set its model to {' or '.join(fitting)}" if fitting else "give the checkpoint of that model"
        raise CheckpointError(f"{checkpoint.name} does not fit {recipe.name}: {named}{more}; {remedy}")
    fill(model, tensors)


def _with_timms_weights(model: nn.Module, recipe: Recipe, checkpoint: Checkpoint, pool: GlobalPool) -> nn.Module:
    """The model with weights of timm's own; if they are in another layout, one that timm makes and fills."""
    tensors = to_timm(checkpoint.tensors, model, other_grid=recipe.takes_other_grid)
    if not any(differences_of(tensors, model.state_dict())):
        fill(model, tensors)
        return model
    return recipe.new_model(pool, pretrained=True, pretrained_cfg_overlay={"file": str(checkpoint.path)})


def _presets_of(tensors: StateDict) -> list[str]:
    """Names of the presets that tensors fill."""
    widths = {len(tensor) for tensor in tensors.values() if tensor.ndim == 1}  # of biases and norms
    found = []
    for name, preset in PRESETS.items():
        width = preset.dim // 2 if preset.pooling == "cls_mean" else preset.dim
        if preset.unavailable is None and width in widths:
            recipe = recipe_of(EncoderSpec(name, None))
            with torch.device("meta"):
                model = recipe.empty_model("own" if preset.pooling == "pooled" else "")
            if not any(differences_of(to_timm(tensors, model, other_grid=True), model.state_dict())):
                found.append(name)
    return found
