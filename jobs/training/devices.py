"""Where a run trains, processor or GPUs, and which GPU each of its processes takes. Without Spark, which the job asks."""

import os
from collections.abc import Sequence
from typing import Literal

import torch
import torch.distributed as dist

Device = Literal["cpu", "cuda"]


class DeviceError(Exception):
    """The wanted GPUs are missing; the message says what exists, and the remedy."""


def device_here(wanted: str, processes: int, n_gpus: int) -> Device:
    """Returns the device of processes on one machine with `n_gpus` GPUs. `wanted`: auto, cpu or cuda.

    Raises DeviceError if a GPU is wanted and there is none, or if there are fewer GPUs than processes.
    """
    if wanted == "cpu" or (wanted == "auto" and not n_gpus):
        return "cpu"
    if not n_gpus:
        raise DeviceError("no GPU here: run it where one is, or begin a run with training.device=auto or cpu")
    if processes > n_gpus:
        raise DeviceError(
            f"each of {processes} processes takes a GPU, and this machine has {n_gpus}: begin a run with training.processes="
            f"{n_gpus} or less, or training.device=cpu"
        )
    return "cuda"


def device_on_executors(wanted: str, gpus_per_task: str | None) -> Device:
    """Returns the device of processes that are tasks of a cluster, whatever the driver has. `wanted`: auto, cpu or cuda.

    `gpus_per_task` is the value of spark.task.resource.gpu.amount, None if it is not set. Raises DeviceError if GPUs are wanted,
    and Spark does not give each task exactly one.
    """
    if wanted == "cpu" or (wanted == "auto" and gpus_per_task in (None, "0")):
        return "cpu"
    if gpus_per_task != "1":  # TorchDistributor takes no fraction, and starts too few tasks if each has several
        raise DeviceError(
            f"each process takes one GPU of an executor, and spark.task.resource.gpu.amount is {gpus_per_task or 'not set'}: set "
            "it to 1 for this job, and spark.executor.resource.gpu.amount to the GPUs of an executor, or begin a run with "
            "training.device=cpu"
        )
    return "cuda"


def take_device(device: str) -> torch.device:
    """Returns the device of this process; a GPU is one that no other process of its group has. Raises DeviceError if none is."""
    if device == "cpu":
        return torch.device("cpu")
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # before CUDA starts, for the line below
    torch.use_deterministic_algorithms(True)
    here = [str(torch.cuda.get_device_properties(i).uuid) for i in range(torch.cuda.device_count())]
    rank, seen = 0, [here]
    if dist.is_initialized():
        rank, seen = dist.get_rank(), [[]] * dist.get_world_size()
        dist.all_gather_object(seen, here)
    taken = torch.device("cuda", gpu_to_take(seen, rank))
    torch.cuda.set_device(taken)
    return taken


def gpu_to_take(seen: Sequence[Sequence[str]], rank: int) -> int:
    """Returns the index, among the GPUs that a process sees, of its own one: the first that no process before it takes.

    `seen` has the globally unique names of the GPUs that each process sees, by rank. Processes may see one GPU each, as Spark
    assigns them, or all of a machine's, or those that CUDA_VISIBLE_DEVICES of an executor names. Raises DeviceError if none is
    free.
    """
    taken: set[str] = set()
    for number, names in enumerate(seen):
        free = [i for i, name in enumerate(names) if name not in taken]
        if not free:
            raise DeviceError(
                f"process {number} of {len(seen)} sees {len(names)} GPUs and others have them: start fewer processes, or let "
                "Spark see all the GPUs of its executors (CUDA_VISIBLE_DEVICES, spark.executor.resource.gpu.amount)"
            )
        if number == rank:
            return free[0]
        taken.add(names[free[0]])
    raise ValueError(f"rank {rank} of {len(seen)} processes")
