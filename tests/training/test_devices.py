"""Where a run trains, by what there is where its processes are, and which GPU each of them takes."""

from typing import Any

import pytest
import torch

from jobs.train import device_of_processes
from jobs.training.devices import DeviceError, gpu_to_take, take_device

_CLUSTER = "local-cluster[2,1,1024]"


class Session:
    """As much of a Spark session as is asked."""

    def __init__(self, master: str, **gpus_per_task: str) -> None:
        self.sparkContext, self.master = self, master
        self.conf = {f"spark.task.resource.{key}.amount": value for key, value in gpus_per_task.items()}


def device(monkeypatch: pytest.MonkeyPatch, wanted: str, n_gpus: int, processes: int, spark: Session | None) -> str:
    """What is taken where this machine has so many GPUs."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: n_gpus)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: n_gpus > 0)
    session: Any = spark
    return device_of_processes(wanted, processes, session)


@pytest.mark.parametrize("spark", [None, Session("local[2,4]"), Session("local", gpu="1")])
def test_on_this_machine_its_own_gpus_count_and_each_process_needs_one(
    monkeypatch: pytest.MonkeyPatch, spark: Session | None
) -> None:
    processes = 2 if spark else 1
    assert device(monkeypatch, "auto", processes, processes, spark) == "cuda"
    assert device(monkeypatch, "cuda", 4, processes, spark) == "cuda"
    assert device(monkeypatch, "auto", 0, processes, spark) == "cpu"
    assert device(monkeypatch, "cpu", 4, processes, spark) == "cpu"
    with pytest.raises(DeviceError, match=r"no GPU here: .* training\.device=auto or cpu"):
        device(monkeypatch, "cuda", 0, processes, spark)


@pytest.mark.parametrize("wanted", ["auto", "cuda"])
def test_more_processes_than_this_machine_has_gpus_are_refused_not_lowered(
    monkeypatch: pytest.MonkeyPatch, wanted: str
) -> None:
    with pytest.raises(DeviceError, match=r"each of 3 processes takes a GPU, and this machine has 2: .*processes=2 or"):
        device(monkeypatch, wanted, 2, 3, Session("local[*,4]"))


@pytest.mark.parametrize("on_driver", [0, 1])
def test_on_a_cluster_what_spark_gives_tasks_counts_and_not_what_the_driver_has(
    monkeypatch: pytest.MonkeyPatch, on_driver: int
) -> None:
    for wanted in ("auto", "cuda"):
        assert device(monkeypatch, wanted, on_driver, 8, Session(_CLUSTER, gpu="1")) == "cuda"
    for without in (Session("yarn"), Session("yarn", gpu="0")):
        assert device(monkeypatch, "auto", on_driver, 8, without) == "cpu"
        with pytest.raises(DeviceError, match=r"spark\.task\.resource\.gpu\.amount is (not set|0): set it to 1"):
            device(monkeypatch, "cuda", on_driver, 8, without)
    assert device(monkeypatch, "cpu", on_driver, 8, Session("yarn", gpu="0.25")) == "cpu"


@pytest.mark.parametrize("amount", ["0.5", "2"])  # TorchDistributor stops at the first and hangs at the second
@pytest.mark.parametrize("wanted", ["auto", "cuda"])
def test_a_part_of_a_gpu_or_several_a_task_are_refused(
    monkeypatch: pytest.MonkeyPatch, wanted: str, amount: str
) -> None:
    with pytest.raises(
        DeviceError, match=rf"gpu\.amount is {amount}: set it to 1 .*spark\.executor\.resource\.gpu\.am"
    ):
        device(monkeypatch, wanted, 1, 2, Session("spark://host:7077", gpu=amount))


@pytest.mark.parametrize(
    ("seen", "taken"),
    [
        ([["a"]], [0]),
        ([["a"], ["b"], ["c"]], [0, 0, 0]),  # one each, by Spark
        ([["a", "b", "c"]] * 3, [0, 1, 2]),  # of one machine
        ([["a", "b"], ["c", "d"], ["a", "b"], ["c", "d"]], [0, 0, 1, 1]),  # of two executors that see two each
        ([["a", "b"], ["b"]], [0, 0]),
    ],
)
def test_no_two_processes_take_one_gpu(seen: list[list[str]], taken: list[int]) -> None:
    found = [gpu_to_take(seen, rank) for rank in range(len(seen))]
    assert found == taken
    assert len({names[i] for names, i in zip(seen, found, strict=True)}) == len(seen)


@pytest.mark.parametrize("seen", [[["a"], ["a"]], [["a"], []], [["a", "b"]] * 3])
def test_a_process_that_sees_no_gpu_of_its_own_is_named(seen: list[list[str]]) -> None:
    with pytest.raises(DeviceError, match=rf"process {len(seen) - 1} of {len(seen)} sees {len(seen[-1])} GPUs"):
        gpu_to_take(seen, len(seen) - 1)


def test_who_is_to_take_a_gpu_where_none_is_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)  # on a machine that has some, too
    before = torch.are_deterministic_algorithms_enabled()
    try:
        with pytest.raises(DeviceError, match="process 0 of 1 sees 0 GPUs"):
            take_device("cuda")
    finally:
        torch.use_deterministic_algorithms(before)
    assert take_device("cpu") == torch.device("cpu")
