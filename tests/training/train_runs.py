"""Runs of the job train on a synthetic table of patients, without Spark."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from jobs import train
from jobs.training.model.files import ModelCard, load_card
from tests.messages import plain
from tests.training.cohorts import Signal

EASY = Signal(dim=16, strength=6.0, offset=0.4, bag=(10, 40))
FAST = {"hidden": 32, "attention_hidden": 16, "learning_rate": 3e-3, "epochs": 12, "dropout": 0.1}


def settings(root: Path, **training: Any) -> str:
    """A settings file for the tables below root."""
    file = root / "settings.yaml"
    sections = {"patients": "none.csv", "output": {"root": str(root)}, "training": FAST | training}
    file.write_text(yaml.safe_dump(sections))
    return str(file)


def trained(root: Path, *arguments: str, **training: Any) -> tuple[Path, ModelCard]:
    """Run the job; the folder of its model, and its card."""
    models = root / "models"
    before = set(models.iterdir()) if models.exists() else set()
    assert train.main(["--config", settings(root, **training), *arguments]) == 0
    [folder] = set(models.iterdir()) - before or {models / arguments[-1]}
    return folder, load_card(str(folder))


def refusal(root: Path, capsys: pytest.CaptureFixture[str], *arguments: str, **training: Any) -> str:
    """The one line of a refusal, with exit status 2; no model is left."""
    before = sorted((root / "models").glob("*")) if (root / "models").exists() else []
    capsys.readouterr()
    assert train.main(["--config", settings(root, **training), *arguments]) == 2
    lines = [line for line in plain(capsys.readouterr().err).splitlines() if "were not compared" not in line]
    assert sorted((root / "models").glob("*")) == before
    [line] = lines
    return line


def auroc(folder: Path, split: str = "test") -> float:
    figure = json.loads((folder / "report.json").read_text())[split]["metrics"]["auroc"]
    assert figure["low"] <= figure["value"] <= figure["high"]
    return float(figure["value"])
