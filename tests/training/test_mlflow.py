"""Figures of the job train in MLflow."""

import json
import re
from pathlib import Path

import pytest

from jobs import train
from jobs.runtime.settings.config import load_config
from tests.messages import plain
from tests.training.cohorts import Drawn, write_patients
from tests.training.train_runs import settings, trained


def test_what_mlflow_is_reached_by_is_not_kept_with_the_model(patients: list[Drawn], tmp_path: Path) -> None:
    write_patients(tmp_path, patients)
    output = f"file://{tmp_path}/models?token=t0psecret"
    with_secret = settings(tmp_path, output=str(tmp_path / "models"), epochs=1)
    config = load_config(with_secret, [f"training.mlflow={output}"])
    task = train.planned_run(config)
    assert task.mlflow_uri == output
    assert "t0psecret" not in json.dumps(task.card.to_json())


def test_mlflow_gets_the_same_figures_and_costs_no_training(
    patients: list[Drawn], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from mlflow.tracking import MlflowClient  # noqa: PLC0415 - slow to import

    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    uri = (tmp_path / "mlruns").as_uri()
    write_patients(tmp_path, patients)
    _, card = trained(tmp_path, epochs=2, mlflow=uri)
    client = MlflowClient(uri)
    experiment = client.get_experiment_by_name("slidelake")
    assert experiment is not None
    [run] = client.search_runs([experiment.experiment_id])
    assert (run.info.run_name, run.info.status, run.data.params["epochs"]) == (card.model_id, "FINISHED", "2")
    told = client.get_metric_history(run.info.run_id, "train_loss")
    assert [metric.value for metric in told] == [epoch["train_loss"] for epoch in card.history]

    def broken(*_: object, **__: object) -> None:
        raise OSError("no such place")

    monkeypatch.setattr("jobs.training.training_run.write_results", broken)
    capsys.readouterr()
    assert train.main(["--config", settings(tmp_path, epochs=1, mlflow=uri)]) == 1
    [hint] = re.findall(r"slidelake train: --resume (\S+) goes on after its last whole epoch", capsys.readouterr().err)
    assert train.main(["--config", settings(tmp_path), "--resume", hint, "training.epochs=9"]) == 2
    assert "--resume goes by the run's own settings: leave out training.epochs" in capsys.readouterr().err
    [failed, _] = client.search_runs([experiment.experiment_id])
    assert failed.info.status == "FAILED"
    monkeypatch.undo()
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    monkeypatch.setattr(MlflowClient, "log_metric", broken)
    capsys.readouterr()
    trained(tmp_path, epochs=2, mlflow=uri)  # all the same
    assert capsys.readouterr().err.count("MLflow cannot be reached (OSError)") == 1
    models = set((tmp_path / "models").iterdir())
    assert train.main(["--config", settings(tmp_path, mlflow="nowhere://x")]) == 2
    last = plain(capsys.readouterr().err).splitlines()[-1]
    assert last.startswith("slidelake train: training.mlflow cannot be used (") and last.endswith("leave it out")
    assert set((tmp_path / "models").iterdir()) == models
