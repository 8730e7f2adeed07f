"""The job train on a run that was killed, and on one that is done again: the same figures and weights, or a refusal."""

import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from deltalake import DeltaTable

from jobs import train
from jobs.training.model.files import TrainingState, load_card, save_checkpoint
from tests.newest import run_with_newest_pyarrow
from tests.training.cohorts import Drawn, draw_cohort, write_patients
from tests.training.train_runs import EASY, refusal, settings, trained

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
    save_checkpoint(str(tmp_path / "models" / first.model_id), TrainingState({"format": 1}, {}))
    assert "checkpoint of this version of slidelake (format 1" in refusal(tmp_path, capsys, "--resume", first.model_id)
    assert "no model.json" in refusal(tmp_path, capsys, "--reproduce", "no-such-run")
