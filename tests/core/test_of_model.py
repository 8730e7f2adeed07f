"""The settings of a model's features: what is kept of a run, what completes the settings of predict, and what differs."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from jobs.runtime.settings.config import Config, ConfigError, load_config
from jobs.runtime.settings.of_model import (
    differences_as_written,
    missing_files,
    settings_of_features,
    taken_from_model,
    with_settings_of_model,
)

NAME = "vit_small.v1"  # a name may have dots
WRITTEN: dict[str, Any] = {
    "patients": "train.csv",
    "output": {"root": "tables", "embedding_dtype": "float16"},
    "tiling": {"mpp": 0.5, "seed": 3},
    "stain": {"weights": "s3://key:secret@models/stain.pth"},
    "encoders": {NAME: {"weights": "w.safetensors", "mean": [0.5, 0.5, 0.5], "kwargs": {"init_values": 1e-5}}, "b": {}},
    "inference": {"batch_size": 8},
}


def kept(written: dict[str, Any] = WRITTEN, precision: str = "bf16 by torch") -> dict[str, Any]:
    """What is kept of a run with these settings, by way of the JSON of table runs and of model.json."""
    config = json.loads(json.dumps(Config.model_validate(written).masked()))
    recipe = {"encoder.precision": precision}
    settings: dict[str, Any] = json.loads(json.dumps(settings_of_features(config, NAME, recipe)))
    return settings


def completed(tmp_path: Path, written: dict[str, Any], of_model: dict[str, Any], *overrides: str) -> Config:
    file = tmp_path / "predict.yaml"
    file.write_text(yaml.safe_dump({"patients": "new.csv", "output": {"root": "tables"}} | written))
    return load_config(str(file), overrides, complete=lambda _, own: with_settings_of_model(own, of_model, NAME))


def test_what_shaped_the_features_is_kept_and_nothing_else() -> None:
    settings = kept()
    assert settings.keys() == {"encoders", "inference", "tiling", "tissue", "stain", "histogram"}
    assert settings["encoders"].keys() == {NAME}
    assert settings["encoders"][NAME]["weights"] == "w.safetensors"
    assert settings["inference"] == {"precision": "bf16", "runtime": "torch"}
    assert kept(precision="fp32")["inference"] == {"precision": "fp32"}  # every runtime's fp32 is the same
    assert settings["stain"] == {"weights": "s3://models/stain.pth"}
    assert "seed" not in settings["tiling"]  # nothing is drawn
    assert kept(WRITTEN | {"tiling": {"max_tiles_per_patient": 9}})["tiling"]["seed"] == 0
    assert settings["tissue"]["method"] == "brightness" and "background_brightness" in settings["tissue"]
    assert settings_of_features({}, NAME, {}) == settings_of_features({"encoders": {"b": {}}}, NAME, {}) == {}


def test_settings_that_are_left_out_are_the_models(tmp_path: Path) -> None:
    settings = kept()
    config = completed(tmp_path, {}, settings)
    assert list(config.encoders) == [NAME]
    assert settings_of_features(config.masked(), NAME, {"encoder.precision": "bf16 by torch"}) == settings
    assert (config.output.embedding_dtype, config.inference.batch_size) == ("float32", "auto")  # shape no vector
    assert differences_as_written(config, settings) == []


def test_what_is_set_stays_and_the_other_encoders_are_left_out(tmp_path: Path) -> None:
    settings = kept()
    same = {"encoders": {"b": {"weights": "b.pth"}, NAME: None}, "inference": {"precision": None}, "tiling": None}
    same |= {"aggregators": {"mean": {"encoder": "b"}}}  # of job vectors
    config = completed(tmp_path, same, settings, f"encoders.{NAME}.weights=/mine.safetensors", "stain.weights=/s.pth")
    assert list(config.encoders) == [NAME]
    assert (config.encoders[NAME].weights, config.stain.weights) == ("/mine.safetensors", "/s.pth")
    assert (config.tiling.mpp, config.inference.precision) == (0.5, "bf16")
    # files are compared by their content once they are loaded, and null is no precision
    assert differences_as_written(config, settings) == []
    other = {
        "encoders": {NAME: {"model": "vit_large", "mean": [0.4, 0.5, 0.5], "kwargs": {}}},
        "inference": {"precision": "fp32", "runtime": "torch"},
    }
    config = completed(tmp_path, other, settings)
    assert differences_as_written(config, settings) == [
        f'encoders.{NAME}.model is "vit_large", not null',
        f"encoders.{NAME}.mean is [0.4, 0.5, 0.5], not [0.5, 0.5, 0.5]",
        f'encoders.{NAME}.kwargs is {{}}, not {{"init_values": 1e-05}}',
        'inference.precision is "fp32", not "bf16"',
    ]
    assert differences_as_written(completed(tmp_path, {"encoders": {NAME: {"model": NAME}}}, settings), settings) == []


def test_a_stain_normaliser_that_the_model_does_not_have_is_a_difference(tmp_path: Path) -> None:
    plain = kept(WRITTEN | {"stain": {}})
    config = completed(tmp_path, {"stain": {"weights": "/s.pth"}}, plain)
    assert differences_as_written(config, plain) == ['stain.weights is "/s.pth", not null']


@pytest.mark.parametrize(
    "written",
    [{}, {"tiling": {"mpp": 0.5, "tile_px": 448}, "encoders": {NAME: {"weights": "/other"}}}],
)
def test_what_is_taken_is_named(written: dict[str, Any]) -> None:
    taken = taken_from_model(written, kept())
    own = [f'encoders.{NAME}.weights="w.safetensors"', "tiling.mpp=0.5"]
    assert [one for one in own if one in taken] == ([] if written else own)
    assert f"encoders.{NAME}.mean=[0.5, 0.5, 0.5]" in taken and 'inference.precision="bf16"' in taken
    assert not any(one.startswith(("histogram", "tissue", "tiling.tile_px")) for one in taken)  # their defaults


def test_weights_that_are_not_here_are_named_unless_the_settings_name_others(tmp_path: Path) -> None:
    settings = kept()
    assert missing_files(completed(tmp_path, {}, settings), settings) == [(f"encoders.{NAME}.weights", "w.safetensors")]
    other = completed(tmp_path, {}, settings, f"encoders.{NAME}.weights=/nowhere")
    assert missing_files(other, settings) == []  # whoever loads them says so
    weights = tmp_path / "w.safetensors"
    weights.touch()
    for place in (str(weights), "hf-hub:owner/name", None):
        here = kept(WRITTEN | {"encoders": {NAME: {"weights": place}}})
        assert missing_files(completed(tmp_path, {}, here), here) == []


def test_the_folder_of_a_model_may_lie_elsewhere_and_is_named_if_it_is_not_here(tmp_path: Path) -> None:
    there, key = f"local-dir:{tmp_path / 'there'}", f"encoders.{NAME}.model"
    settings = kept(WRITTEN | {"encoders": {NAME: {"model": there}}})
    config = completed(tmp_path, {}, settings)
    assert config.encoders[NAME].model == there
    assert missing_files(config, settings) == [(key, there)]
    moved = completed(tmp_path, {}, settings, f"{key}=local-dir:{tmp_path}")
    assert differences_as_written(moved, settings) == [] == missing_files(moved, settings)
    (tmp_path / "there").mkdir()
    assert missing_files(config, settings) == []


@pytest.mark.parametrize("gone", [{"tiling": {"gone": 3}}, {"encoders": {NAME: {"gone": 3}}}, {"lost": {"gone": 3}}])
def test_a_setting_that_this_version_lacks_is_named(gone: dict[str, Any], tmp_path: Path) -> None:
    config = completed(tmp_path, {}, kept())
    for read in (
        lambda: taken_from_model({}, gone),
        lambda: differences_as_written(config, gone),
        lambda: missing_files(config, gone),
    ):
        with pytest.raises(ConfigError, match=r"model\.json has \S+\.gone, .*: the model is of another version"):
            read()
