"""Training by several processes: on executors, on this machine, with GPUs that only a script knows of."""

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import yaml

from tests.cluster.clusters import pretend_gpus, submit
from tests.training.cohorts import Signal, draw_cohort, write_patients

_SIGNAL = Signal(dim=16, strength=6.0, offset=0.4, bag=(10, 40))


@pytest.mark.parametrize("master", ["local-cluster[2,1,1024]", "local[2]"])
def test_two_processes_train_one_model_on_every_patient_once_an_epoch(master: str, tmp_path: Path) -> None:
    patients = draw_cohort(105, _SIGNAL)  # 63 to train on: one process has a patient more than the other
    write_patients(tmp_path, patients)
    training = {
        "processes": 2,
        "batch_size": 4,
        "hidden": 32,
        "attention_hidden": 16,
        "learning_rate": 3e-3,
        "epochs": 8,
        "dropout": 0.1,
    }
    file = tmp_path / "settings.yaml"
    file.write_text(yaml.safe_dump({"patients": "none.csv", "output": {"root": str(tmp_path)}, "training": training}))
    done = submit(tmp_path, master, {"spark.executor.memory": "1g"}, "jobs/train.py", "--config", str(file))
    assert done.returncode == 0, done.stderr
    [folder] = (tmp_path / "models").iterdir()
    card = json.loads((folder / "model.json").read_text())
    assert (card["processes"], card["device"]) == (2, "cpu")
    # each epoch ends in an error unless the patients that all processes saw are those of the split, each once
    assert [epoch["train_patients"] for epoch in card["history"]] == [63] * 8
    assert np.isfinite([epoch["train_loss"] for epoch in card["history"]]).all()
    predictions = pd.read_csv(folder / "predictions.csv", dtype={"patient_id": str})
    assert sorted(predictions["patient_id"]) == [p.patient_id for p in patients if p.split != "train"]
    figure = json.loads((folder / "report.json").read_text())["test"]["metrics"]["auroc"]
    assert figure["value"] >= 0.95
    assert "test: 21 patients" in done.stdout


def test_processes_on_executors_get_a_gpu_each_where_spark_gives_tasks_one(tmp_path: Path) -> None:
    worker = "spark.worker.resource.gpu"
    conf: dict[str, object] = {f"{worker}.amount": 2, f"{worker}.discoveryScript": pretend_gpus(tmp_path, 2)}
    conf |= {"spark.executor.resource.gpu.amount": 2, "spark.task.resource.gpu.amount": 1}
    file = tmp_path / "found.json"
    done = submit(tmp_path, "local-cluster[1,2,1024]", conf, "tests/cluster/training_gpus.py", str(file), "2")
    assert done.returncode == 0, done.stderr
    found = json.loads(file.read_text())
    assert (found["device"], sorted(found["visible"])) == ("cuda", ["0", "1"])
