"""What the job train refuses before any work: tables, labels, splits, GPUs that are missing."""

import json
from pathlib import Path

import pyarrow as pa
import pytest
import torch
from deltalake import write_deltalake

from tests.training.cohorts import Drawn, write_patients
from tests.training.train_runs import refusal, trained
from udfs.schemas import SLIDES


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
