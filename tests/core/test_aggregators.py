"""Aggregators against NumPy and against gated attention written anew; checkpoints by the names of three codes; the refusals."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch import nn

from jobs.training.feed.bags import Bags
from jobs.training.model.mil import BagModel, ModelSpec, build_model
from udfs.wsi.aggregator.aggregator import (
    AggregatorSpec,
    StreamingAggregator,
    TileBag,
    aggregator_methods,
    load_aggregator,
)
from udfs.wsi.aggregator.gated_attention import GatedAttention
from udfs.wsi.weights.checkpoint import CheckpointError

DIM, WIDTH, ATTENTION = 12, 8, 5


def bag_of(n_tiles: int, dim: int = DIM, seed: int = 0) -> TileBag:
    random = np.random.default_rng(seed)
    places = random.integers(0, 9, (n_tiles, 2)).astype(np.int32)
    return TileBag(random.normal(size=(n_tiles, dim)).astype(np.float32), places, np.zeros(n_tiles, np.int32))


def streaming(method: str) -> StreamingAggregator:
    aggregator = load_aggregator(AggregatorSpec("any", method))
    assert isinstance(aggregator, StreamingAggregator)
    return aggregator


@settings(derandomize=True, deadline=None, max_examples=40)
@given(
    cuts=st.lists(st.integers(0, 49), max_size=6), seed=st.integers(0, 2**31), method=st.sampled_from(["mean", "max"])
)
def test_mean_and_max_in_parts_are_those_of_numpy(cuts: list[int], seed: int, method: str) -> None:
    bag, aggregator = bag_of(50, seed=seed), streaming(method)
    parts = [part for part in np.split(bag.embeddings, sorted(cuts)) if len(part)]
    np.random.default_rng(seed).shuffle(parts)
    state = aggregator.partial(parts[0])
    for part in parts[1:]:
        state = aggregator.merge(state, aggregator.partial(part))
    wanted = getattr(bag.embeddings.astype(np.float64), method)(0)
    for vector in (aggregator.finish(state, 50), aggregator.pool(bag)):
        assert vector.dtype == np.float32
        np.testing.assert_allclose(vector, wanted, rtol=1e-6, atol=1e-7)


def test_the_mean_of_many_tiles_loses_no_digits() -> None:
    embeddings = np.full((300_000, 1), 0.1, np.float32) + np.float32(1000)
    mean = streaming("mean").pool(TileBag(embeddings, np.zeros((300_000, 2), np.int32), np.zeros(300_000, np.int32)))
    assert mean[0] == embeddings[0, 0]  # a sum in float32 is off in the fourth digit


class Clam(nn.Module):
    """CLAM-SB by the names of its checkpoints."""

    def __init__(self) -> None:
        super().__init__()
        net = nn.Module()
        net.attention_a = nn.Sequential(nn.Linear(WIDTH, ATTENTION), nn.Tanh(), nn.Dropout(0.25))
        net.attention_b = nn.Sequential(nn.Linear(WIDTH, ATTENTION), nn.Sigmoid(), nn.Dropout(0.25))
        net.attention_c = nn.Linear(ATTENTION, 1)
        self.attention_net = nn.Sequential(nn.Linear(DIM, WIDTH), nn.ReLU(), nn.Dropout(0.25), net)
        self.classifiers = nn.Linear(WIDTH, 2)
        self.instance_classifiers = nn.ModuleList(nn.Linear(WIDTH, 2) for _ in range(2))


class Abmil(nn.Module):
    """MIL-Lab's ABMIL with one layer before the attention, by the names of its checkpoints on the hub."""

    def __init__(self) -> None:
        super().__init__()
        self.model = nn.Module()
        self.model.patch_embed = nn.Sequential(nn.Linear(DIM, WIDTH), nn.ReLU(), nn.Dropout(0.25))
        self.model.global_attn = nn.Module()
        self.model.global_attn.attention_a = nn.Sequential(nn.Linear(WIDTH, ATTENTION), nn.Tanh(), nn.Dropout(0.25))
        self.model.global_attn.attention_b = nn.Sequential(nn.Linear(WIDTH, ATTENTION), nn.Sigmoid(), nn.Dropout(0.25))
        self.model.global_attn.attention_c = nn.Linear(ATTENTION, 1)
        self.model.classifier = nn.Linear(WIDTH, 3)


def trained() -> BagModel:
    """As job train makes it."""
    spec = ModelSpec("attention", DIM, ("CE", "LAA"), hidden=WIDTH, attention=ATTENTION, centers=("north",))
    model = build_model(spec).eval()
    with torch.no_grad():
        for each in model.parameters():
            each.add_(torch.randn_like(each) * 0.3)  # LayerNorm begins at 1 and 0
    return model


def by_hand(embeddings: NDArray[np.float32], layers: dict[str, NDArray[Any]]) -> NDArray[Any]:
    """Equations 7 and 9 in float64, tile by tile."""
    x = embeddings.astype(np.float64)
    if "norm" in layers:
        x = (x - x.mean(1, keepdims=True)) / np.sqrt(x.var(1, keepdims=True) + 1e-5)
        x = x * layers["norm"] + layers["norm.bias"]
    hidden = np.maximum(x @ layers["hidden"].T + layers["hidden.bias"], 0)
    scores = []
    for h in hidden:
        value = np.tanh(layers["value"] @ h + layers["value.bias"])
        gate = 1 / (1 + np.exp(-(layers["gate"] @ h + layers["gate.bias"])))
        scores.append(float((layers["score"] @ (value * gate) + layers["score.bias"])[0]))
    weights = np.exp(np.array(scores) - max(scores))
    pooled: NDArray[Any] = (weights[:, None] * hidden).sum(0) / weights.sum()
    return pooled


LAYOUTS: dict[str, tuple[Callable[[], nn.Module], dict[str, str]]] = {
    "train": (trained, {"norm": "tile.0", "hidden": "tile.1", "value": "value", "gate": "gate", "score": "score"}),
    "clam": (
        Clam,
        {
            "hidden": "attention_net.0",
            "value": "attention_net.3.attention_a.0",
            "gate": "attention_net.3.attention_b.0",
            "score": "attention_net.3.attention_c",
        },
    ),
    "abmil": (
        Abmil,
        {
            "hidden": "model.patch_embed.0",
            "value": "model.global_attn.attention_a.0",
            "gate": "model.global_attn.attention_b.0",
            "score": "model.global_attn.attention_c",
        },
    ),
}


def saved(folder: Path, tensors: dict[str, torch.Tensor], *, as_torch: bool = False) -> str:
    path = folder / ("model.pt" if as_torch else "model.safetensors")
    if as_torch:
        torch.save({"state_dict": tensors}, path)
    else:
        safetensors.torch.save_file(tensors, path)
    return str(path)


@pytest.mark.parametrize("as_torch", [False, True])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("n_tiles", [1, 37, 9000])  # 9000: in several parts
def test_gated_attention_is_that_of_the_paper_by_any_of_the_names(
    layout: str, n_tiles: int, as_torch: bool, tmp_path: Path
) -> None:
    torch.manual_seed(3)
    build, names = LAYOUTS[layout]
    state = build().state_dict()
    layers = {each: state[f"{name}.weight"].numpy().astype(np.float64) for each, name in names.items()}
    layers |= {f"{each}.bias": state[f"{name}.bias"].numpy().astype(np.float64) for each, name in names.items()}
    spec = AggregatorSpec("any", "gated_attention", saved(tmp_path, state, as_torch=as_torch))
    aggregator, bag = load_aggregator(spec), bag_of(n_tiles)
    vector = aggregator.pool(bag)
    assert vector.dtype == np.float32 and vector.shape == (WIDTH,) and aggregator.input_dim == DIM
    np.testing.assert_allclose(vector, by_hand(bag.embeddings, layers), rtol=1e-4, atol=1e-5)


def test_the_vector_of_a_trained_model_is_what_its_classifier_gets(tmp_path: Path) -> None:
    torch.manual_seed(4)
    model = trained()
    seen: list[torch.Tensor] = []
    head = model.get_submodule("head")
    head.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    bag = bag_of(29)
    bags = Bags(
        patient_id=["p"],
        center_id=["north"],
        label=torch.tensor([0]),
        embeddings=torch.from_numpy(bag.embeddings),
        offsets=torch.tensor([0, 29]),
        color_histogram=None,
        tile_index=None,
        repeated=torch.tensor([False]),
    )
    model.predict(bags)
    vector = GatedAttention.load(saved(tmp_path, model.state_dict())).pool(bag)
    np.testing.assert_allclose(vector, seen[0][0, :WIDTH].numpy(), rtol=1e-5, atol=1e-6)


def test_the_identity_is_that_of_the_weights_whatever_file_and_names_they_have(tmp_path: Path) -> None:
    state = Clam().state_dict()
    (tmp_path / "other").mkdir()
    names = {"attention_net.0": "model.patch_embed.0", "attention_net.3": "model.global_attn"}
    renamed = {}
    for name, tensor in state.items():
        [part] = [part for part in [*names, "classifiers", "instance_classifiers"] if name.startswith(f"{part}.")]
        renamed[names.get(part, part) + name.removeprefix(part)] = tensor
    one = GatedAttention.load(saved(tmp_path, state))
    other = GatedAttention.load(saved(tmp_path / "other", renamed, as_torch=True))
    assert one.identity == other.identity and one.identity[:2] == ("method=gated_attention", "version=1")
    state["attention_net.0.bias"] += 1
    assert GatedAttention.load(saved(tmp_path, state)).identity != one.identity
    assert streaming("mean").identity == ("method=mean", "version=1")


def without(part: str) -> Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]:
    return lambda state: {name: tensor for name, tensor in state.items() if part not in name}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (without("attention_b"), r"no gate\.weight, no gate\.bias: give"),
        (without("attention_net.0"), r"no tile\.1\.weight, no tile\.1\.bias"),
        (
            lambda state: {"head.weight": state["classifiers.weight"]},
            r"no tile\.1\.weight, no tile\.1\.bias, no value\.weight:",
        ),
        (
            lambda state: state | {"attention_net.3.attention_c.weight": torch.zeros(2, ATTENTION)},  # CLAM-MB
            r"attention_net\.3\.attention_c\.weight is \[2, 5\], not \[1, 5\]",
        ),
        (lambda state: state | {"post.0.weight": torch.zeros(2, 2)}, r"post\.0\.weight is not in the model"),
        (
            lambda state: state | {"encoder.value.weight": torch.zeros(2, 2)},
            r"encoder\.value\.weight is not in the model",
        ),
        (
            lambda state: state | {"attention_net.0.bias": torch.full((WIDTH,), torch.nan)},
            r"8 of 8 numbers of tensor .* NaN",
        ),
    ],
)
def test_a_checkpoint_of_something_else_is_refused_by_its_first_tensors(
    change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]], message: str, tmp_path: Path
) -> None:
    weights = saved(tmp_path, change(Clam().state_dict()))
    with pytest.raises(CheckpointError, match=message) as error:
        GatedAttention.load(weights)
    assert weights in str(error.value)


def test_weights_that_run_code_or_are_missing_are_refused(tmp_path: Path) -> None:
    torch.save(Clam(), tmp_path / "whole.pt")
    with pytest.raises(CheckpointError, match=r"save model\.state_dict\(\)"):
        GatedAttention.load(str(tmp_path / "whole.pt"))
    with pytest.raises(CheckpointError, match="no weights at"):
        GatedAttention.load(str(tmp_path / "gone.pt"))
    with pytest.raises(CheckpointError, match="is learned"):
        GatedAttention.load(None)


def test_all_methods_are_known_by_name() -> None:
    assert {"mean", "max", "gated_attention"} <= aggregator_methods().keys()
    assert [name for name, each in aggregator_methods().items() if each.has_weights] == ["gated_attention"]
