"""Checks of the machines that tasks run on: scratch space, memory, GPUs."""

import math
from collections import Counter

from jobs.checks.place import Place
from jobs.checks.table import Row
from udfs.wording import some

# What `make bench ONLY=memory,predict` measures, with torch and a network of EfficientNet-B0's size.
WORKER_BYTES = 1.1e9  # a Python worker of the features stage, at most
_MAPPED_BYTES = 6e9  # by such a worker; spark.executor.pyspark.memory limits it. The import of torch maps 3.6e9
_JVM_BESIDE_BYTES = 0.4e9  # of a JVM, beside its heap
_LITTLE_HEAP_BYTES = 2e9  # enough for a JVM, except for patients with tens of thousands of tiles
_SCRATCH_BYTES = 1e9  # per task: rows of 8 slides of 5,000 tiles, as the features stage keeps and sorts them
_OVERHEAD_FACTOR, _LEAST_OVERHEAD_BYTES = "0.1", 384 << 20  # Spark's own
_MORE_HEAP = "set spark.driver.memory to 2g or more (spark-submit: --driver-memory), see README, Sizing"
_MORE_SCRATCH = (
    "set spark.local.dir (YARN: yarn.nodemanager.local-dirs; Kubernetes: a volume spark-local-dir-1) to a local disk"
)
_GPU = "spark.executor.resource.gpu"


def scratch_space(place: Place) -> Row:
    """Says whether there is room for what Spark keeps between stages."""
    executors = Counter(one.host for one in place.probes)
    free: dict[str, dict[int, int]] = {host: {} for host in executors}  # by device: several folders may share one
    folders, unusable = set(), set()
    for one in place.probes:
        for folder, disk in one.scratch.items():
            folders.add(folder)
            if disk:
                free[one.host][disk[0]] = disk[1]
            else:
                unusable.add(f"{folder} on {one.host}")
    if unusable:
        return Row("FAIL", f"cannot be written: {some(sorted(unusable))}", _MORE_SCRATCH)
    at_once = math.ceil(place.stage.slots() / place.n_executors)
    short = []
    for host, n in executors.items():
        room, need = sum(free[host].values()), n * at_once * _SCRATCH_BYTES
        if room < need:
            short.append(f"{_gb(room)} on {host} for {n * at_once} tasks, which may take {_gb(need)}")
    if short:
        return Row("FAIL", some(short, 3, "; "), f"{_MORE_SCRATCH} with more room, or set run.wave_slides lower")
    least = min(sum(disks.values()) for disks in free.values())
    return Row("ok", f"{_gb(least)} free or more in {some(sorted(folders), 1)}")


def memory(place: Place) -> Row:
    """Says whether there is memory for the Python worker of every task, beside the JVM."""
    tasks, limit = math.ceil(place.stage.slots() / place.n_executors), place.mib("spark.executor.pyspark.memory")
    if limit is not None and not place.is_local:
        worker = limit // int(place.conf("spark.executor.cores", "1"))  # as Spark divides it
        if worker < _MAPPED_BYTES:
            return Row(
                "FAIL",
                f"spark.executor.pyspark.memory gives a worker {_gb(worker)}; a worker with torch maps {_gb(_MAPPED_BYTES)}",
                "leave it unset, and let spark.executor.memoryOverhead have the memory of the workers",
            )
    heap, executors = place.heap_bytes, Counter(one.host for one in place.probes)
    room = min(one.memory_bytes / executors[one.host] for one in place.probes)
    if place.spark.sparkContext.master == "yarn":  # which ends a container that takes more
        room = min(room, heap + _overhead(place, heap) + (limit or 0))
    return judge_memory(room, heap, tasks, is_local=place.is_local)


def judge_memory(room: float, heap: float, tasks: int, *, is_local: bool = False) -> Row:
    """Says whether the workers of so many tasks at once, and the JVM with its heap, have room in so many bytes.

    In local mode, the heap is the driver's and must be large enough too. For executors, check clock looks at the heap.
    """
    need, left = tasks * WORKER_BYTES + _JVM_BESIDE_BYTES, room - heap - _JVM_BESIDE_BYTES
    figures = (
        f"{_gb(room)} an executor, {_gb(heap)} of it heap: {_gb(max(0.0, left) / tasks)} for each of {tasks} at once; a worker "
        f"takes {_gb(WORKER_BYTES)}"
    )
    fits = max(1, int(left // WORKER_BYTES))
    remedy = (
        f"give executors {_gb(heap + need)} (YARN, Kubernetes: spark.executor.memoryOverhead={need / 2**30:.0f}g), "
        f"or {fits} {'task' if fits == 1 else 'tasks'} at once (spark.executor.cores, resources.cpus_per_task), or a smaller heap"
    )
    if room >= heap + need:
        if is_local and heap < _LITTLE_HEAP_BYTES:
            figures += f"; a driver that runs all tasks needs a heap of {_gb(_LITTLE_HEAP_BYTES)} at least"
            return Row("warn", figures, _MORE_HEAP)
        return Row("ok", figures)
    if room >= min(heap, _LITTLE_HEAP_BYTES) + need:
        return Row("warn", f"{figures}: enough unless the heap fills up", remedy)
    return Row("FAIL", figures, remedy)


def scheduled_gpus(place: Place) -> Row:
    """Says whether the GPUs that are requested are scheduled and visible."""
    requested = place.config.resources.gpus_per_task or (1.0 if place.config.inference.device == "cuda" else 0.0)
    visible = min((one.gpus for one in place.probes), default=0)
    scheduled = min((executor.gpus for executor in place.executors), default=0)
    later = place.conf(f"{_GPU}.amount") == "0" and place.conf("spark.dynamicAllocation.enabled") == "true"
    if requested and later:
        return Row("ok", "executors with GPUs are started for the features stage: check encoder says what it finds")
    return judge_gpus(requested, None if place.is_local else scheduled, visible)


def judge_gpus(requested: float, scheduled: int | None, visible: int) -> Row:
    """Says what is wrong with the GPUs requested per task, and an executor's scheduled (None: local mode) and visible ones."""
    figures = f"{visible} visible" if scheduled is None else f"an executor has {scheduled} by Spark, {visible} visible"
    amount = f"--conf {_GPU}.amount={visible or 1}"
    wanted = f"{figures}; {requested:g} per task requested"
    if requested and not visible:
        remedy = (
            "take nodes with GPUs, and check that nvidia-smi runs where executors do; or set resources.gpus_per_task to null and "
            "inference.device to auto"
        )
        return Row("FAIL", wanted, remedy)
    if requested and scheduled == 0:
        return Row("FAIL", wanted, f"declare them to Spark: {amount}, see README, On GPUs")
    if scheduled is not None and scheduled > visible:
        remedy = (
            "correct the discovery script, or the driver and isolation of the node: nvidia-smi does not see the GPUs"
        )
        return Row("FAIL", figures, remedy)
    if visible and scheduled == 0:
        return Row(
            "warn", f"{figures}: left idle by Spark", f"{amount} and resources.gpus_per_task, see README, On GPUs"
        )
    if scheduled and not requested:
        return Row("warn", f"{figures}, and no task requests one", "set resources.gpus_per_task to 1, or to a share")
    return Row("ok", figures if visible or requested else "none, and none requested: the encoder runs on processors")


def _overhead(place: Place, heap: int) -> int:
    """Returns what a container may have beside its heap; YARN rounds the sum up, by a step that only its scheduler knows."""
    factor = float(place.conf("spark.executor.memoryOverheadFactor", _OVERHEAD_FACTOR))
    return place.mib("spark.executor.memoryOverhead") or max(_LEAST_OVERHEAD_BYTES, int(factor * heap))


def _gb(n_bytes: float) -> str:
    return f"{n_bytes / 1e9:.1f} GB"
