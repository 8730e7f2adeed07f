"""The main job on a standalone cluster, sent there by `slidelake submit` from a laptop with the checkout, to nodes without."""

import shlex
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from itertools import groupby
from pathlib import Path
from typing import Any

import polars as pl
import psutil
import pytest
import yaml
from numpy.typing import NDArray
from pyspark.sql import SparkSession

from jobs import submit
from jobs.runtime.settings.config import Config
from tests.cluster.clusters import standalone, submit_words
from tests.conftest import SMALL_COHORT, config_in, preprocess_in, write_csv
from tests.environments import CODE, ROOT, make_dist
from tests.events import descriptions, event_log_conf, read_events
from tests.faults.frames import assert_same_rows, frames
from tests.slides.make import write_mosaic
from udfs.failures import DEATHS_BEFORE_QUARANTINE

KILLS = DEATHS_BEFORE_QUARANTINE  # so that the slide would be given up, had they been its own doing
# Executors of a core each: two from the start, and one that the features stage asks for, where the GPU is.
CONF: dict[str, object] = {
    "spark.dynamicAllocation.enabled": "true",
    "spark.dynamicAllocation.shuffleTracking.enabled": "true",
    "spark.dynamicAllocation.initialExecutors": 2,
    "spark.dynamicAllocation.maxExecutors": 2,
    "spark.executor.resource.gpu.amount": 0,
    "spark.executor.cores": 1,
    "spark.executor.memory": "450m",
}


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A checkout like this one, but for conf/places, which a test fills in."""
    checkout = tmp_path / "checkout"
    (checkout / "conf/places").mkdir(parents=True)
    for part in ("pyproject.toml", "jobs", "udfs", "dist", "conf/spark", "conf/gpu", "conf/locks"):
        (checkout / part).symlink_to(ROOT / part)
    monkeypatch.setattr(submit, "ROOT", checkout)
    yield checkout / "conf/places/standalone.yaml"


def settings(folder: Path, slides: Path, weights: Path, wide: Path) -> Config:
    """The small cohort and a wide slide, in units of which the features stage takes one after the other on its one GPU."""
    folder.mkdir()
    config = config_in(
        folder,
        slides,
        weights,
        tiling={"max_background": 0.8},
        run={"unit_tiles": 30},
        inference={"batch_size": 2, "device": "auto"},
        resources={"gpus_per_task": 1},
    )
    rows = [(*row, slides / f"{row[0]}.tif") for row in SMALL_COHORT]
    header = "image_id,center_id,patient_id,image_num,label,uri"
    write_csv(Path(config.patients), [*rows, ("wide", "south", "005", 0, "CE", wide)], header)
    return config


@contextmanager
def killing_executors_that_encode(slide: Path) -> Iterator[list[int]]:
    """While the block runs, kill -9 an executor with a GPU as soon as a worker of it has the slide open, twice: process ids.

    The task goes with it, and is the first to run on the one that comes in its place.
    """
    killed: list[int] = []
    ended = threading.Event()

    def hunt() -> None:
        while len(killed) < KILLS and not ended.wait(0.05):
            for executor in executors_with_gpus():
                with suppress(psutil.Error):
                    killed.extend(executor.pid for worker in executor.children(True) if kill_both(worker, executor))

    def kill_both(worker: psutil.Process, executor: psutil.Process) -> bool:
        if not has_open(worker, slide):
            return False
        worker.suspend()  # so that it is in the middle of the slide when its executor is killed, not just after it
        if not has_open(worker, slide):
            worker.resume()
            return False
        executor.kill()
        worker.kill()
        return True

    hunter = threading.Thread(target=hunt, daemon=True)
    hunter.start()
    try:
        yield killed
    finally:
        ended.set()
        hunter.join()


def has_open(process: psutil.Process, path: Path) -> bool:
    return any(file.path == str(path) for file in process.open_files())


def executors_with_gpus() -> list[psutil.Process]:
    """Executors of this test run that were started for a stage with resources of its own."""
    found = []
    for process in psutil.Process().children(recursive=True):
        with suppress(psutil.Error):
            words = process.cmdline()
            if any(word.endswith("CoarseGrainedExecutorBackend") for word in words):
                found += [process] if words[words.index("--resourceProfileId") + 1] != "0" else []
    return found


def test_nodes_without_the_checkout_of_which_one_has_a_gpu_and_dies_at_work_give_the_tables_of_a_local_run(
    place: Path,
    node_python: Path,
    spark: SparkSession,
    pixels: NDArray[Any],
    small_slides: Path,
    encoder_weights: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    wide, nodes, log = tmp_path / "wide.tif", tmp_path / "nodes", tmp_path / "events"
    write_mosaic(wide, pixels[1408:2944, 768:2048], width=3584, height=3584)
    nodes.mkdir()
    log.mkdir()
    make_dist()
    config = settings(tmp_path / "cluster", small_slides, encoder_weights, wide)
    (tmp_path / "my.yaml").write_text(yaml.safe_dump(config.model_dump(mode="json")))
    with standalone(nodes, cores=2, gpus=(1, 0)) as master, killing_executors_that_encode(wide) as killed:
        described = yaml.safe_load((ROOT / "conf/places/standalone.yaml").read_text())
        described["yours"] = {"master": master, "node_python": str(node_python)}
        place.write_text(yaml.safe_dump(described))
        capsys.readouterr()
        dry_run = ("--on", "standalone", "--dry-run", "preprocess", "--config", str(tmp_path / "my.yaml"))
        assert submit.main(dry_run) == 0
        client, *words = shlex.split(capsys.readouterr().out)
        assert client == "spark-submit"
        packages = words.index("--packages")  # the nodes' Spark is that of .venv, which has Delta
        del words[packages : packages + 2]
        said = submit_words(nodes, words, CONF | event_log_conf(log))
    assert said.returncode == 0, said.stderr
    assert len(killed) == KILLS, "not so many executors were met while they encoded"
    assert "executors ended while they worked on wide: these slides are tried again" in said.stderr

    local = settings(tmp_path / "local", small_slides, encoder_weights, wide)
    preprocess_in(spark, local)
    expected = frames(Path(local.output.root))
    assert expected["features"].height > 60
    for name, found in frames(Path(config.output.root)).items():
        assert_same_rows(found, expected[name])

    # {number: 0 or 1, the node}; each was sent the code
    node_of = {
        int(code.parent.name): int(code.parts[-4].removeprefix("work")) for code in nodes.glob(f"work*/*/*/{CODE.name}")
    }
    events = read_events(log)
    added = {
        int(event["Executor ID"]): event["Executor Info"]["Resource Profile Id"]
        for event in events
        if event["Event"] == "SparkListenerExecutorAdded"
    }
    plain = {node_of[number] for number, profile in added.items() if profile == 0}
    with_gpu = [node_of[number] for number, profile in added.items() if profile != 0]
    assert plain == {0, 1} and with_gpu == [0] * (1 + KILLS), "others in place of those that were killed"
    lost = [
        added[int(event["Task Info"]["Executor ID"])]
        for event in events
        if event["Event"] == "SparkListenerTaskEnd" and event["Task End Reason"]["Reason"] == "ExecutorLostFailure"
    ]
    assert len(lost) == KILLS and 0 not in lost, "a task of the features stage went with each"

    encodes = [step for step, _ in groupby(descriptions(events)) if step.startswith("wave 1/1: features, encode ")]
    assert len(encodes) == 2, "all slides, then the one that was taken up again"
    [work] = pl.read_delta(f"{config.output.root}/runs")["work"]
    assert work["features"]["bytes_read"] > 0
