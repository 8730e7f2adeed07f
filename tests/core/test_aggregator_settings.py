"""Section aggregators: what is refused, by name, before anything starts."""

from pathlib import Path

import pytest
import yaml

from jobs.runtime.settings.config import Config, ConfigError, load_config


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
        ("aggregators={a b: {method: mean}}", "the name of an aggregator is a text"),
        ("aggregators={median: {}}", "median: no method 'median': set method to one of gated_attention, max, mean"),
        ("aggregators={a: {method: gated_attention}}", "a: method gated_attention needs the weights of a checkpoint"),
        ("aggregators={mean: {weights: m.pt}}", "mean: method mean has no weights"),
        ("aggregators={mean: {encoder: uni}}", "mean: encoder 'uni' is not in section encoders: efficientnet_b0"),
        ("aggregators={mean: {wights: m.pt}}", "did you mean aggregators.NAME.weights"),
    ],
)
def test_what_cannot_be_is_refused_by_name(override: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=message):
        loaded(tmp_path, override)
