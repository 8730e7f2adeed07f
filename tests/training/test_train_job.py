"""The job train on a synthetic table of patients: what it finds and what it writes. No Spark is started."""

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
import torch
from deltalake import DeltaTable, write_deltalake
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from jobs import train
from jobs.training.feed import make_feed
from jobs.training.model.files import load_model
from jobs.training.model.metrics import metric_values
from tests.training.cohorts import Drawn, draw_cohort, shuffled_labels, write_patients
from tests.training.train_runs import EASY, auroc, refusal, trained


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


def test_help_names_what_is_the_jobs_own(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        train.main(["--help"])
    assert ended.value.code == 0
    told = capsys.readouterr().out
    assert all(word in told for word in ("--resume RUN_ID", "--reproduce RUN_ID", "training.patience"))
