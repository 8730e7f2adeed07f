"""What a task of the features stage may ask for, and what of it a cluster can give."""

import json
import os
import subprocess
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from pydantic import ValidationError
from pyspark.sql import SparkSession

from jobs.runtime.settings.config import ConfigError
from jobs.runtime.settings.sections import ResourcesSettings
from jobs.runtime.spark import resources
from jobs.runtime.spark.resources import Executor, features_resources, telling_who_is_awaited
from udfs.encode_tiles import device_of_this_task
from udfs.wsi.encoder import EncoderSpec

DISCOVER = Path(__file__).parents[2] / "conf/gpu/discover.sh"


@pytest.mark.parametrize(
    ("executor", "cpus", "gpus", "tasks"),
    [
        (Executor(8, 0), 1, 0, 8),
        (Executor(8, 0), 3, 0, 2),
        (Executor(8, 2), 1, 1, 2),
        (Executor(8, 1), 1, 0.5, 2),
        (Executor(8, 1), 1, 0.4, 2),
        (Executor(8, 2), 1, 0.6, 2),
        (Executor(8, 1), 1, 0.25, 4),
        (Executor(8, 2), 3, 0.25, 2),
        (Executor(8, 0), 1, 0.5, 0),
        (Executor(2, 1), 3, 1, 0),
    ],
)
def test_tasks_at_once_are_bound_by_cores_and_by_what_fits_on_a_gpu_whole(
    executor: Executor, cpus: int, gpus: float, tasks: int
) -> None:
    assert executor.tasks(cpus, gpus) == tasks


@pytest.mark.parametrize("asked", [{"gpus_per_task": 2}, {"gpus_per_task": -1}, {"cpus_per_task": 0}])
def test_what_no_scheduler_gives_is_refused(asked: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        ResourcesSettings.model_validate(asked)


class Cluster:
    """As much of a session as is asked before a profile is built."""

    def __init__(self, master: str, **conf: str) -> None:
        self.sparkContext, self.master, self.conf = self, master, conf
        self.defaultParallelism = 6

    def getConf(self) -> dict[str, str]:
        return self.conf


@pytest.fixture
def executors(monkeypatch: pytest.MonkeyPatch) -> list[Executor]:
    """Those of a cluster, for the test to fill."""
    found: list[Executor] = []
    monkeypatch.setattr(resources, "_executors_to_count_on", lambda *_: found)
    return found


@pytest.mark.parametrize(
    ("asked", "told"),
    [
        (
            {"cpus_per_task": 9},
            "resources.cpus_per_task is 9, but an executor has 8 cores: set it to 8 or less, or spark.ex",
        ),
        ({"gpus_per_task": 0.5, "cpus_per_task": 16}, "resources.cpus_per_task is 16, but an executor has 8 cores"),
    ],
)
def test_more_than_the_largest_executor_has_is_refused_with_numbers_and_remedy(
    executors: list[Executor], asked: dict[str, Any], told: str
) -> None:
    executors += [Executor(4, 2), Executor(8, 2)]
    cluster: Any = Cluster("spark://host:7077")
    with pytest.raises(ConfigError) as caught:
        features_resources(cluster, ResourcesSettings.model_validate(asked))
    assert str(caught.value).startswith(told)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("master", ["local", "local[2]", "local[*,4]"])
def test_on_one_machine_there_is_no_profile_and_one_line_says_so(master: str, caplog: pytest.LogCaptureFixture) -> None:
    cluster: Any = Cluster(master)
    stage = features_resources(cluster, ResourcesSettings(gpus_per_task=0.5, cpus_per_task=2))
    assert (stage.profile, stage.slots()) == (None, 6)
    assert caplog.text.count("resources: Spark runs on this machine alone") == 1


@pytest.mark.parametrize(("gpus", "share"), [(0, 1 / 6), (1, 1 / 6), (2, 1 / 3), (4, 1 / 2), (8, 1.0)])
def test_on_one_machine_tasks_take_turns_with_its_gpus(
    monkeypatch: pytest.MonkeyPatch, gpus: int, share: float
) -> None:
    monkeypatch.setattr("torch.cuda.device_count", lambda: gpus)
    monkeypatch.setattr("torch.cuda.is_available", lambda: gpus > 0)
    cluster: Any = Cluster("local[6]")
    assert features_resources(cluster, ResourcesSettings()).gpu_share == share
    spec = EncoderSpec("efficientnet_b0", None, 224)
    found = []
    for number in range(6):
        monkeypatch.setattr("udfs.encode_tiles.task_number", lambda number=number: number)
        found.append(str(device_of_this_task(spec)))
    if not gpus:
        assert set(found) == {"cpu"}
        return
    assert max(map(found.count, found)) <= 1 / share  # no more on one than it has room for


@pytest.mark.parametrize("master", ["local[2]", "spark://host:7077"])
@pytest.mark.parametrize("gpus", [None, 0])
def test_who_asks_for_nothing_is_told_nothing(
    master: str, gpus: float | None, caplog: pytest.LogCaptureFixture
) -> None:
    cluster: Any = Cluster(master)
    assert features_resources(cluster, ResourcesSettings(gpus_per_task=gpus)).profile is None
    assert caplog.text == ""


def test_executors_without_gpus_go_without_and_one_line_says_so(
    executors: list[Executor], caplog: pytest.LogCaptureFixture
) -> None:
    executors += [Executor(4, 0)]
    cluster: Any = Cluster("yarn")
    assert features_resources(cluster, ResourcesSettings(gpus_per_task=1)).profile is None
    assert caplog.text.count("resources: executors have no GPU") == 1


@pytest.mark.parametrize(("master", "lines"), [("spark://host:7077", 2), ("local[2]", 0)])
def test_who_waits_for_executors_is_told_what_one_takes_until_one_comes(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, master: str, lines: int
) -> None:
    come = iter([[], [], [Executor(4, 1)]])
    asked = threading.Event()
    tracker = SimpleNamespace(getActiveJobsIds=lambda: [1])

    def executors_of(session: SparkSession) -> list[Executor]:
        found = next(come)
        if found:
            asked.set()
        return found

    monkeypatch.setattr(resources, "_PATIENCE_S", 0.01)
    monkeypatch.setattr(resources, "executors_of", executors_of)
    conf = {"spark.executor.memory": "8g", "spark.executor.resource.gpu.amount": "1"}
    cluster: Any = Cluster(master, **conf)
    cluster.statusTracker = lambda: tracker
    with telling_who_is_awaited(cluster):
        assert not lines or asked.wait(10)
    said = caplog.messages
    assert len(said) == lines
    assert all(
        "of 8g of memory (spark.executor.memory), 1 GPUs (spark.executor.resource.gpu.amount);" in line for line in said
    )


@pytest.mark.parametrize(
    ("visible", "addresses"),
    [
        (None, ["0", "1", "2"]),
        ("2", ["2"]),
        ("1,0", ["1", "0"]),
        ("GPU-b, 2", ["GPU-b", "2"]),
        ("MIG-5a", ["MIG-5a"]),
        ("1,7,0", ["1"]),  # as CUDA reads it
        ("", []),
        ("-1", []),
        ("NoDevFiles", []),
    ],
)
def test_the_discovery_script_tells_the_gpus_that_may_be_seen(
    tmp_path: Path, visible: str | None, addresses: list[str]
) -> None:
    assert discovered(tmp_path, "printf '0, GPU-a\\n1, GPU-b\\n2, GPU-c\\n'", visible) == addresses


@pytest.mark.parametrize("nvidia_smi", [None, "echo 'NVIDIA-SMI has failed'; exit 9", "exit 0"])
def test_the_discovery_script_finds_none_where_there_is_no_gpu(tmp_path: Path, nvidia_smi: str | None) -> None:
    assert discovered(tmp_path, nvidia_smi, None) == []
    assert discovered(tmp_path, nvidia_smi, "0") == []


def discovered(folder: Path, nvidia_smi: str | None, visible: str | None) -> list[str]:
    """What it prints, beside a nvidia-smi that does this; None is a machine that has none."""
    tools = folder / "bin"
    tools.mkdir(exist_ok=True)
    for tool in ("sh", "tr", "cut", "grep", "sed", "paste"):
        if not (tools / tool).exists():
            (tools / tool).symlink_to(
                next(path for path in (Path("/bin", tool), Path("/usr/bin", tool)) if path.exists())
            )
    if nvidia_smi:
        (tools / "nvidia-smi").write_text(f"#!/bin/sh\n{nvidia_smi}\n")
        (tools / "nvidia-smi").chmod(0o755)
    environment = {"PATH": str(tools)} | ({} if visible is None else {"CUDA_VISIBLE_DEVICES": visible})
    assert os.access(DISCOVER, os.X_OK)  # Spark executes it
    said = subprocess.run([DISCOVER], env=environment, capture_output=True, text=True, check=True)
    found = json.loads(said.stdout)
    assert found["name"] == "gpu"
    addresses: list[str] = found["addresses"]
    return addresses
