"""Section aggregators: what is refused, by name, before anything starts; and models of job train as aggregators."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from jobs.runtime.settings.config import Config, ConfigError, load_config
from jobs.training.model.files import ModelCard, save_model
from jobs.training.model.mil import ModelSpec, build_model
from jobs.vectors import load_all


def loaded(folder: Path, *overrides: str) -> Config:
    (folder / "config.yaml").write_text(yaml.safe_dump({"patients": "p.csv", "output": {"root": "tables"}}))
    return load_config(str(folder / "config.yaml"), overrides)


def test_mean_and_max_are_the_default_and_others_replace_them(tmp_path: Path) -> None:
    assert list(loaded(tmp_path).aggregators) == ["mean", "max"]
    config = loaded(tmp_path, "aggregators={stroke.v2: {method: gated_attention, weights: m.safetensors}, mean: null}")
    assert config.aggregators["stroke.v2"].weights == "m.safetensors"
    assert config.aggregators["mean"].method is None
    again = "aggregators.stroke.v2.weights=n #2.pt"  # a path is taken whole, and a name may have dots
    config = loaded(tmp_path, "aggregators={stroke.v2: {method: gated_attention}}", again)
    assert config.aggregators["stroke.v2"].weights == "n #2.pt"


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("aggregators={}", "must be a mapping of one aggregator or several"),
        ("aggregators={a b: {method: mean}}", "is no name of an aggregator: take a text"),
        ("aggregators={median: {}}", "median: no method 'median': set method to one of gated_attention, max, mean"),
        ("aggregators={a: {method: gated_attention}}", "a: method gated_attention needs the weights of a checkpoint"),
        ("aggregators={mean: {weights: m.pt}}", "mean: method mean has no weights"),
        ("aggregators={mean: {wights: m.pt}}", "did you mean aggregators.mean.weights"),
    ],
)
def test_what_cannot_be_is_refused_by_name(override: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=message):
        loaded(tmp_path, override)


def test_an_encoder_that_is_not_in_the_settings_is_refused_by_job_vectors_alone(tmp_path: Path) -> None:
    config = loaded(tmp_path, "aggregators={mean: {encoder: uni}}")
    with pytest.raises(ConfigError, match="mean: encoder 'uni' is not in section encoders: efficientnet_b0"):
        load_all(config)


def save_trained(folder: Path, columns: tuple[str, ...] = ("embeddings",)) -> None:
    spec = ModelSpec("attention", 6, ("CE", "LAA"), hidden=4, attention=3)
    card = ModelCard("m", spec, columns, (0.5, 0.5), "t/patients", 0, "large", (), {}, 0, {})
    save_model(str(folder), build_model(spec), card)


@pytest.mark.parametrize(
    ("columns", "encoder", "message"),
    [
        (
            ("embeddings_max",),
            None,
            r"learned from \['embeddings_max'\] of table patients.*training\.columns=embedding",
        ),
        (("embeddings", "embeddings_max"), None, "learned from .*embeddings_max"),
        (
            ("embeddings",),
            "small",
            "learned from encoder large, and not from small: set aggregators.stroke.encoder to large",
        ),
        (("embeddings",), "large", None),
        (("embeddings",), None, None),
    ],
)
def test_a_model_of_job_train_takes_what_it_learned_from(
    columns: tuple[str, ...], encoder: str | None, message: str | None, tmp_path: Path
) -> None:
    save_trained(tmp_path / "m", columns)
    stroke = f"{{method: gated_attention, weights: {tmp_path}/m/model.safetensors, encoder: {encoder or 'null'}}}"
    config = loaded(tmp_path, "encoders={small: {}, large: {}}", f"aggregators={{stroke: {stroke}}}")
    if message:
        with pytest.raises(ConfigError, match=message):
            load_all(config)
        return
    [(as_sent, aggregator)] = load_all(config).values()
    assert (as_sent.encoder, aggregator.input_dim) == ("large", 6)
    alone = loaded(tmp_path, "encoders={small: {}}", f"aggregators={{stroke: {stroke.replace('large', 'small')}}}")
    with pytest.raises(ConfigError, match="learned from encoder large, and not from small"):
        load_all(alone)
    (tmp_path / "m/model.json").unlink()
    [(as_sent, _)] = load_all(config).values()
    assert as_sent.encoder == encoder


@pytest.mark.parametrize("content", ['{"columns": ', "\udcff", None])
def test_a_card_that_cannot_be_read_is_refused_by_its_place(content: str | None, tmp_path: Path) -> None:
    save_trained(tmp_path / "m")
    (tmp_path / "m/model.json").unlink()
    if content is None:
        (tmp_path / "m/model.json").mkdir()
    else:
        (tmp_path / "m/model.json").write_bytes(content.encode(errors="surrogateescape"))
    stroke = f"{{method: gated_attention, weights: {tmp_path}/m/model.safetensors}}"
    with pytest.raises(ConfigError, match=r"aggregators\.stroke: .*/m/model\.json beside the weights cannot be read"):
        load_all(loaded(tmp_path, f"aggregators={{stroke: {stroke}}}"))


def test_a_card_that_the_store_withholds_is_refused_by_its_place(
    memory: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_trained(tmp_path / "m")
    memory.pipe_file("/m/model.safetensors", (tmp_path / "m/model.safetensors").read_bytes())
    memory.pipe_file("/m/model.json", b"{}")
    info = memory.info

    def refused(path: str, **options: Any) -> Any:
        if path.endswith(".json"):
            raise PermissionError("403 Forbidden")
        return info(path, **options)

    monkeypatch.setattr(type(memory), "info", lambda _, path, **options: refused(path, **options))
    stroke = "{method: gated_attention, weights: memory://m/model.safetensors}"
    with pytest.raises(ConfigError, match=r"memory://m/model\.json .* cannot be read \(PermissionError: 403 Forbidden"):
        load_all(loaded(tmp_path, f"aggregators={{stroke: {stroke}}}"))


@pytest.mark.parametrize("content", ["{}", '{"encoder": "other"}', "[]"])
def test_a_card_of_other_software_is_ignored(content: str, tmp_path: Path) -> None:
    save_trained(tmp_path / "m")
    (tmp_path / "m/model.json").write_text(content)
    stroke = f"{{method: gated_attention, weights: {tmp_path}/m/model.safetensors}}"
    [(as_sent, _)] = load_all(loaded(tmp_path, f"aggregators={{stroke: {stroke}}}")).values()
    assert as_sent.encoder is None
