"""What the job predict refuses by a model's own settings: before Spark starts, in one line that names each of them."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from jobs import predict
from jobs.runtime.settings.config import Config
from jobs.runtime.settings.identity import Identity
from jobs.runtime.settings.of_model import settings_of_features
from jobs.training.model.files import ModelCard, save_model
from jobs.training.model.mil import ModelSpec, build_model
from tests.messages import plain

NAME, TABLES = "vits16", "/proc/tables"
LICENCE = {"licence": "CC-BY-NC-4.0", "licence.commercial": "false"}


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    path = tmp_path / "kaiko.safetensors"
    path.touch()
    return path


@pytest.fixture
def card(tmp_path: Path, weights: Path) -> ModelCard:
    """Of a model in folder model."""
    encoder = {"model": "kaiko-vits16", "weights": str(weights)}
    settings = {
        "patients": "train.csv",
        "output": {"root": "t"},
        "tiling": {"tile_px": 224, "mpp": 0.5},
        "encoders": {NAME: encoder, "resnet18": {}},
    }
    config = Config.model_validate(settings)
    recipe = Identity(config, {NAME: {"encoder.weights": "abc", "encoder.precision": "fp32"}}).recipe(NAME)
    spec = ModelSpec("mean", 4, ("CE", "LAA"), hidden=8, attention=4)
    kept = settings_of_features(config.masked(), NAME, recipe)
    made = ModelCard("m1", spec, ("embeddings",), (0.5, 0.5), "t/patients", 0, NAME, (recipe,), {}, 0, {}, kept)
    return _saved(tmp_path, made)


def _saved(folder: Path, card: ModelCard) -> ModelCard:
    torch.manual_seed(0)
    return save_model(str(folder / "model"), build_model(card.spec), card)


def _run(folder: Path, capsys: pytest.CaptureFixture[str], *arguments: str, **sections: Any) -> tuple[int, list[str]]:
    """Exit status and lines on stderr of a run whose tables cannot be written: if nothing else is refused, their folder is."""
    file = folder / "predict.yaml"
    (folder / "new.csv").write_text("image_id,center_id,patient_id,image_num,label\na1,n,001,0,CE\n")
    written = {"patients": str(folder / "new.csv"), "output": {"root": TABLES}}
    file.write_text(yaml.safe_dump(written | {"predict": {"model": str(folder / "model")}} | sections))
    capsys.readouterr()
    status = predict.main(["--config", str(file), *arguments])
    out, err = capsys.readouterr()
    return status, plain(err).splitlines() if not out else out.splitlines()


def test_what_is_left_out_is_the_models_and_the_log_says_what(
    card: ModelCard, tmp_path: Path, weights: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    status, lines = _run(tmp_path, capsys)
    taken, refusal = lines
    assert status == 2 and TABLES in refusal
    assert taken == (
        f'slidelake predict: by model m1: encoder {NAME}, encoders.{NAME}.model="kaiko-vits16", '
        f'encoders.{NAME}.weights="{weights}", tiling.tile_px=224, tiling.mpp=0.5, inference.precision="fp32"'
    )
    same = {"tiling": {"tile_px": 224}, "encoders": {NAME: {"model": "kaiko-vits16"}, "other": {"pooling": "cls"}}}
    status, lines = _run(tmp_path, capsys, **same)
    assert status == 2 and TABLES in lines[1] and "tile_px" not in lines[0] and ".model" not in lines[0]
    status, lines = _run(tmp_path, capsys, "--print-config")
    shown = yaml.safe_load("\n".join(lines))
    assert status == 0 and shown["tiling"]["mpp"] == 0.5 and list(shown["encoders"]) == [NAME]


def test_other_values_than_the_models_are_named_in_one_line_at_once(
    card: ModelCard, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    status, lines = _run(
        tmp_path,
        capsys,
        "tiling.tile_px=448",
        f"encoders.{NAME}.pooling=mean",
        tissue={"background_brightness": 200},
        inference={"precision": "bf16"},
    )
    assert status == 2 and lines[1:] == [
        "slidelake predict: predict.model: m1 learned from features made with other settings: tiling.tile_px is 448, not 224; "
        f'tissue.background_brightness is 200, not 190; encoders.{NAME}.pooling is "mean", not "auto"; inference.precision is '
        '"bf16", not "fp32": leave these out or set them to the model\'s, or train a model on features as these'
    ]


def test_weights_that_are_not_here_are_named_with_their_setting(
    card: ModelCard, tmp_path: Path, weights: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    moved = weights.rename(tmp_path / "moved.safetensors")
    status, lines = _run(tmp_path, capsys)
    assert status == 2 and lines[1].endswith(
        f"with encoders.{NAME}.weights = {weights}, which is not on this machine: set encoders.{NAME}.weights to where these "
        "weights are"
    )
    status, lines = _run(tmp_path, capsys, f"encoders.{NAME}.weights={moved}")
    assert status == 2 and TABLES in lines[-1]  # nothing else is wrong


def test_a_model_that_does_not_say_how_features_are_made_needs_the_settings(
    card: ModelCard, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _saved(tmp_path, replace(card, settings={}))
    status, lines = _run(tmp_path, capsys)
    assert status == 2 and f"takes bags of encoder {NAME}, and does not say how to make them" in lines[-1]
    own = {"encoders": {NAME: {"model": "kaiko-vits16"}, "other": {}}, "tiling": {"tile_px": 224, "mpp": 0.5}}
    status, lines = _run(tmp_path, capsys, **own)
    assert status == 2 and TABLES in lines[-1]


def test_a_licence_that_forbids_it_stops_a_commercial_prediction(
    card: ModelCard, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    status, lines = _run(tmp_path, capsys, "licence=commercial")
    assert status == 2 and TABLES in lines[1]  # once its weights are loaded, the run names a licence that is not known
    _saved(tmp_path, replace(card, feature_settings=(card.feature_settings[0] | LICENCE,)))
    status, lines = _run(tmp_path, capsys, "licence=commercial")
    assert status == 2 and f"the licence of encoder {NAME} (CC-BY-NC-4.0) forbids commercial use" in lines[-1]
    assert json.loads((tmp_path / "model/model.json").read_text())["feature_settings"][0]["licence"] == "CC-BY-NC-4.0"
