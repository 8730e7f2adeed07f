"""The job predict after train on tables of two encoders: a model alone says how the features of new patients are made."""

import shutil
from pathlib import Path
from typing import Any

import polars as pl
import pytest
import yaml
from deltalake import DeltaTable
from pyspark.sql import SparkSession

from jobs import predict, train
from jobs.runtime.settings.config import Config
from tests.conftest import preprocess_in, write_csv
from tests.messages import plain
from tests.spark.conftest import Again, Finished, in_shared_session
from tests.spark.test_splits_job import split_in

FIRST, SECOND = "test_efficientnet", "second.v1"


def _trained(config: Config, encoder: str) -> Path:
    """The folder of a model on the bags of an encoder."""
    root = Path(config.output.root)
    training = {"encoder": encoder, "epochs": 1, "hidden": 8, "attention_hidden": 4, "device": "cpu"}
    settings = root.parent / "train.yaml"
    settings.write_text(yaml.safe_dump({"patients": "none.csv", "output": {"root": str(root)}, "training": training}))
    before = set(root.glob("models/*"))
    assert train.main(["--config", str(settings)]) == 0
    [folder] = set(root.glob("models/*")) - before
    return folder


def test_a_model_needs_no_settings_beside_it_and_runs_its_own_encoder_alone(
    spark: SparkSession,
    finished: Finished,
    again: Again,
    encoder_weights: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    in_shared_session(spark, monkeypatch)
    encoders: dict[str, Any] = {
        FIRST: {"weights": str(encoder_weights), "input_px": 96},
        SECOND: {"model": FIRST, "weights": str(encoder_weights), "input_px": 64},
    }
    splits = {"train": 1.0, "validation": 0.0, "test": 0.0}
    config = again(encoders=encoders, splits=splits, on_failed_slides="ignore")
    preprocess_in(spark, config).write_record("done")
    split_in(spark, config)
    models = {name: _trained(config, name) for name in (FIRST, SECOND)}

    slides = tmp_path / "slides"
    slides.mkdir()
    shutil.copy(finished.slides / "a1.tif", slides / "n1.tif")
    csv = write_csv(tmp_path / "new.csv", [("n1", "south", "101", 0, None)])
    settings = tmp_path / "predict.yaml"
    root = config.output.root
    written = {"patients": str(csv), "slides": {"root": str(slides)}, "output": {"root": root}}
    settings.write_text(yaml.safe_dump(written))
    for number, (encoder, model) in enumerate(models.items(), 1):
        capsys.readouterr()
        command = ["--config", str(settings), f"predict.model={model}"]
        assert predict.main(command) == 0
        said = capsys.readouterr()
        assert f"by model {model.name} on encoder {encoder}, 1 of them in this run" in said.out
        assert (
            f"by model {model.name}: encoder {encoder}, " in plain(said.err) and "tiling.max_background=0.5" in said.err
        )
        features = pl.read_delta(f"{root}/features").filter(pl.col("patient_id") == "101")
        assert sorted(features["encoder"].unique()) == sorted([FIRST, SECOND][:number])  # the other was not run
        rows = pl.read_delta(f"{root}/predictions").select("patient_id", "model_id", "encoder").rows()
        assert sorted(rows) == sorted(("101", models[name].name, name) for name in [FIRST, SECOND][:number])
        version = DeltaTable(f"{root}/features").version()
        assert predict.main(command) == 0  # makes nothing again
        assert DeltaTable(f"{root}/features").version() == version
    assert predict.main([*command, f"encoders.{SECOND}.input_px=96"]) == 2
    assert f"encoders.{SECOND}.input_px is 96, not 64: leave these out" in plain(capsys.readouterr().err)
