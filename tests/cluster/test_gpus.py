"""GPUs as Spark's own schedulers assign them to the features stage: a standalone cluster of real daemons, local-cluster."""

import json
from collections.abc import Mapping
from pathlib import Path

from tests.cluster.clusters import pretend_gpus, submit
from tests.events import Task, at_once

A_GPU_EACH = {"spark.executor.resource.gpu.amount": 1}
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
        if "refused" in found:
            continue
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


def everywhere(places: dict[Place, list[Task]]) -> int:
    return at_once(task for tasks in places.values() for task in tasks)


def test_tasks_share_the_gpu_of_each_of_two_nodes(two_nodes: str, tmp_path: Path) -> None:
    asked = [(None, None, 6), (0.5, None, 4), (0.6, None, 2), (1, 2, 2), (None, 3, 2), (1, 9, 0)]
    found = assigned(tmp_path, two_nodes, A_GPU_EACH, 2, *asked)
    refused = json.loads((tmp_path / "found.jsonl").read_text().splitlines()[-1])["refused"]
    assert "resources.cpus_per_task is 9, but an executor has 3 cores: set it to 3 or less" in refused
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
