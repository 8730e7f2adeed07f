"""GPUs as Spark's own schedulers assign them to the features stage: a standalone cluster of real daemons, local-cluster."""

import json
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import polars as pl
import pytest
import yaml
from pyspark.sql import SparkSession

from jobs.runtime.config import Config
from tests.cluster.clusters import pretend_gpus, submit
from tests.conftest import SMALL_COHORT, config_in, preprocess_in
from tests.environments import CODE, make_dist, pack
from tests.events import event_log_conf, read_events
from tests.faults.frames import assert_same_rows, frames

A_GPU_EACH = {"spark.executor.resource.gpu.amount": 1}
Task = dict[str, Any]
Place = tuple[str, str | None]  # an executor, and the address of a GPU there


def assigned(
    folder: Path, master: str, conf: Mapping[str, object], executors: int, *asked: tuple[float | None, int | None, int]
) -> list[tuple[int, dict[Place, list[Task]]]]:
    """How tasks of (gpus_per_task, cpus_per_task, how many are to meet) ran: slots, and tasks by place; see assignment.py."""
    said = submit(folder, master, conf, "tests/cluster/assignment.py", str(folder), str(executors), json.dumps(asked))
    (folder / "said.txt").write_text(said.stdout + said.stderr)
    assert said.returncode == 0, said.stderr
    result = []
    for (gpus, cpus, _), line in zip(asked, (folder / "found.jsonl").read_text().splitlines(), strict=True):
        found = json.loads(line)
        places: dict[Place, list[Task]] = {}
        for task in found["tasks"]:
            assert task["cpus"] == (cpus or 1)
            places.setdefault((task["executor"], task["address"]), []).append(task)
        print(f"\ngpus_per_task={gpus} cpus_per_task={cpus}: {at_once(found['tasks'])} at once")
        for (executor, address), tasks in sorted(places.items(), key=str):
            workers = len({task["pid"] for task in tasks})
            print(
                f"  executor {executor} GPU {address}: {len(tasks)} tasks in {workers} workers, {at_once(tasks)} at once"
            )
        result.append((found["slots"], places))
    return result


def at_once(tasks: Iterable[Task]) -> int:
    """The most tasks that ran at one time."""
    times: list[tuple[float, float]] = [(task["began"], task["ended"]) for task in tasks]
    return max(sum(begins <= began < ends for begins, ends in times) for began, _ in times)


def everywhere(places: dict[Place, list[Task]]) -> int:
    return at_once(task for tasks in places.values() for task in tasks)


def test_tasks_share_the_gpu_of_each_of_two_nodes(two_nodes: str, tmp_path: Path) -> None:
    asked = [(None, None, 6), (0.5, None, 4), (0.6, None, 2), (1, 2, 2), (None, 3, 2)]
    found = assigned(tmp_path, two_nodes, A_GPU_EACH, 2, *asked)
    assert [slots for slots, _ in found] == [everywhere(places) for _, places in found] == [6, 4, 2, 2, 2]
    plain, half, most, whole, threads = (places for _, places in found)
    assert {address for _, address in [*plain, *threads]} == {None}
    for places, on_a_gpu in ((half, 2), (most, 1), (whole, 1)):
        assert len(places) == 2 and {address for _, address in places} == {"0"}
        assert [at_once(tasks) for tasks in places.values()] == [on_a_gpu, on_a_gpu]


def test_tasks_spread_over_the_two_gpus_of_a_node(tmp_path: Path) -> None:
    worker = "spark.worker.resource.gpu"
    conf = {f"{worker}.amount": 2, f"{worker}.discoveryScript": pretend_gpus(tmp_path, 2)}
    conf["spark.executor.resource.gpu.amount"] = 2
    asked = [(None, None, 4), (1, None, 2), (0.5, None, 4), (0.5, 2, 2)]
    found = assigned(tmp_path, "local-cluster[1,4,1024]", conf, 1, *asked)
    assert [slots for slots, _ in found] == [everywhere(places) for _, places in found] == [4, 2, 4, 2]
    plain, one, half, threads = (places for _, places in found)
    assert {address for _, address in plain} == {None}
    for places, on_a_gpu in ((one, 1), (half, 2), (threads, None)):
        assert {address for _, address in places} >= ({"0", "1"} if on_a_gpu else {"0"})
        assert all(at_once(tasks) == on_a_gpu for tasks in places.values() if on_a_gpu)


def test_with_dynamic_allocation_the_stage_gets_executors_with_gpus_beside_those_without(
    two_nodes: str, tmp_path: Path
) -> None:
    dynamic = "spark.dynamicAllocation"
    conf = {f"{dynamic}.enabled": "true", f"{dynamic}.shuffleTracking.enabled": "true", f"{dynamic}.maxExecutors": 2}
    conf |= {"spark.executor.resource.gpu.amount": 0, "spark.executor.cores": 1, "spark.executor.memory": "450m"}
    (_, plain), (_, whole) = assigned(tmp_path, two_nodes, conf, 0, (None, None, 2), (1, None, 2))
    assert {address for _, address in plain} == {None}
    assert {address for _, address in whole} == {"0"} and len(whole) == 2
    assert everywhere(whole) == 2
    assert not {executor for executor, _ in plain} & {executor for executor, _ in whole}


@pytest.fixture
def command(small_slides: Path, encoder_weights: Path, tmp_path: Path) -> Callable[..., tuple[Config, Any]]:
    """Submit the main job on the small cohort, tables in a folder of the test's own."""

    def run(master: str, conf: Mapping[str, object], resources: dict[str, Any]) -> tuple[Config, Any]:
        folder = tmp_path / "cluster"
        folder.mkdir()
        config = cohort_config(folder, small_slides, encoder_weights, resources)
        settings = folder / "config.yaml"
        settings.write_text(yaml.safe_dump(config.model_dump(mode="json")))
        return config, submit(folder, master, conf, "jobs/preprocess.py", "--config", str(settings))

    return run


def cohort_config(folder: Path, slides: Path, weights: Path, resources: dict[str, Any]) -> Config:
    """Two slides, a wave each, in many units and in batches of one size everywhere."""
    rows = [row for row in SMALL_COHORT if row[0] in ("a1", "b1")]
    run, encoder = {"wave_slides": 1, "unit_tiles": 2}, {"batch_size": 2, "device": "auto"}
    tiling = {"max_background": 1.0}
    return config_in(folder, slides, weights, rows, tiling=tiling, run=run, encoder=encoder, resources=resources)


def test_the_main_job_with_code_and_packages_shipped_on_shared_gpus_gives_the_tables_of_a_local_run(
    two_nodes: str,
    node_python: Path,
    command: Callable[..., tuple[Config, Any]],
    spark: SparkSession,
    small_slides: Path,
    encoder_weights: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    resources = {"gpus_per_task": 0.5}
    log = tmp_path / "events"
    log.mkdir()
    conf = A_GPU_EACH | event_log_conf(log)
    make_dist()
    archive = pack(node_python.parents[1], tmp_path / "environment.tar.gz")
    conf |= {"spark.submit.pyFiles": str(CODE), "spark.archives": f"{archive}#environment"}
    conf |= {"spark.pyspark.python": "./environment/bin/python", "spark.pyspark.driver.python": sys.executable}
    config, said = command(two_nodes, conf, resources)
    assert said.returncode == 0, said.stderr
    assert "resources:" not in said.stderr

    here = tmp_path / "here"
    here.mkdir()
    local = cohort_config(here, small_slides, encoder_weights, resources)
    capsys.readouterr()
    preprocess_in(spark, local)
    assert capsys.readouterr().err.count("resources: Spark runs on this machine alone") == 1
    expected = frames(Path(local.output.root))
    for name, found in frames(Path(config.output.root)).items():
        assert_same_rows(found, expected[name])

    ran = read_events(log)
    profiles = {
        event["Resource Profile Id"]: event["Task Resource Requests"]
        for event in ran
        if event["Event"] == "SparkListenerResourceProfileAdded"
    }
    [ours] = profiles.keys() - {0}  # one for all waves
    assert profiles[ours]["gpu"]["Amount"] == 0.5
    stages = {
        event["Stage Info"]["Stage ID"]: event["Stage Info"]["Resource Profile Id"]
        for event in ran
        if event["Event"] == "SparkListenerStageSubmitted"
    }
    tasks: dict[int, list[Task]] = {}
    for event in ran:
        if event["Event"] == "SparkListenerTaskEnd":
            info, metrics = event["Task Info"], event["Task Metrics"]
            # "Finish Time" is when the driver has the result, and by then the next task may run.
            ended = info["Launch Time"] + metrics["Executor Deserialize Time"] + metrics["Executor Run Time"]
            task = {"executor": info["Executor ID"], "began": info["Launch Time"], "ended": ended}
            tasks.setdefault(stages[event["Stage ID"]], []).append(task)
    print(f"\n{len(tasks[0])} tasks without GPU; with: {Counter(task['executor'] for task in tasks[ours])}")
    assert {task["executor"] for task in tasks[ours]} == {"0", "1"}
    assert at_once(tasks[ours]) == 4


def test_more_than_an_executor_has_is_refused_before_anything_is_read(
    two_nodes: str, command: Callable[..., tuple[Config, Any]]
) -> None:
    config, said = command(two_nodes, A_GPU_EACH, {"gpus_per_task": 1, "cpus_per_task": 9})
    assert said.returncode == 2
    [line] = [line for line in said.stderr.splitlines() if line.startswith("slidelake preprocess: ")]
    assert "resources.cpus_per_task is 9, but an executor has 3 cores: set it to 3 or less" in line
    assert "Traceback" not in said.stderr
    assert pl.read_delta(f"{config.output.root}/slides").is_empty()


def test_without_gpus_the_stage_runs_on_processors_and_says_so(two_nodes: str, tmp_path: Path) -> None:
    [(slots, places)] = assigned(tmp_path, two_nodes, {}, 2, (1, None, 6))
    assert slots == everywhere(places) == 6
    assert (tmp_path / "said.txt").read_text().count("resources: executors have no GPU") == 1
