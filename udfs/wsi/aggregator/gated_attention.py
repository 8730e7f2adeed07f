"""The aggregator `gated_attention`: a learned weighted mean, from the checkpoint of an attention-based MIL model."""

import re
from collections.abc import Iterator, Mapping
from itertools import islice
from typing import TYPE_CHECKING, Self

import numpy as np
from numpy.typing import NDArray

from udfs.wsi.aggregator.aggregator import Aggregator, TileBag
from udfs.wsi.store import StorageOptions

if TYPE_CHECKING:
    import torch

_NAMES = {  # of each layer, in checkpoints of slidelake's job train, CLAM, and MIL-Lab's ABMIL (FEATHER); behind any prefix
    "norm": ("tile.0",),
    "hidden": ("tile.1", "attention_net.0", "patch_embed.0"),
    "value": ("value", "attention_a.0"),
    "gate": ("gate", "attention_b.0"),
    "score": ("score", "attention_c"),
}
_PATTERNS = {
    layer: re.compile(rf"(?:.*\.)?(?:{'|'.join(map(re.escape, names))})\.(weight|bias)")
    for layer, names in _NAMES.items()
}
_LEFT_OUT = re.compile(r"(?:.*\.)?(?:head|classifiers?|instance_classifiers)\..*")  # they follow the pooled vector
_TILES = 4096  # per step, so that little more than bag and hidden values are in memory


class GatedAttention(Aggregator):
    """Gated attention, Ilse, Tomczak and Welling 2018, doi:10.48550/arXiv.1802.04712, equations 7 and 9.

    An embedding passes through LayerNorm if the checkpoint has one, a linear layer and ReLU: h_k. The weight of a tile is
    ``a_k = softmax_k(w^T (tanh(V h_k) * sigmoid(U h_k)))`` over the tiles of the bag, and the vector is ``sum_k a_k h_k``: what
    the classifier of the model gets.
    """

    name = "gated_attention"
    version = 1
    has_weights = True

    def __init__(self, tensors: "Mapping[str, torch.Tensor]", weights: str) -> None:
        """Takes weight and bias of each layer, such as ``hidden.weight`` [k, d], and their fingerprint."""
        self._tensors, self.weights = tensors, weights
        self.input_dim = tensors["hidden.weight"].shape[1]

    @classmethod
    def load(cls, weights: str | None, storage_options: StorageOptions | None = None) -> Self:
        """See `Aggregator`."""
        from udfs.wsi.weights.checkpoint import CheckpointError, fingerprint  # noqa: PLC0415
        from udfs.wsi.weights.sources import open_weights  # noqa: PLC0415

        if weights is None:
            raise CheckpointError("gated_attention is learned: give the path or URI of its weights")
        checkpoint = open_weights(weights, storage_options)
        tensors = {name: each for name, each in checkpoint.tensors.items() if not _LEFT_OUT.fullmatch(name)}
        file_names = _by_layer(tensors)
        if differences := ", ".join(islice(_differences(tensors, file_names), 3)):
            raise CheckpointError(
                f"{checkpoint.name} does not have the tensors of a model with gated attention: {differences}: give a checkpoint "
                "of job train (training.model: attention), of CLAM-SB, or of MIL-Lab's ABMIL with one layer before the attention"
            )
        layers = {layer: tensors[name].float() for layer, name in file_names.items()}
        return cls(layers, fingerprint(layers))

    def pool(self, bag: TileBag) -> NDArray[np.float32]:
        """See `Aggregator`."""
        import torch  # noqa: PLC0415
        from torch.nn import functional as F  # noqa: PLC0415

        def linear(layer: str, values: torch.Tensor) -> torch.Tensor:
            return F.linear(values, self._tensors[f"{layer}.weight"], self._tensors[f"{layer}.bias"])

        with torch.inference_mode():
            hidden, scores = [], []
            for start in range(0, len(bag.embeddings), _TILES):
                part = torch.tensor(bag.embeddings[start : start + _TILES])
                if "norm.weight" in self._tensors:
                    part = F.layer_norm(part, part.shape[1:], self._tensors["norm.weight"], self._tensors["norm.bias"])
                hidden.append(torch.relu(linear("hidden", part)))
                gated = torch.tanh(linear("value", hidden[-1])) * torch.sigmoid(linear("gate", hidden[-1]))
                scores.append(linear("score", gated)[:, 0])
            attention = torch.split(torch.softmax(torch.cat(scores), 0), _TILES)
            parts = [weight @ values for weight, values in zip(attention, hidden, strict=True)]
            pooled: NDArray[np.float32] = torch.stack(parts).sum(0).numpy()
        return pooled


def _by_layer(tensors: "Mapping[str, torch.Tensor]") -> dict[str, str]:
    """The name in the file of each tensor of a layer, such as ``hidden.weight``."""
    found: dict[str, str] = {}
    for name in tensors:
        for layer, pattern in _PATTERNS.items():
            if match := pattern.fullmatch(name):
                found.setdefault(f"{layer}.{match[1]}", name)
    return found


def _differences(tensors: "Mapping[str, torch.Tensor]", file_names: Mapping[str, str]) -> Iterator[str]:
    """What keeps a checkpoint from filling the layers. A tensor that it lacks goes by slidelake's own name."""
    import torch  # noqa: PLC0415

    from udfs.wsi.weights.filling import differences_of  # noqa: PLC0415

    def size(layer: str) -> tuple[int, int]:
        weight = tensors.get(file_names.get(f"{layer}.weight", ""))
        return (weight.shape[0], weight.shape[1]) if weight is not None and weight.ndim == 2 else (0, 0)

    (width, dim), (attention, _) = size("hidden"), size("value")
    shapes: dict[str, tuple[int, ...]] = {
        "hidden.weight": (width, dim),
        "hidden.bias": (width,),
        "value.weight": (attention, width),
        "value.bias": (attention,),
        "gate.weight": (attention, width),
        "gate.bias": (attention,),
        "score.weight": (1, attention),
        "score.bias": (1,),
    }
    if {"norm.weight", "norm.bias"} & file_names.keys():
        shapes |= {"norm.weight": (dim,), "norm.bias": (dim,)}
    expected = {}
    for name, shape in shapes.items():
        layer, _, kind = name.partition(".")
        expected[file_names.get(name, f"{_NAMES[layer][0]}.{kind}")] = torch.empty(shape, device="meta")
    return differences_of(tensors, expected)
