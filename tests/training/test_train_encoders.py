"""The job train on tables of several encoders: it learns from the bags of one, and names it in all that it writes."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from jobs import train
from tests.messages import plain
from tests.training.cohorts import Drawn, draw_cohort, runs_table, shuffled_labels, write_patients
from tests.training.train_runs import EASY, auroc, refusal, settings, trained

GOOD, NOISE = "uni2-h", "resnet18.a1_in1k"
RECIPE = {"encoder.model": "uni2-h", "encoder.precision": "bf16 by torch", "tiling.tile_px": "448"}
CONFIG: dict[str, Any] = {
    "encoders": {GOOD: {"weights": "s3://models/uni2-h.bin", "mean": None}, NOISE: {}},
    "inference": {"runtime": "torch", "precision": None, "batch_size": 8},
    "tiling": {"tile_px": 448, "mpp": 0.5, "max_tiles_per_patient": None, "seed": 3},
    "stain": {"weights": None},
    "histogram": {"bins": 16},
    "output": {"root": "elsewhere"},
}


@pytest.fixture
def tables(patients: list[Drawn], tmp_path: Path) -> Path:
    """Bags of two encoders: one tells the classes apart, one of another width does not. One patient lacks the latter."""
    signal = replace(EASY, dim=24, strength=0.0)
    noise = shuffled_labels(draw_cohort(len(patients), signal, seed=4))
    of_both = [replace(patient, encoder=GOOD) for patient in patients]
    of_both += [
        replace(drawn, encoder=NOISE, label=patient.label, center_id=patient.center_id)
        for drawn, patient in zip(noise[1:], patients[1:], strict=True)
    ]
    write_patients(tmp_path, sorted(of_both, key=lambda row: row.patient_id))
    return tmp_path


def test_either_encoder_of_one_root_is_learned_from_and_named(tables: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line = refusal(tables, capsys)
    assert f"has bags of 2 encoders, {NOISE}, {GOOD}: choose one by encoder (job train: training.encoder)" in line
    assert f"has no bags of encoder uni, but of {NOISE}, {GOOD}" in refusal(tables, capsys, encoder="uni")
    runs_table(tables, {"old": None, "drawn": {GOOD: RECIPE, NOISE: RECIPE | {"encoder.model": NOISE}}}, CONFIG)
    capsys.readouterr()
    folder, card = trained(tables, encoder=GOOD)
    said = capsys.readouterr()
    assert f"attention on encoder {GOOD}, epoch" in said.out and f"on encoder {GOOD} of version 1 of" in said.err
    assert (card.encoder, card.spec.dim, card.training["encoder"]) == (GOOD, EASY.dim, GOOD)
    assert card.feature_settings == (RECIPE,)
    assert card.settings == {
        "encoders": {GOOD: CONFIG["encoders"][GOOD]},
        "inference": {"precision": "bf16", "runtime": "torch"},
        "tiling": {"tile_px": 448, "mpp": 0.5, "max_tiles_per_patient": None},
        "stain": {"weights": None},
        "histogram": {"bins": 16},
    }
    assert auroc(folder) >= 0.9
    noise, other = trained(tables, encoder=NOISE, epochs=2)
    assert (other.encoder, other.spec.dim, other.splits["train"].n) == (NOISE, 24, card.splits["train"].n - 1)
    assert auroc(noise) < auroc(folder)
    # goes by the encoder of the run, whatever the settings say now
    _, again = trained(tables, "--reproduce", other.model_id, encoder=GOOD)
    assert (again.encoder, again.weights_hash) == (NOISE, other.weights_hash)
    assert "identical to run" in capsys.readouterr().out


def test_a_licence_that_forbids_it_stops_a_commercial_training(
    tables: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    licence = {"licence": "CC-BY-NC-ND-4.0", "licence.commercial": "false"}
    runs_table(tables, {"old": None, "drawn": {GOOD: RECIPE | licence, NOISE: RECIPE}})
    line = refusal(tables, capsys, "licence=commercial", encoder=GOOD)
    assert f"the licence of encoder {GOOD} (CC-BY-NC-ND-4.0) forbids commercial use" in line
    arguments = ["--config", settings(tables, encoder=NOISE, epochs=1), "licence=commercial"]
    assert train.main(arguments) == 0
    assert f"the licence of encoder {NOISE} is not known" in plain(capsys.readouterr().err)


def test_bags_of_two_precisions_are_not_trained_on(tables: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = draw_cohort(4, EASY, seed=8)
    late = [replace(row, patient_id=f"9{i}", encoder=GOOD, run_id="late") for i, row in enumerate(rows)]
    write_patients(tables, late, mode="append")
    runs_table(tables, {"old": None, "drawn": {GOOD: RECIPE}, "late": {GOOD: RECIPE | {"encoder.precision": "fp32"}}})
    line = refusal(tables, capsys, encoder=GOOD)
    assert f"the bags of encoder {GOOD} were made with several settings" in line
    assert "encoder.precision is bf16 by torch or fp32: run the main job again with one set of settings" in line
