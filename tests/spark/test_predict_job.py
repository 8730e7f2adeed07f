"""The job predict: from slides to probabilities of patients without labels; nobody is left out, other features are refused."""

import argparse
import csv
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import safetensors.torch
import timm
import torch
from deltalake import DeltaTable
from pyspark.sql import SparkSession

from jobs import predict
from jobs.runtime.run.run import Run
from jobs.runtime.settings.config import Config, ConfigError
from jobs.runtime.settings.of_model import settings_of_features
from jobs.training.feed import make_feed
from jobs.training.labelled import read_training_set
from jobs.training.model.files import ModelCard, load_model, save_model
from jobs.training.model.mil import ModelSpec, build_model
from jobs.training.origins import read_origins
from tests.spark.conftest import COHORT, Again, Finished, by, rows_of, unchanged
from tests.spark.test_splits_job import split_in

PRIOR = (0.7, 0.3)
NEW: list[tuple[Any, ...]] = [
    ("k1", "south", "009", 0, None),  # known, without a label
    ("n1", "south", "102", 0, "Other"),  # a label that the model does not know is no matter
    ("n2", "north", "101", 0, None),
    ("n3", "north", "101", 1, None),
    ("n4", "south", "102", 1, "Other"),  # no such file: the bag lacks it
    ("e1", "south", "005", 0, "CE"),  # nor this: no tile; known, with its label
]


def predict_in(spark: SparkSession, config: Config, status: int = 0) -> Run:
    run = Run(config, spark, predict.JOB)
    assert predict.predict(run, argparse.Namespace(retry_failed=False)) == status
    return run


Model = Callable[[str], Path]


@pytest.fixture(scope="module")
def model(spark: SparkSession, finished: Finished, tmp_path_factory: pytest.TempPathFactory) -> Model:
    """Make a model with random weights, whose card tells that it learned from the finished run's features."""
    folder = tmp_path_factory.mktemp("models")
    root = folder / "tables"
    shutil.copytree(finished.config.output.root, root)
    everybody = finished.config.splits.model_copy(update={"train": 1.0, "validation": 0.0, "test": 0.0})
    output = finished.config.output.model_copy(update={"root": str(root)})
    split_in(spark, finished.config.model_copy(update={"output": output, "splits": everybody}))
    members = read_training_set(str(root / "patients"), None)
    origins = read_origins(members, str(root / "runs"))
    [recipe] = origins.recipes
    assert (members.encoder, recipe["encoder.model"]) == ("test_efficientnet", "test_efficientnet")
    spec = ModelSpec("attention", 2 * members.dim, ("CE", "LAA"), hidden=16, attention=8, histogram_bins=4096)
    card = ModelCard(
        "first",
        spec,
        ("embeddings", "embeddings_max"),
        PRIOR,
        members.table_uri,
        members.version,
        members.encoder,
        origins.recipes,
        {},
        0,
        {},
        settings_of_features(origins.config, members.encoder, recipe),
    )

    def make(name: str) -> Path:
        torch.manual_seed(len(name))
        save_model(str(folder / name), build_model(spec), replace(card, model_id=name))
        return folder / name

    return make


@pytest.fixture
def slides(finished: Finished, tmp_path: Path) -> Path:
    """The slides of patients who are new, beside the known ones."""
    root = tmp_path / "slides"
    shutil.copytree(finished.slides, root)
    for new, old in (("n1", "a1"), ("n2", "m1"), ("n3", "d1")):
        shutil.copy(root / f"{old}.tif", root / f"{new}.tif")
    return root


def submitted(path: Path) -> dict[str, list[float]]:
    """Of these patients, 005 alone has no bag."""
    header, *rows = list(csv.reader(path.read_text().splitlines()))
    assert header == ["patient_id", "CE", "LAA", "from_prior"]
    assert {row[0] for row in rows if row[3] == "true"} == {"005"} and {row[3] for row in rows} == {"true", "false"}
    assert [row[0] for row in rows] == sorted(row[0] for row in rows)
    return {row[0]: [float(cell) for cell in row[1:3]] for row in rows}


def test_every_patient_of_a_csv_without_labels_gets_probabilities(
    spark: SparkSession, again: Again, model: Model, slides: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings: dict[str, Any] = {"predict": {"model": str(model("first")), "csv": str(tmp_path / "out/submission.csv")}}
    config = again(NEW, slides, on_failed_slides="ignore", **settings)
    predict.check(config)
    run = predict_in(spark, config)
    said = capsys.readouterr().out
    assert "predicted 4 patients by model first on encoder test_efficientnet, 4 of them in this run" in said
    assert "without a bag, so by the prior (CE 0.700, LAA 0.300): 005\n" in said
    assert "without so many slides that failed: 102 (1)\n" in said
    # n1 is a copy of a1, which the model learned from in other tables; n2 is a copy of m1, which has no label
    learned = {row["patient_id"] for row in rows_of(config, "patients") if row["label"]}
    assert "001" in learned and not {"007"} & learned
    [line] = [line for line in said.splitlines() if line.startswith("  seen      ")]
    assert "n1 (patient 102, new) is a1 (patient 001, learned from) by content (" in line and " is m1" not in line
    table = by(pl.read_delta(f"{config.output.root}/predictions").to_dicts(), "patient_id")
    assert table.keys() == {"005", "009", "101", "102"}
    assert {row["encoder"] for row in table.values()} == {"test_efficientnet"}
    none = table["005"]
    assert {name: row["n_images_failed"] for name, row in table.items()} == {"005": 1, "009": 0, "101": 0, "102": 1}
    assert (none["from_prior"], none["n_tiles"], none["attention"], none["predicted_class"]) == (True, 0, [], None)
    patients = by(rows_of(config, "patients"), "patient_id")
    network, _ = load_model(str(config.predict.model))
    columns = ("embeddings", "embeddings_max", "color_histogram")
    known = ["009", "101", "102"]
    [bags] = make_feed(
        f"{config.output.root}/patients", patients=known, batch_size=3, columns=columns, shuffle=False
    ).epoch(0)
    wanted = dict(zip(bags.patient_id, network.predict(bags)[0].tolist(), strict=True))
    sent = submitted(tmp_path / "out/submission.csv")
    assert sent.keys() == table.keys()
    assert sent["005"] == list(PRIOR)
    for name in known:
        row = table[name]
        assert sent[name] == pytest.approx(wanted[name], abs=1e-6) and sum(sent[name]) == pytest.approx(1, abs=1e-12)
        assert dict(row["probabilities"]) == dict(zip(("CE", "LAA"), sent[name], strict=True))
        assert row["predicted_class"] == ("CE", "LAA")[int(np.argmax(sent[name]))]
        places = [{key: tile[key] for key in ("image_id", "x_px", "y_px")} for tile in row["attention"]]
        assert places == patients[name]["tile_index"]
        assert sum(tile["attention"] for tile in row["attention"]) == pytest.approx(1, abs=1e-5)
        assert (row["from_prior"], row["n_tiles"], row["run_id"]) == (
            False,
            patients[name]["n_tiles"],
            run.record.run_id,
        )
    assert {"101", "102"} <= patients.keys() and patients["101"]["split"] is None  # nobody trains on them

    version = DeltaTable(f"{config.output.root}/predictions").version()
    (tmp_path / "out/submission.csv").unlink()
    with unchanged(config, "slides", "features", "patients"):
        again_ = predict_in(spark, config)
    assert again_.record.counts["patients_predicted"] == 0
    assert DeltaTable(f"{config.output.root}/predictions").version() == version
    assert submitted(tmp_path / "out/submission.csv") == sent

    other = config.model_copy(
        update={"predict": config.predict.model_copy(update={"model": str(model("second")), "csv": None})}
    )
    predict_in(spark, other)
    rows = pl.read_delta(f"{config.output.root}/predictions")
    assert sorted(rows["model_id"]) == ["first"] * 4 + ["second"] * 4
    assert submitted(Path(config.output.root, "predictions_csv/second.csv")).keys() == sent.keys()


def test_who_has_more_or_fewer_slides_that_failed_is_predicted_again(
    spark: SparkSession, again: Again, model: Model, slides: Path
) -> None:
    made: dict[str, Any] = {"on_failed_slides": "ignore", "predict": {"model": str(model("first"))}}

    def failed_of(run: Run) -> dict[str, int]:
        """Slides that failed, of patients predicted in this run."""
        rows = pl.read_delta(f"{run.config.output.root}/predictions").filter(pl.col("run_id") == run.record.run_id)
        return dict(rows.select("patient_id", "n_images_failed").rows())

    assert failed_of(predict_in(spark, again(NEW, slides, **made))) == {"005": 1, "009": 0, "101": 0, "102": 1}
    changed = [*(row for row in NEW if row[0] != "n4"), ("e2", "south", "005", 1, "CE")]
    assert failed_of(predict_in(spark, again(changed, slides, **made))) == {"005": 2, "102": 0}


def test_features_made_otherwise_are_refused_by_name(
    spark: SparkSession, again: Again, model: Model, tmp_path: Path
) -> None:
    made = {"predict": {"model": str(model("first"))}}
    with pytest.raises(
        ConfigError,
        match=r"first learned from features made with other settings: tiling.tile_px is 224, not 448: leave",
    ):
        predict.check(again(tiling={"tile_px": 224}, **made))
    weights = tmp_path / "other.safetensors"
    torch.manual_seed(8)
    network = timm.create_model("test_efficientnet", pretrained=False, num_classes=0, global_pool="")
    safetensors.torch.save_file(network.state_dict(), weights)
    config = again(encoders={"test_efficientnet": {"weights": str(weights), "input_px": 96}}, **made)
    predict.check(config)  # only who loads the weights knows
    with (
        unchanged(config, "slides", "tiles", "features", "patients"),
        pytest.raises(ConfigError, match=r"encoder\.weights is \w+, not \w+"),
    ):
        predict_in(spark, config)


def test_a_csv_that_would_empty_labels_is_refused(spark: SparkSession, again: Again, model: Model) -> None:
    rows: list[tuple[Any, ...]] = [("a1", "north", "001", 0, None), ("k1", "south", "009", 0, None)]
    config = again(rows, predict={"model": str(model("first"))})
    with (
        unchanged(config, "slides", "tiles", "features", "patients"),
        pytest.raises(ConfigError, match=r"1 patients of the CSV have no label there, but one in table slides \(001\)"),
    ):
        predict_in(spark, config)


def test_a_model_that_is_missing_or_tells_no_features_is_refused(again: Again, model: Model, tmp_path: Path) -> None:
    for uri, said in ((None, "predict.model is required"), (str(tmp_path / "no"), "no model.json in")):
        with pytest.raises(ConfigError, match=said):
            predict.check(again(predict={"model": uri}))
    network, card = load_model(str(model("first")))
    save_model(str(tmp_path / "mute"), network, replace(card, feature_settings=()))
    with pytest.raises(ConfigError, match="does not say how its features were made"):
        predict.check(again(COHORT, predict={"model": str(tmp_path / "mute")}))
