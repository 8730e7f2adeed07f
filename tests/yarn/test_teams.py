"""Two teams' main jobs on YARN at once: none waits for the other, GPUs go to the features stage, tables are as ever."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import polars as pl
import pytest
from pyspark.sql import SparkSession

from jobs.runtime.settings.config import Config
from tests.conftest import SMALL_COHORT, config_in, preprocess_in, write_csv
from tests.events import at_once, by_profile, read_events
from tests.faults.commands import wait_until
from tests.faults.frames import assert_same_rows, frames
from tests.stores.process import ask
from tests.yarn.daemons import MEMORY_MB, Used, Yarn, history_server
from tests.yarn.teams import Team, event_logs

pytestmark = pytest.mark.yarn

_COPIES = 2  # of the small cohort, for the long job
_PATIENCE_S = 240


@dataclass(frozen=True)
class Work:
    """A team's job when it has ended."""

    config: Config
    team: Team
    app: dict[str, Any]  # as the ResourceManager tells it

    @property
    def queue(self) -> str:
        """The team's."""
        return str(self.app["queue"]).rpartition(".")[2]

    @property
    def log(self) -> Path:
        """Its event log."""
        [file] = event_logs(self.team.cluster).glob(f"{self.app['id']}*")
        return file


@dataclass(frozen=True)
class Works:
    """Both, and what their queues had while B's job was there."""

    a: Work
    b: Work
    used: list[tuple[Used, ...]]


def cohort(folder: Path, slides: Path, weights: Path, copies: int, waves: int) -> Config:
    """So many copies of the small cohort, in waves of so many slides and batches of one size everywhere."""
    folder.mkdir()
    run, inference = {"wave_slides": waves, "unit_tiles": 2}, {"batch_size": 2, "device": "auto"}
    tiling, resources = {"max_background": 1.0}, {"gpus_per_task": 0.5}
    config = config_in(folder, slides, weights, tiling=tiling, run=run, inference=inference, resources=resources)
    rows = [
        (f"{image}_{copy}", centre, f"{patient}_{copy}", number, label, slides / f"{image}.tif")
        for copy in range(copies)
        for image, centre, patient, number, label in SMALL_COHORT
    ]
    write_csv(Path(config.patients), rows, "image_id,center_id,patient_id,image_num,label,uri")
    return config


@pytest.fixture(scope="module")
def works(
    cluster: Yarn,
    team_of: Callable[..., Team],
    small_slides: Path,
    encoder_weights: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> Works:
    """Team A's long job, which takes more than its share while it is alone, and team B's short one, which comes then."""
    folder = tmp_path_factory.mktemp("tables")
    config_a = cohort(folder / "a", small_slides, encoder_weights, _COPIES, waves=1)
    config_b = cohort(folder / "b", small_slides, encoder_weights, 1, waves=5)
    a = team_of("team_a", {"spark.executor.instances": 2})
    b = team_of("team_b", {"spark.executor.instances": 1})
    with a.submitting("preprocess", config_a) as long:
        wait_until(lambda: cluster.used("team_a")[0].containers == 3, 120, "a driver and two executors run", every=0.2)
        with cluster.watching("team_a", "team_b") as seen:
            status, said = b.run("preprocess", config_b)
        assert status == 0, said
        assert long.wait(_PATIENCE_S) == 0, a.said
    app_a, app_b = cluster.apps()[-2:]
    return Works(Work(config_a, a, app_a), Work(config_b, b, app_b), seen)


def test_a_long_job_of_one_team_does_not_keep_the_others_from_starting(works: Works) -> None:
    columns = ("submitted", "driver", "first task", "last task", "ended")
    print(f"\n  {'queue':<7}", *(f"{name:<10}" for name in columns), "executors taken back")
    times = []
    for work in (works.a, works.b):
        tasks = [task for of_a_profile in by_profile(read_events(work.log))[1].values() for task in of_a_profile]
        first, last = min(task["began"] for task in tasks), max(task["ended"] for task in tasks)
        times.append([work.app["startedTime"], work.app["launchTime"], first, last, work.app["finishedTime"]])
        told = (f"{datetime.fromtimestamp(ms / 1000, UTC):%H:%M:%S}  " for ms in times[-1])
        print(f"  {work.queue:<7}", *told, work.app["numNonAMContainerPreempted"])
    (submitted_a, _, first_a, last_a, ended_a), (submitted_b, _, first_b, last_b, ended_b) = times
    assert (works.a.queue, works.b.queue) == ("team_a", "team_b")
    assert submitted_a < submitted_b and first_a < first_b < last_b < last_a, "B's tasks ran while A's did"
    assert ended_b < ended_a
    # A has the cluster, but for what B's driver takes at first; then B has its share, for which A lost an executor
    together = [(a, b) for a, b in works.used if b.containers == 2]
    assert max(a.mb for a, _ in works.used) > MEMORY_MB / 2 >= max(a.mb for a, _ in together)
    assert {(a.containers, a.gpus, b.gpus) for a, b in together} == {(2, 1, 1)}
    assert works.a.app["numNonAMContainerPreempted"] == 1 and works.b.app["numNonAMContainerPreempted"] == 0


def test_the_tables_are_those_of_a_local_run_though_an_executor_was_taken_away(
    works: Works, spark: SparkSession, small_slides: Path, encoder_weights: Path, tmp_path: Path
) -> None:
    [taken, *_] = [event for event in read_events(works.a.log) if event["Event"] == "SparkListenerExecutorRemoved"]
    assert "preempted" in taken["Removed Reason"]
    local = cohort(tmp_path / "local", small_slides, encoder_weights, _COPIES, waves=_COPIES * len(SMALL_COHORT))
    preprocess_in(spark, local)
    expected = frames(Path(local.output.root))
    assert expected["features"].height > 60
    for name, found in frames(Path(works.a.config.output.root)).items():
        assert_same_rows(found, expected[name])
    for name, found in frames(Path(works.b.config.output.root)).items():
        key = "patient_id" if name == "patients" else "image_id"
        assert_same_rows(found, expected[name].filter(pl.col(key).str.ends_with("_0")))


def test_gpus_go_to_the_features_stage_alone_and_the_history_server_has_the_jobs(works: Works) -> None:
    for work in (works.a, works.b):
        asked, tasks = by_profile(read_events(work.log))
        [ours] = asked.keys() - {0}
        assert "gpu" not in asked[0] and asked[ours]["gpu"]["Amount"] == 0.5
        assert len(tasks[0]) > len(tasks[ours]) > 0
    assert at_once(tasks[ours]) == 2, "on the one GPU of B's executor"
    ran = sum(event["Event"] == "SparkListenerJobStart" for event in read_events(works.b.log))
    team = works.b.team
    with history_server(event_logs(team.cluster), team.spark) as url:

        def told(path: str) -> Any:
            try:
                return json.loads(ask(f"{url}/applications{path}"))
            except OSError:  # not up yet, or it has not read all logs
                return []

        ids = {works.a.app["id"], works.b.app["id"]}
        wait_until(lambda: ids <= {app["id"] for app in told("")}, 60, "the history server has both", every=0.2)
        jobs = told(f"/{works.b.app['id']}/1/jobs")
    assert len(jobs) == ran > 0 and {job["status"] for job in jobs} == {"SUCCEEDED"}
