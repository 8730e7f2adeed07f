"""predict: new patients from their slides to probabilities by the whole command, without a network: the memory of all its
processes (JVM, driver, workers), against a machine of 16 GB and 4 cores.

One patient with three slides of 46,177 x 77,440 px, none with a lower level, and the defaults: efficientnet_b0 by torch in
fp32, all tiles; StainNet besides, and a model of both bags. Weights are random, which costs no less. Four tasks run at once,
as on four cores, on the two that benchmarks have. `heap_full_gb` is the peak with a JVM whose heap has grown to the 8 GiB that
conf/spark/local.conf lets it have, which more tiles would make it do.
"""

import os
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import polars as pl
import torch
import yaml

from benchmarks import inputs
from benchmarks.machine import on_cores
from benchmarks.measure import Line
from benchmarks.offline import offline
from benchmarks.processes import CORES
from benchmarks.watched import watch
from jobs.runtime.settings.config import Config
from jobs.runtime.settings.identity import Identity
from jobs.training.model.files import ModelCard, save_model
from jobs.training.model.mil import ModelSpec, build_model

_LIMIT_GB, _TASKS = 16, 4
_HEAP = 8 * 2**30  # spark.driver.memory of conf/spark/local.conf
_SLIDES, _DIM = 3, 1280
_COLUMNS = ("embeddings", "embeddings_max")


def run() -> Iterator[Line]:
    """One line."""
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        os.environ["SLIDELAKE_CACHE"] = f"{folder}/cache"
        stack.callback(os.environ.pop, "SLIDELAKE_CACHE")
        stack.enter_context(on_cores(CORES))
        command = ["env", f"MASTER=local[{_TASKS}]", sys.executable, "-m", "jobs", "predict"]
        watched = watch(offline([*command, "--config", str(_settings(folder))]), folder)
        [patient] = pl.read_delta(f"{folder}/tables/predictions").to_dicts()
        [run] = pl.read_delta(f"{folder}/tables/runs").to_dicts()
    if patient["from_prior"] or patient["n_tiles"] != len(patient["attention"]):
        raise AssertionError(f"no prediction of {patient['n_tiles']} tiles")
    yield {
        "network": "none",
        "cores": CORES,
        "tasks": _TASKS,
        "slides": _SLIDES,
        "tiles": patient["n_tiles"],
        "seconds": watched.seconds,
        **{f"{stage}_seconds": taken for stage, taken in dict(run["timings"]).items()},
        "peak_gb": watched.peak / 1e9,
        **{f"{kind}_at_peak_gb": size / 1e9 for kind, size in watched.at_peak.items()},
        "jvm_gb": watched.jvm / 1e9,
        "driver_gb": watched.driver / 1e9,
        "workers_gb": watched.workers / 1e9,
        "largest_worker_gb": watched.largest_worker / 1e9,
        "heap_full_gb": (watched.peak - watched.at_peak["jvm"] + _HEAP) / 1e9,
        "of_limit": watched.peak / 1e9 / _LIMIT_GB,
    }


def _settings(folder: Path) -> Path:
    """Of a run in the folder, with a model that takes what it makes."""
    rows = [f"slide_{i},1,patient,{i},{inputs.huge()}" for i in range(_SLIDES)]
    (folder / "new.csv").write_text("\n".join(["image_id,center_id,patient_id,image_num,uri", *rows]))
    settings = {
        "patients": f"{folder}/new.csv",
        "output": {"root": f"{folder}/tables"},
        "stain": {"weights": str(inputs.stainnet())},
        "encoders": {"efficientnet_b0": {"weights": str(inputs.b0_weights())}},
        "predict": {"model": f"{folder}/model"},
    }
    config = folder / "predict.yaml"
    config.write_text(yaml.safe_dump(settings))
    torch.manual_seed(0)
    model = build_model(ModelSpec("attention", len(_COLUMNS) * _DIM, ("CE", "LAA")))
    [encoder] = settings["encoders"]
    recipe = Identity(Config.model_validate(settings)).recipe(encoder)
    card = ModelCard("model", model.spec, _COLUMNS, (0.5, 0.5), "", 0, encoder, (recipe,), {}, 0, {})
    save_model(f"{folder}/model", model, card)
    return config
