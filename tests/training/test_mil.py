"""Models of bags: what the paper's equations say, bag by bag; and their files."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler

from jobs.training.feed.bags import Bag, Bags
from jobs.training.model.files import (
    ModelCard,
    ModelError,
    SplitCard,
    TrainingState,
    checkpoint_card,
    load_checkpoint,
    load_model,
    save_checkpoint,
    save_model,
)
from jobs.training.model.logistic import collect, fit_logistic
from jobs.training.model.mil import KINDS, AttentionMIL, BagModel, Kind, LogisticModel, ModelSpec, build_model
from tests.training.batches import batch_of

DIM, SIZES = 6, (3, 1, 5)


def bags(sizes: tuple[int, ...] = SIZES, seed: int = 0) -> Bags:
    torch.manual_seed(seed)
    made = [Bag(torch.randn(n, DIM), torch.rand(8).softmax(0), None) for n in sizes]
    numbers = range(len(sizes))
    return batch_of(made, [f"p{i}" for i in numbers], [f"c{i % 3}" for i in numbers], [i % 2 for i in numbers])


def model(kind: Kind = "attention", **changes: object) -> BagModel:
    torch.manual_seed(1)
    values = {"hidden": 5, "attention": 4, "histogram_bins": 8, "centers": ("c0", "c1")} | changes
    return build_model(ModelSpec(kind, DIM, ("CE", "LAA"), **values)).eval()  # type: ignore[arg-type]


def fitted(kind: Kind) -> BagModel:
    made = model(kind)
    if isinstance(made, LogisticModel):
        fit_logistic(made, collect(made, [bags((2,) * 20)]), None, "balanced")
    return made


@pytest.mark.parametrize("kind", KINDS)
def test_a_patient_is_the_same_whoever_is_in_its_batch(kind: Kind) -> None:
    made, together = fitted(kind), bags()
    probabilities, attention = made.predict(together)
    assert probabilities.shape == (3, 2)
    assert torch.allclose(probabilities.sum(1), torch.ones(3))
    parts = torch.split(attention, list(SIZES))
    assert torch.allclose(torch.stack([part.sum() for part in parts]), torch.ones(3))
    for i, tiles in enumerate(together.split()):
        assert together.color_histogram is not None
        alone = batch_of([Bag(tiles, together.color_histogram[i], None)], ["p"], [together.center_id[i]], [0])
        own_probabilities, own_attention = made.predict(alone)
        assert torch.allclose(own_probabilities[0], probabilities[i], atol=1e-6)
        assert torch.allclose(own_attention, parts[i], atol=1e-6)


def test_attention_is_equation_9() -> None:
    made = model(histogram_bins=0, centers=())
    assert isinstance(made, AttentionMIL)
    weights = {name: tensor.numpy().astype(np.float64) for name, tensor in made.state_dict().items()}
    x = bags((7,)).embeddings.numpy().astype(np.float64)
    x = (x - x.mean(1, keepdims=True)) / np.sqrt(x.var(1, keepdims=True) + 1e-5)
    h = np.maximum(x @ weights["tile.1.weight"].T + weights["tile.1.bias"], 0)
    value = np.tanh(h @ weights["value.weight"].T + weights["value.bias"])
    gate = 1 / (1 + np.exp(-(h @ weights["gate.weight"].T + weights["gate.bias"])))
    scores = np.exp((value * gate) @ weights["score.weight"][0] + weights["score.bias"])
    a = scores / scores.sum()
    logits = (a @ h) @ weights["head.weight"].T + weights["head.bias"]
    found_logits, found_attention = made(bags((7,)))
    assert np.allclose(found_attention.detach().numpy(), a, atol=1e-6)
    assert np.allclose(found_logits.detach().numpy()[0], logits, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_the_order_of_tiles_has_no_say(kind: Kind) -> None:
    made, packed = fitted(kind), bags((9,))
    order = torch.randperm(9)
    moved = batch_of([Bag(packed.embeddings[order], packed.color_histogram[0], None)], ["p"], ["c0"], [0])  # type: ignore[index]
    probabilities, attention = made.predict(packed)
    again, moved_attention = made.predict(moved)
    assert torch.allclose(again, probabilities, atol=1e-6)
    assert torch.allclose(moved_attention, attention[order], atol=1e-6)


def test_an_unknown_centre_is_none_of_those_known() -> None:
    made = model()
    extra = made._extra(bags((1, 1, 1)))
    assert extra[:, 8:].tolist() == [[1, 0], [0, 1], [0, 0]]
    assert torch.allclose(extra[:, :8].square().sum(1), torch.ones(3))


def test_a_histogram_that_is_not_fed_is_asked_for() -> None:
    fed = bags()
    without = Bags(**(vars(fed) | {"color_histogram": None}))
    with pytest.raises(ValueError, match="colour histogram"):
        model()(without)


@pytest.mark.parametrize("classes", [2, 3])
def test_logistic_regression_predicts_as_scikit_learn_does(classes: int) -> None:
    many = bags(tuple(range(1, 31)))
    label = torch.arange(30) % classes
    many = Bags(**(vars(many) | {"label": label}))
    made = build_model(ModelSpec("logistic", DIM, ("a", "b", "c")[:classes]))
    assert isinstance(made, LogisticModel)
    train = collect(made, [many])
    strength, loss = fit_logistic(made, train, None, "balanced")
    vectors = np.stack([tiles.numpy().astype(np.float64).mean(0) for tiles in many.split()])
    order = np.argsort(many.patient_id)
    assert np.allclose(train[0], vectors[order])
    scaled = StandardScaler().fit_transform(train[0])
    reference = LogisticRegression(C=strength, class_weight="balanced", tol=1e-8, max_iter=5000).fit(scaled, train[1])
    probabilities, _ = made.predict(many)
    assert np.allclose(probabilities.numpy()[order], reference.predict_proba(scaled), atol=1e-4)
    assert 0 < loss < np.log(classes)


def card(made: BagModel) -> ModelCard:
    return ModelCard(
        model_id="run",
        spec=made.spec,
        columns=("embeddings",),
        prior=(0.75, 0.25),
        table_uri="s3://bucket/patients",
        table_version=3,
        encoder="uni2-h",
        feature_settings=({"tiling": {"tile_px": 448}},),
        splits={"train": SplitCard(4, {"CE": 3, "LAA": 1}, "abc")},
        seed=5,
        training={"epochs": 3},
        settings={"tiling": {"mpp": None}, "encoders": {"uni2-h": {"mean": [0.5, 0.5, 0.5]}}},
        history=({"epoch": 0.0, "train_loss": 0.1 + 0.2, "validation_auroc": math.nan},),
        best_epoch=0,
    )


@pytest.mark.parametrize("kind", KINDS)
def test_a_model_comes_back_from_its_folder_to_the_last_bit(kind: Kind, tmp_path: Path) -> None:
    made = fitted(kind)
    written = save_model(str(tmp_path / "model"), made, card(made))
    loaded, read = load_model(str(tmp_path / "model"))
    assert read == written
    text = (tmp_path / "model/model.json").read_text()
    assert json.loads(text, parse_constant=pytest.fail)["history"][0]["validation_auroc"] is None
    assert read.classes == ("CE", "LAA")
    assert sorted(path.name for path in (tmp_path / "model").iterdir()) == ["model.json", "model.safetensors"]
    for one, other in zip(made.predict(bags()), loaded.predict(bags()), strict=True):
        assert torch.equal(one, other)


def test_what_is_no_model_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    with pytest.raises(ModelError, match=r"no model.json in .*MODELS/RUN_ID"):
        load_model(str(folder))
    made = model()
    save_model(str(folder), made, card(made))
    other = build_model(made.spec)
    save_model(str(tmp_path / "other"), other, card(other))
    whole = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes((tmp_path / "other/model.safetensors").read_bytes())
    with pytest.raises(ModelError, match="not of one model"):
        load_model(str(folder))
    (folder / "model.safetensors").write_bytes(whole[:-100])
    with pytest.raises(ModelError, match=r"has [\d,]+ bytes where its header counts on"):
        load_model(str(folder))
    values = json.loads((folder / "model.json").read_text())
    (folder / "model.json").write_text(json.dumps(values | {"format": 99}))
    with pytest.raises(ModelError, match="format 99"):
        load_model(str(folder))


def test_a_model_that_is_no_number_is_refused_to_predict_and_to_resume(tmp_path: Path) -> None:
    made = model()
    with torch.no_grad():
        made.head.bias[1] = math.nan  # type: ignore[union-attr, operator]
    folder = str(tmp_path / "model")
    save_model(folder, made, card(made))
    with pytest.raises(ModelError, match=r"1 of 2 numbers of tensor head\.bias are NaN or infinite"):
        load_model(folder)
    good, bad = model().state_dict(), made.state_dict()
    moments = {"state": {0: {"step": torch.tensor(1.0), "exp_avg": torch.tensor([math.inf])}}}
    for state, tensor in (
        (TrainingState({}, bad), "head.bias"),
        (TrainingState({}, good, best_model=bad), "head.bias"),
        (TrainingState({}, good, moments), "optimizer.0.exp_avg"),
    ):
        save_checkpoint(folder, state)
        with pytest.raises(ModelError, match=rf"numbers of tensor {tensor} are NaN or infinite"):
            load_checkpoint(folder)
    save_checkpoint(folder, TrainingState({}, good))
    assert load_checkpoint(folder).model.keys() == good.keys()


def test_a_checkpoint_of_another_format_is_not_gone_on_with(tmp_path: Path) -> None:
    made = model()
    values = card(made).to_json()
    save_checkpoint(str(tmp_path), TrainingState(values, made.state_dict()))
    assert checkpoint_card(str(tmp_path)).spec == made.spec
    del values["spec"]
    for other, reason in (
        (values | {"format": 1}, r"format 1, this version of slidelake reads \d+"),
        (values, "'spec'"),
    ):
        save_checkpoint(str(tmp_path), TrainingState(other, made.state_dict()))
        with pytest.raises(
            ModelError, match=rf"checkpoint\.pt is no checkpoint of this version of slidelake \({reason}\)"
        ):
            checkpoint_card(str(tmp_path))


def test_files_of_a_model_that_are_pointers_or_pages_are_told_as_such(tmp_path: Path) -> None:
    made = model()
    save_model(str(tmp_path), made, card(made))
    for name, content in (
        ("checkpoint.pt", b""),
        ("model.safetensors", b"<html>"),
        ("model.json", b"version https://git-lfs.github.com/spec/v1"),
    ):
        (tmp_path / name).write_bytes(content)
    with pytest.raises(ModelError, match=r"checkpoint\.pt has 0 bytes"):
        load_checkpoint(str(tmp_path))
    with pytest.raises(ModelError, match=r"model\.json is a Git LFS pointer, not the file"):
        load_model(str(tmp_path))
    save_model(str(tmp_path / "b"), made, card(made))
    (tmp_path / "b/model.safetensors").write_bytes(b"<html>")
    with pytest.raises(ModelError, match=r"model\.safetensors is an HTML page"):
        load_model(str(tmp_path / "b"))
