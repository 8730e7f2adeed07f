"""Settings: typed, checked before anything starts, and never told with their secrets."""

import json
from dataclasses import dataclass
from functools import reduce
from pathlib import Path
from typing import Any

import fsspec
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import BaseModel

from jobs.runtime.settings.config import EACH, Config, ConfigError, describe_settings, load_config
from jobs.runtime.settings.job_sections import AggregatorSettings
from jobs.runtime.settings.sections import EncoderSettings, TilingSettings
from jobs.runtime.settings.setting import NO_ROW, filled, setting
from udfs.find_tissue import TissueSpec
from udfs.wsi.store import PublicUri, StoreUri, public_uri
from udfs.wsi.tissue.brightness import Brightness

MINIMAL = {"patients": "patients.csv", "output": {"root": "tables"}}


def written(folder: Path, content: Any) -> str:
    path = folder / "config.yaml"
    path.write_text(content if isinstance(content, str) else yaml.safe_dump(content))
    return str(path)


def refusal(folder: Path, content: Any, *overrides: str) -> str:
    """The one line that settings are refused with."""
    with pytest.raises(ConfigError) as caught:
        load_config(written(folder, content), overrides)
    line = str(caught.value)
    assert line
    assert "\n" not in line
    return line


def test_a_minimal_file_has_the_documented_defaults(tmp_path: Path) -> None:
    config = load_config(written(tmp_path, MINIMAL))
    tiling, [encoder] = config.tiling, config.encoders.values()
    assert (tiling.tile_px, tiling.mpp, tiling.mask_downsample) == (448, None, 16)
    assert config.tissue_method == Brightness(190)
    assert (tiling.max_background, tiling.max_tiles_per_patient, tiling.seed) == (0.10, None, 0)
    assert list(config.encoders) == ["efficientnet_b0"]
    assert (encoder.model, encoder.weights, encoder.input_px) == (None, None, None)
    assert (config.histogram.bins, config.stain.weights, config.on_failed_slides) == (16, None, "report")


@pytest.mark.parametrize(
    ("section", "key", "nearest"),
    [
        ("tiling", "tile_size", "tiling.tile_px"),
        ("tiling", "max_backgruond", "tiling.max_background"),
        ("inference", "preciscion", "inference.precision"),
        ("histogram", "bin", "histogram.bins"),
        (None, "tilling", "tiling"),
        (None, "max_background", "tiling.max_background"),
        ("tiling", "background_brightness", "tissue.background_brightness"),
        (None, "storage_options", "slides.storage_options"),
        ("slides", "storage_option", "slides.storage_options"),
    ],
)
def test_an_unknown_setting_names_the_nearest(tmp_path: Path, section: str | None, key: str, nearest: str) -> None:
    content = MINIMAL | ({section: {key: 1}} if section else {key: None})
    named = f"{section}.{key}" if section else key
    assert f"unknown setting {named}: did you mean {nearest}?" in refusal(tmp_path, content)


@pytest.mark.parametrize("key", ["patients", "output.root"])
def test_a_required_setting_is_asked_for(tmp_path: Path, key: str) -> None:
    content: dict[str, Any] = {"patients": "patients.csv", "output": {"root": "tables"}}
    content = {"output": content["output"]} if key == "patients" else {"patients": "p.csv", "output": {}}
    assert refusal(tmp_path, content) == f"{key} is required: add it to the configuration or give {key}=VALUE"


@pytest.mark.parametrize(
    ("override", "told"),
    [
        ("tiling.tile_px=many", ["tiling.tile_px", "integer", "'many'"]),
        ("tiling.tile_px=8", ["tiling.tile_px", "greater than or equal to 16", "8"]),
        ("tiling.max_background=1.5", ["tiling.max_background", "less than or equal to 1", "1.5"]),
        ("tiling.mpp=0", ["tiling.mpp", "micrometres per pixel, 0.02 to 20", "0"]),
        ("tiling.mpp=40", ["tiling.mpp", "micrometres per pixel, 0.02 to 20", "40"]),
        ("patches.mpp=250", ["patches.mpp", "micrometres per pixel, 0.02 to 20", "250"]),
        ("tiling.mpp=.inf", ["tiling.mpp", "finite"]),
        ("tiling.max_background=.nan", ["tiling.max_background"]),
        ("histogram.bins=12", ["histogram.bins", "power of two", "12"]),
        ("histogram.bins=64", ["histogram.bins", "32"]),
        ("inference.device=tpu", ["inference.device", "'auto', 'cpu' or 'cuda'", "'tpu'"]),
        ("on_failed_slides=maybe", ["on_failed_slides", "'report' or 'ignore'"]),
        ("slides.extensions=5", ["slides.extensions", "5"]),
        ("patients=[a, b]", ["patients", "string"]),
        ("tiling=448", ["tiling is a section", "int"]),
        ("tiling.tile_px", ["dotted.key=value"]),
        ("=5", ["dotted.key=value"]),
        ("tiling..tile_px=5", ["dotted.key=value"]),
        ("patients.x=5", ["patients is a value, not a section"]),
        ("tiling.tile_px=[5", ["tiling.tile_px", "not YAML"]),
    ],
)
def test_a_wrong_value_is_told_with_its_key_and_what_would_be_right(
    tmp_path: Path, override: str, told: list[str]
) -> None:
    line = refusal(tmp_path, MINIMAL, override)
    assert all(word in line for word in told), line


@pytest.mark.parametrize("idle", ["inference.device=cpu", "inference.runtime=openvino"])
def test_gpus_that_would_idle_are_refused(tmp_path: Path, idle: str) -> None:
    line = refusal(tmp_path, MINIMAL, idle, "resources.gpus_per_task=0.5")
    assert line.startswith("resources: gpus_per_task takes GPUs that") and idle.replace("=", " = ") in line
    load_config(written(tmp_path, MINIMAL), [idle, "resources.cpus_per_task=2"])
    load_config(written(tmp_path, MINIMAL), ["inference.runtime=torch", "resources.gpus_per_task=0.5"])


@pytest.mark.parametrize(
    ("values", "is_mean", "is_std"),
    [
        ([0.5, 0.4, 1], True, True),
        ([0, 0.4, 0.5], True, False),
        ([123.7, 0.4, 0.5], False, False),
        ([0.5, 255, 0.5], False, False),
        ([0.5, 0.4, -0.1], False, False),
        ([0.5, 0.4, 1.01], False, False),
    ],
)
def test_colours_of_training_images_are_between_0_and_1(
    tmp_path: Path, values: list[float], is_mean: bool, is_std: bool
) -> None:
    for setting_, is_right in (("mean", is_mean), ("std", is_std)):
        override = f"encoders.b0.{setting_}={values}"
        if is_right:
            assert load_config(written(tmp_path, MINIMAL), [override])
        else:
            line = refusal(tmp_path, MINIMAL, override)
            assert line.startswith(f"encoders.b0.{setting_}: must be ")
            assert ("divide by 255" in line) == (max(values) > 1)


def test_a_runtime_that_is_to_be_measured_is_refused_by_who_measures_it(tmp_path: Path) -> None:
    line = refusal(tmp_path, MINIMAL, "inference.runtime=auto")
    assert "inference.runtime" in line and "must be torch or openvino" in line and "slidelake doctor" in line


def test_several_faults_are_told_at_once(tmp_path: Path) -> None:
    line = refusal(tmp_path, {"output": {"root": "t"}, "tiling": {"tile_px": 1, "tile": 5}})
    assert all(word in line for word in ("patients is required", "tiling.tile_px", "unknown setting tiling.tile"))


def test_overrides_win_over_the_file_and_later_ones_over_earlier(tmp_path: Path) -> None:
    uri = written(tmp_path, MINIMAL | {"tiling": {"max_background": 0.5, "seed": 3}, "stain": None})
    overrides = ["tiling.max_background=0.2", "tiling.max_background=0.3", "tiling.mpp=null", "stain.weights=a=b.pth"]
    config = load_config(uri, [*overrides, "slides.extensions=[.tif, .svs]", "slides.storage_options.anon=true"])
    assert (config.tiling.max_background, config.tiling.seed, config.tiling.mpp) == (0.3, 3, None)
    assert config.stain.weights == "a=b.pth"
    assert config.slides.extensions == (".tif", ".svs")
    assert config.slides.storage_options == {"anon": True}


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ("[1, 2]", "a mapping"),
        ("just text", "a mapping"),
        ("a: [1", "not YAML"),
        ("", "required"),
        ("a: b: c", "not YAML"),
    ],
)
def test_a_file_that_is_no_settings_is_refused(tmp_path: Path, content: str, told: str) -> None:
    assert told in refusal(tmp_path, content)


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"--config .*gone\.yaml: no such file"):
        load_config(str(tmp_path / "gone.yaml"))


def test_settings_come_from_any_fsspec_uri() -> None:
    fsspec.filesystem("memory").pipe("/conf/run.yaml", yaml.safe_dump(MINIMAL).encode())
    assert load_config("memory://conf/run.yaml").patients == "patients.csv"


def test_storage_options_take_environment_variables(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLIDES_KEY", "s3cr3t")
    options = {"key": "${SLIDES_KEY}", "client_kwargs": {"url": "x${SLIDES_KEY}y", "n": 5}, "hosts": ["${SLIDES_KEY}"]}
    config = load_config(written(tmp_path, MINIMAL | {"slides": {"storage_options": options}}))
    expected = {"key": "s3cr3t", "client_kwargs": {"url": "xs3cr3ty", "n": 5}, "hosts": ["s3cr3t"]}
    assert config.slides.storage_options == expected
    monkeypatch.delenv("SLIDES_KEY")
    assert "environment variable SLIDES_KEY is not set" in refusal(
        tmp_path, MINIMAL | {"slides": {"storage_options": options}}
    )


SECRET = st.text(st.characters(codec="ascii", categories=["L", "N"]), min_size=12, max_size=20).map("SECRET".__add__)
OPTIONS = st.recursive(
    SECRET | st.integers(10**9, 10**10),
    lambda inner: st.lists(inner, min_size=1, max_size=3) | st.dictionaries(st.sampled_from("abc"), inner, min_size=1),
    max_leaves=6,
)


@settings(derandomize=True, deadline=None, max_examples=25)
@given(options=st.dictionaries(st.sampled_from(["key", "token", "client_kwargs"]), OPTIONS, min_size=1), secret=SECRET)
def test_masked_settings_hold_no_secret(options: dict[str, Any], secret: str) -> None:
    signed = f"https://user:{secret}@store.example/a.csv?sig={secret}"
    config = Config.model_validate(
        MINIMAL
        | {"patients": signed, "slides": {"root": f"{signed}#{secret}", "storage_options": options}}
        | {"encoders": {"e": {"weights": signed}}, "stain": {"weights": f"simplecache::{signed}"}}
    )
    for told in (json.dumps(config.masked()), repr(config.masked())):
        assert "SECRET" not in told
        assert not any(part.isdigit() and len(part) >= 10 for part in told.replace('"', " ").replace("]", " ").split())
    assert set(config.masked()["slides"]["storage_options"]) == set(options)
    assert config.masked()["patients"] == "https://store.example/a.csv"


@pytest.mark.parametrize(
    "content",
    [
        "slides:\n  storage_options: {key: SECRET, oops: [}\n",
        "slides: {storage_options: [SECRET]}\n" + yaml.safe_dump(MINIMAL),
    ],
)
def test_refusals_hold_no_secret(tmp_path: Path, content: str) -> None:
    assert "SECRET" not in refusal(tmp_path, content)
    assert "SECRET" not in refusal(tmp_path, MINIMAL, "slides.storage_options.key={SECRET")
    assert "slides is a section: write its settings below it, not a value (list)" in refusal(
        tmp_path, MINIMAL, "slides=[SECRET]"
    )
    with pytest.raises(ConfigError, match=r"--config nosuch://host/a\.yaml: cannot be read") as caught:
        load_config("nosuch://u:SECRET@host/a.yaml?sig=SECRET")
    assert "SECRET" not in str(caught.value)


def test_settings_in_the_repr_hold_no_storage_options() -> None:
    config = Config.model_validate(MINIMAL | {"slides": {"storage_options": {"key": "SECRET"}}})
    assert "SECRET" not in repr(config)


NAMED = {"encoders": EncoderSettings, "aggregators": AggregatorSettings}  # sections below names of the user


def dotted_keys(model: type[BaseModel], prefix: str = "") -> list[str]:
    keys = []
    for name, info in model.model_fields.items():
        below = NAMED.get(name, info.annotation)
        nested = isinstance(below, type) and issubclass(below, BaseModel)
        inner = f"{prefix}{name}.{EACH}." if name in NAMED else f"{prefix}{name}."
        keys += dotted_keys(below, inner) if nested else [prefix + (info.alias or name)]  # type: ignore[arg-type]
    return keys


def test_every_setting_is_described_with_its_default() -> None:
    described = {key: (default, text) for key, default, text in describe_settings()}
    assert list(described) == dotted_keys(Config)
    assert all(text for _, text in described.values())
    assert described["patients"][0] == described["output.root"][0] == "required"
    config = Config.model_validate(MINIMAL)
    for key, (default, _) in described.items():
        if default != "required":
            value: Any = config.model_dump()
            for part in key.split("."):
                value = value[next(iter(value)) if part == EACH else part]
            assert yaml.safe_load(default) == (list(value) if isinstance(value, tuple) else value), key


def test_every_setting_that_is_a_path_or_uri_is_marked_as_one() -> None:
    texts = {key for key, _, text in describe_settings() if any(word in text for word in ("URI", "path", "folder"))}
    settings: dict[str, Any] = {"patients": "x"}
    for key in sorted(texts - {"patients"}):
        *sections, name = key.split(".")
        reduce(lambda within, part: within.setdefault(part, {}), sections, settings)[name] = "x"
    settings["training"].pop("mlflow")  # which is an extra
    settings["aggregators"][EACH]["method"] = "gated_attention"
    jobs = ("stainnet", "splits", "train", "predict", "patches", "vectors")
    config = Config.model_validate(settings)
    assert {key for job in jobs for key, _, _ in config.locations(job)} == texts - {"training.mlflow"}


def test_every_settings_file_of_the_project_is_valid() -> None:
    folder = Path(__file__).parents[2] / "conf"
    files = sorted(folder.glob("*.yaml"))
    assert files
    for file in files:
        assert set(yaml.safe_load(file.read_text())) <= set(Config.model_fields)


class WiderTiling(TilingSettings):
    """A section with a setting more."""

    overlap_px: int = setting(0, "overlap of neighbouring tiles, pixels", NO_ROW)


@dataclass(frozen=True)
class WiderSpec(TissueSpec):
    """A pass's spec with a field of the same name."""

    overlap_px: int = 0


def test_a_setting_reaches_a_pass_by_a_field_of_its_name() -> None:
    config = Config.model_validate(MINIMAL)
    tiling = WiderTiling(overlap_px=8)
    spec = filled(WiderSpec, tiling, config.slides, method=config.tissue_method)
    assert (spec.overlap_px, spec.tile_px, spec.method) == (8, 448, config.tissue_method)
    with pytest.raises(TypeError, match="method"):
        filled(WiderSpec, tiling, config.slides)
    with pytest.raises(TypeError, match=r"WiderSpec\.tile_px: 2 sections have a setting of this name"):
        filled(WiderSpec, tiling, config.tiling, config.slides, method=config.tissue_method)


def test_mypy_tells_uris_that_may_hold_secrets_from_those_to_show() -> None:
    """An `ignore` that mypy does not need is an error of its own."""

    def open_it(uri: StoreUri) -> str:
        return uri

    def show_it(uri: PublicUri) -> str:
        return uri

    signed = Config.model_validate(MINIMAL | {"patients": "https://u:SECRET@h/p.csv?sig=SECRET"}).patients
    assert "SECRET" in open_it(signed)
    assert "SECRET" in show_it(signed)  # type: ignore[arg-type]
    assert "SECRET" not in show_it(public_uri(signed))
    assert "SECRET" not in open_it(public_uri(signed))  # type: ignore[arg-type]
