"""Tables and models in Azure's and in Amazon's store."""

import json
from pathlib import Path
from typing import Any

import fsspec
import pytest
import yaml
from deltalake import DeltaTable

from jobs import train
from jobs.training.model.files import ModelCard, load_model
from jobs.training.table_stores import delta_options
from tests.stores.azurite import azurite
from tests.stores.moto import moto
from tests.training.cohorts import Signal, draw_cohort, write_patients


def _train_in(uri: str, options: dict[str, Any], folder: Path) -> ModelCard:
    """Train on the tables there, twice, the second time from the table's past; the model is loaded from there."""
    training = {"hidden": 8, "attention_hidden": 4, "epochs": 2}
    sections = {
        "patients": "none.csv",
        "output": {"root": uri},
        "slides": {"root": uri, "storage_options": options},
        "training": training,
    }
    file = folder / "settings.yaml"
    file.write_text(yaml.safe_dump(sections))
    assert train.main(["--config", str(file)]) == 0
    fs, path = fsspec.url_to_fs(uri, **options)
    [made] = fs.ls(f"{path}/models", detail=False)
    run_id = made.rstrip("/").rpartition("/")[2]
    assert train.main(["--config", str(file), "--reproduce", run_id]) == 0
    _, card = load_model(f"{uri}/models/{run_id}", options)
    assert (card.table_uri, card.model_id) == (f"{uri}/patients", run_id)
    fs.invalidate_cache()
    names = {name.rpartition("/")[2] for name in fs.find(f"{path}/models/{run_id}")}
    assert {"model.json", "model.safetensors", "report.json", "report_test.png", "predictions.csv"} < names
    assert any(name.startswith("events.out.tfevents") for name in names)
    assert "checkpoint.pt" not in names
    secret = options.get("secret") or options["connection_string"]
    assert secret not in json.dumps(card.to_json())
    return card


@pytest.fixture
def cohort(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("SLIDELAKE_STAGING", str(tmp_path / "staged"))
    for name in ("http_proxy", "HTTP_PROXY", "https_proxy", "HTTPS_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    write_patients(tmp_path / "tables", draw_cohort(30, Signal(dim=8, bag=(4, 9), tiles=2)))
    return tmp_path / "tables"


def test_training_in_azures_store(cohort: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    # After its second commit deltalake cannot list a table in Azurite ("Invalid table version"), so here training_metrics stops
    # being written, once that is said.
    with azurite() as blobs:
        blobs.upload(cohort, "tables")
        uri, options = "az://tables", blobs.storage_options()
        _train_in(uri, options, tmp_path)
        assert DeltaTable(f"{uri}/training_metrics", storage_options=delta_options(uri, options)).version() >= 1
    told = [line for line in capsys.readouterr().err.splitlines() if "cannot be written" in line]
    assert len(told) <= 2  # once a run


def test_training_in_amazons_store(cohort: Path, tmp_path: Path) -> None:
    with moto() as s3:
        s3.upload(cohort)
        uri, options = f"s3://{s3.bucket}", s3.storage_options()
        card = _train_in(uri, options, tmp_path)
        rows = DeltaTable(f"{uri}/training_metrics", storage_options=delta_options(uri, options)).to_pandas()
    losses = rows[(rows["run_id"] == card.model_id) & (rows["split"] == "train") & (rows["name"] == "loss")]
    assert sorted(losses["value"]) == sorted(epoch["train_loss"] for epoch in card.history)
