"""The job train on a synthetic table of patients: what it finds, writes, repeats and refuses. No Spark is started."""

import json
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
import torch
import yaml
from deltalake import DeltaTable, write_deltalake
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from jobs import train
from jobs.runtime.settings.config import load_config
from jobs.training.feed import make_feed
from jobs.training.model.files import ModelCard, load_card, load_model
from jobs.training.model.metrics import metric_values
from tests.messages import plain
from tests.newest import run_with_newest_pyarrow
from tests.training.cohorts import Drawn, Signal, draw_cohort, shuffled_labels, write_patients
from udfs.schemas import SLIDES

EASY = Signal(dim=16, strength=6.0, offset=0.4, bag=(10, 40))
FAST = {"hidden": 32, "attention_hidden": 16, "learning_rate": 3e-3, "epochs": 12, "dropout": 0.1}


@pytest.fixture(autouse=True)
def _threads_kept() -> Iterator[None]:
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def patients() -> list[Drawn]:
    return draw_cohort(120, EASY)


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


def test_attention_finds_the_signal_and_its_tiles_and_leaves_all_that_a_user_needs(
    patients: list[Drawn], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    table = write_patients(tmp_path, patients)
    folder, card = trained(tmp_path)
    assert auroc(folder) >= 0.95
    out = capsys.readouterr().out
    assert "test: 24 patients (12 CE, 12 LAA)" in out
    assert "too few to tell models apart" in out

    model, _ = load_model(str(folder))
    by_id = {patient.patient_id: patient for patient in patients}
    found = []
    for bags in make_feed(str(table), split="test", classes=card.classes).epoch(0):
        [patient] = bags.patient_id
        carriers = by_id[patient].carriers
        _, attention = model.predict(bags)
        if carriers:
            top = attention.argsort(descending=True)[: len(carriers)].tolist()
            found.append(len(set(top) & set(carriers)) / len(carriers))
    assert np.mean(found) >= 0.9

    assert (card.classes, card.table_version, card.table_uri) == (("CE", "LAA"), 1, str(table))
    assert card.splits["train"].n == 72
    assert card.prior == (0.5, 0.5)
    assert torch.__version__.startswith(card.versions["torch"])
    names = {path.name for path in folder.iterdir()}
    assert names == {
        *("model.json", "model.safetensors", "predictions.csv", "report.json", "tensorboard"),
        *("report_test.png", "report_validation.png"),
    }
    with Image.open(folder / "report_test.png") as picture:
        assert min(picture.size) > 300

    predictions = pd.read_csv(folder / "predictions.csv", dtype={"patient_id": str})
    assert sorted(predictions["patient_id"]) == sorted(p.patient_id for p in patients if p.split != "train")
    test = predictions[predictions["split"] == "test"]
    again = metric_values((test["label"] == "LAA").to_numpy().astype(np.int64), test[["CE", "LAA"]].to_numpy())
    assert again["auroc"] == pytest.approx(auroc(folder))

    rows = DeltaTable(str(tmp_path / "training_metrics")).to_pandas()
    assert set(rows["run_id"]) == {card.model_id}
    losses = rows[(rows["split"] == "train") & (rows["name"] == "loss")].sort_values("epoch")
    assert losses["value"].tolist() == [epoch["train_loss"] for epoch in card.history]
    assert rows[(rows["split"] == "test") & (rows["name"] == "auroc")]["value"].tolist() == [auroc(folder)]
    events = EventAccumulator(str(folder / "tensorboard"))
    events.Reload()
    scalars = [(event.step, event.value) for event in events.Scalars("train/loss")]
    assert scalars == [(int(e["epoch"]), pytest.approx(e["train_loss"], rel=1e-6)) for e in card.history]


def test_who_looks_at_the_mean_tile_finds_less_and_where_nothing_is_nothing_is_found(tmp_path: Path) -> None:
    patients = draw_cohort(160, EASY, held_out=(0.1, 0.4))
    write_patients(tmp_path, patients)
    attention, _ = trained(tmp_path)
    mean, _ = trained(tmp_path, model="mean", epochs=8)
    logistic, card = trained(tmp_path, model="logistic")
    assert auroc(attention) > max(auroc(mean), auroc(logistic)) + 0.05
    assert len(card.history) == 1
    write_patients(tmp_path, shuffled_labels(patients))
    nothing, _ = trained(tmp_path, epochs=8)
    figure = json.loads((nothing / "report.json").read_text())["test"]["metrics"]["auroc"]
    assert figure["low"] < 0.5 < figure["high"]


def test_three_classes_with_colours_and_centre_sampled_tiles_and_both_columns(tmp_path: Path) -> None:
    write_patients(tmp_path, draw_cohort(90, EASY, classes=("CE", "LAA", "other")))
    folder, card = trained(
        tmp_path, use_histogram=True, use_center=True, columns="both", bag_size=8, epochs=3, class_weights="none"
    )
    assert card.classes == ("CE", "LAA", "other")
    assert (card.spec.dim, card.spec.histogram_bins) == (32, 4096)
    assert card.spec.centers == ("centre 0", "centre 1", "centre 2")
    report = json.loads((folder / "report.json").read_text())
    assert len(report["test"]["confusion"]) == 3
    model, _ = load_model(str(folder))
    columns = (*card.columns, "color_histogram")
    [bags] = make_feed(str(tmp_path / "patients"), split="test", batch_size=99, columns=columns).epoch(0)
    probabilities, _ = model.predict(bags)
    saved = pd.read_csv(folder / "predictions.csv", dtype={"patient_id": str}).set_index("patient_id")
    assert np.allclose(saved.loc[bags.patient_id, list(card.classes)].to_numpy(), probabilities.numpy(), atol=1e-6)


def test_a_class_too_rare_for_a_held_out_split_is_named_and_trained_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    drawn = draw_cohort(90, EASY, classes=("CE", "LAA", "other"))
    write_patients(tmp_path, [p for p in drawn if p.split != "validation" or p.label != "other"])
    folder, card = trained(tmp_path, epochs=2)
    n = sum(p.split == "validation" and p.label != "other" for p in drawn)
    assert (
        f"slidelake train: split validation has {n} labelled patients, 0 of other: the figures"
        in capsys.readouterr().err
    )
    assert card.classes == ("CE", "LAA", "other")
    assert all(np.isfinite(value) for figures in card.history for value in figures.values())
    report = json.loads((folder / "report.json").read_text())
    assert all(figure["value"] is not None for split in report.values() for figure in split["metrics"].values())


_KILLED = """
import os, signal, sys
import torch
from tqdm import tqdm
from jobs import train
torch.set_num_threads(1)
steps = 0
def update(self, n=1):
    global steps
    steps += 1
    if steps == 50:  # in the middle of epoch 5
        os.kill(os.getpid(), signal.SIGKILL)
tqdm.update = update
train.main(sys.argv[1:])
"""


def test_a_run_that_is_killed_and_resumed_ends_as_one_that_was_not(patients: list[Drawn], tmp_path: Path) -> None:
    write_patients(tmp_path, patients)
    undisturbed, whole = trained(tmp_path)
    command = [sys.executable, "-c", _KILLED, "--config", settings(tmp_path)]
    killed = subprocess.run(command, cwd=Path(__file__).parents[2], capture_output=True, text=True, check=False)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    [left] = [folder for folder in (tmp_path / "models").iterdir() if folder != undisturbed]
    assert (left / "checkpoint.pt").exists()
    assert not (left / "model.json").exists()
    folder, resumed = trained(tmp_path, "--resume", left.name)
    assert folder == left
    assert len(resumed.history) == len(whole.history) > 6
    assert resumed.history == whole.history
    assert resumed.weights_hash == whole.weights_hash
    assert (folder / "report.json").read_bytes() == (undisturbed / "report.json").read_bytes()
    assert not (folder / "checkpoint.pt").exists()
    rows = DeltaTable(str(tmp_path / "training_metrics")).to_pandas()
    of_run = {name: part.drop(columns="run_id").reset_index(drop=True) for name, part in rows.groupby("run_id")}
    keys = ["epoch", "split", "name"]
    one, other = (of_run[card.model_id].sort_values(keys, ignore_index=True) for card in (whole, resumed))
    pd.testing.assert_frame_equal(one, other)
    assert not one.duplicated(keys).any()


def test_a_logistic_run_that_was_fitted_before_it_was_stopped_is_not_fitted_again(
    patients: list[Drawn], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_patients(tmp_path, patients)
    _, whole = trained(tmp_path, model="logistic")

    def full(*_: Any) -> None:
        raise OSError("no space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("jobs.training.training_run.save_model", full)
        assert train.main(["--config", settings(tmp_path, model="logistic")]) == 1
    [left] = [folder.parent for folder in (tmp_path / "models").glob("*/checkpoint.pt")]
    _, resumed = trained(tmp_path, "--resume", left.name)
    assert (resumed.history, resumed.weights_hash) == (whole.history, whole.weights_hash)


def test_what_mlflow_is_reached_by_is_not_kept_with_the_model(patients: list[Drawn], tmp_path: Path) -> None:
    write_patients(tmp_path, patients)
    output = f"file://{tmp_path}/models?token=t0psecret"
    with_secret = settings(tmp_path, output=str(tmp_path / "models"), epochs=1)
    config = load_config(with_secret, [f"training.mlflow={output}"])
    task = train.planned_run(config)
    assert task.mlflow_uri == output
    assert "t0psecret" not in json.dumps(task.card.to_json())


def test_a_run_is_done_again_from_the_tables_past_and_refused_where_that_is_gone(
    patients: list[Drawn], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    table = write_patients(tmp_path, patients)
    _, first = trained(tmp_path, epochs=4)
    changed = draw_cohort(60, EASY, seed=9)
    write_patients(tmp_path, changed)
    _, again = trained(tmp_path, "--reproduce", first.model_id, epochs=9, learning_rate=1.0)
    assert again.history == first.history
    assert again.weights_hash == first.weights_hash
    assert again.table_version == first.table_version
    assert f"identical to run {first.model_id}: 4 epochs" in capsys.readouterr().out

    old = DeltaTable(str(table))
    old.vacuum(retention_hours=0, enforce_retention_duration=False, dry_run=False)
    line = refusal(tmp_path, capsys, "--reproduce", first.model_id)
    assert "vacuumed" in line
    assert str(table) in line


def test_a_run_is_done_again_the_same_with_the_newest_pyarrow(patients: list[Drawn], tmp_path: Path) -> None:
    """There it is fed without petastorm."""
    write_patients(tmp_path, patients)
    folder, first = trained(tmp_path, epochs=1)
    done = run_with_newest_pyarrow("jobs", "train", "--config", settings(tmp_path), "--reproduce", first.model_id)
    assert done.returncode == 0, done.stderr
    assert f"identical to run {first.model_id}: 1 epochs, every figure, and the weights" in done.stdout
    [other] = set(folder.parent.iterdir()) - {folder}
    versions = load_card(str(other)).versions
    assert int(versions["pyarrow"].partition(".")[0]) >= 15 > int(first.versions["pyarrow"].partition(".")[0])
    assert (other / "predictions.csv").read_bytes() == (folder / "predictions.csv").read_bytes()


def test_a_table_made_anew_is_not_the_one_that_was_trained_on(
    patients: list[Drawn], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    table = write_patients(tmp_path, patients)
    _, first = trained(tmp_path, epochs=2)
    table.rename(tmp_path / "old")
    write_patients(tmp_path, [*patients[1:], patients[0]][:-1])
    line = refusal(tmp_path, capsys, "--reproduce", first.model_id)
    assert "split train of version 1" in line
    assert "72 patients then, 71 now" in line
    assert "no checkpoint.pt" in refusal(tmp_path, capsys, "--resume", first.model_id)
    assert "no model.json" in refusal(tmp_path, capsys, "--reproduce", "no-such-run")


def test_folds_are_validated_on_in_turn(
    patients: list[Drawn], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_patients(tmp_path, patients)
    assert "no table splits" in refusal(tmp_path, capsys, fold=1)
    learned_from = [patient for patient in patients if patient.split != "test"]
    rows = [{"patient_id": patient.patient_id, "fold": i // 2 % 4} for i, patient in enumerate(learned_from)]
    write_deltalake(str(tmp_path / "splits"), pa.Table.from_pylist(rows))
    folder, card = trained(tmp_path, fold=1, epochs=2)
    assert [card.splits[name].n for name in ("train", "validation", "test")] == [72, 24, 24]
    held_out = pd.read_csv(folder / "predictions.csv", dtype={"patient_id": str})
    validated = set(held_out.loc[held_out["split"] == "validation", "patient_id"])
    assert validated == {row["patient_id"] for row in rows if row["fold"] == 1}
    write_deltalake(str(tmp_path / "splits"), pa.Table.from_pylist(rows[::-1]), mode="overwrite")
    _, again = trained(tmp_path, "--reproduce", card.model_id)
    assert again.splits == card.splits
    assert "folds [0, 1, 2, 3]" in refusal(tmp_path, capsys, fold=7)
    by_class = [row | {"fold": i % 2} for i, row in enumerate(rows)]  # the classes come in turn
    write_deltalake(str(tmp_path / "splits"), pa.Table.from_pylist(by_class), mode="overwrite")
    assert "split train has 48 labelled patients, 0 of LAA; split validation has 48" in refusal(
        tmp_path, capsys, fold=1
    )


def test_what_can_not_be_trained_on_is_refused_before_any_work(
    patients: list[Drawn], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert "no Delta table" in refusal(tmp_path, capsys)
    some = patients[:12]
    write_patients(tmp_path, [Drawn(**(vars(p) | {"label": "CE"})) for p in some])
    assert "12 labelled patients of 1 classes" in refusal(tmp_path, capsys)
    for label in ("from_prior", "patient_id", "split", "center_id", "Label"):
        write_patients(tmp_path, [Drawn(**(vars(p) | {"label": label})) if p.label == "LAA" else p for p in some])
        line = refusal(tmp_path, capsys)
        assert f"has labels '{label}', which name other columns" in line and "rename them in column label" in line
    write_patients(tmp_path, [Drawn(**(vars(p) | {"split": None})) for p in some])
    assert "run the splits job" in refusal(tmp_path, capsys)
    write_patients(tmp_path, [Drawn(**(vars(p) | {"split": "dev"})) for p in some])
    assert "a split 'dev'" in refusal(tmp_path, capsys)
    write_patients(tmp_path, [*some, Drawn(**(vars(patients[-1]) | {"label": "rare"}))])
    assert "split test" in refusal(tmp_path, capsys)
    held_out = [
        Drawn(**(vars(p) | {"split": "validation" if i < 3 else "test"})) for i, p in enumerate(patients[12:18:2])
    ]
    write_patients(tmp_path, [*some, *held_out, Drawn(**(vars(patients[19]) | {"split": "test"}))])
    line = refusal(tmp_path, capsys)
    assert (
        "split validation has 3 labelled patients, 0 of LAA; split test has 1 labelled patients, 0 of CE: deal" in line
    )
    assert "by the splits job with --redo" in line
    write_patients(tmp_path, [*some, Drawn(**(vars(some[0]) | {"split": "test"})), *patients[-2:]])
    assert f"patients are in two splits: {some[0].patient_id}" in refusal(tmp_path, capsys)


def test_a_gpu_that_is_not_there_is_refused_for_a_new_run_and_for_one_that_had_it(
    patients: list[Drawn], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    write_patients(tmp_path, patients)
    assert "training.device is cuda: no GPU here" in refusal(tmp_path, capsys, device="cuda")
    folder, card = trained(tmp_path, epochs=1)
    assert card.device == "cpu"
    card_file = folder / "model.json"
    card_file.write_text(json.dumps(json.loads(card_file.read_text()) | {"device": "cuda NVIDIA H100"}))
    told = f"run {card.model_id} trained on cuda NVIDIA H100: no GPU here: run it where one is"
    assert told in refusal(tmp_path, capsys, "--reproduce", card.model_id)


def test_a_slide_in_two_splits_under_two_names_stops_training(
    patients: list[Drawn], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_patients(tmp_path, patients)
    one, other = patients[0], patients[-1]
    assert (one.split, other.split) == ("train", "test")
    rows = [
        {
            "image_id": f"{patient.patient_id}_0",
            "patient_id": patient.patient_id,
            "uri": f"s3://slides/{patient.patient_id}.tif",
            "size_bytes": 5000,
            "file_version": "5000-0cc175b9c0f1b6a831c399e269772661",
        }
        for patient in (one, other)
    ]
    write_deltalake(str(tmp_path / "slides"), pa.Table.from_pylist(rows, SLIDES))
    line = refusal(tmp_path, capsys)
    assert one.patient_id in line
    assert other.patient_id in line
    assert "two names" in line


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
    assert capsys.readouterr().err.count("MLflow can't be reached (OSError)") == 1
    models = set((tmp_path / "models").iterdir())
    assert train.main(["--config", settings(tmp_path, mlflow="nowhere://x")]) == 2
    last = plain(capsys.readouterr().err).splitlines()[-1]
    assert last.startswith("slidelake train: training.mlflow can't be used (") and last.endswith("leave it out")
    assert set((tmp_path / "models").iterdir()) == models


def test_help_names_what_is_the_jobs_own(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        train.main(["--help"])
    assert ended.value.code == 0
    told = capsys.readouterr().out
    assert all(word in told for word in ("--resume RUN_ID", "--reproduce RUN_ID", "training.patience"))
