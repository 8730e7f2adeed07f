"""Checks of the machines that tasks run on: scratch space, memory, GPUs."""

import math
from collections import Counter

from jobs.checks.place import Place
from jobs.checks.table import Row
from udfs.wording import some

# What `make bench ONLY=memory,predict` measures, torch and a network of EfficientNet-B0's size.
WORKER_BYTES = 1.1e9  # a Python worker of the features stage at its most
_ADDRESSES_BYTES = (
    6e9  # that it maps, which is what spark.executor.pyspark.memory limits: importing torch takes 3.6 of them
)
_JVM_BESIDE_BYTES = 0.4e9  # of a JVM, beside its heap
_LITTLE_HEAP_BYTES = 2e9  # enough for a JVM, except for patients with tens of thousands of tiles
_SCRATCH_A_TASK_BYTES = 1e9  # rows of 8 slides of 5,000 tiles, as the features stage keeps and sorts them
_OVERHEAD_FACTOR, _LEAST_OVERHEAD_BYTES = "0.1", 384 << 20  # Spark's own
_MORE_HEAP = "set spark.driver.memory to 2g or more (spark-submit: --driver-memory), see README, Sizing"
_GPU = "spark.executor.resource.gpu"


def scratch_space(place: Place) -> Row:
    """Room for what Spark keeps between stages."""
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
    remedy = "set spark.local.dir (YARN: yarn.nodemanager.local-dirs; Kubernetes: a volume spark-local-dir-1) to a local disk"
    if unusable:
        return Row("FAIL", f"can't be written: {some(sorted(unusable))}", remedy)
    at_once = math.ceil(place.stage.slots() / place.n_executors)
    short = []
    for host, n in executors.items():
        has, needs = sum(free[host].values()), n * at_once * _SCRATCH_A_TASK_BYTES
        if has < needs:
            short.append(f"{_gb(has)} on {host} for {n * at_once} tasks, which may take {_gb(needs)}")
    if short:
        return Row("FAIL", some(short, 3, "; "), f"{remedy} with more room, or set run.wave_slides lower")
    return Row(
        "ok", f"{_gb(min(sum(disks.values()) for disks in free.values()))} free or more in {some(sorted(folders), 1)}"
    )


def memory(place: Place) -> Row:
    """Memory for the Python worker of every task, beside the JVM."""
    hosts = Counter(one.host for one in place.probes)
    machine = {one.host: one.memory_bytes for one in place.probes}
    tasks = math.ceil(place.stage.slots() / place.n_executors)
    limit = None if place.is_local else place.mib("spark.executor.pyspark.memory")
    if limit is not None:
        limit //= int(place.conf("spark.executor.cores", "1"))  # as Spark shares it out
        if limit < _ADDRESSES_BYTES:
            return Row(
                "FAIL",
                f"spark.executor.pyspark.memory gives a worker {_gb(limit)}; importing torch maps {_gb(_ADDRESSES_BYTES)}",
                "leave it unset, and let spark.executor.memoryOverhead have the memory of the workers",
            )
    heap, rooms = place.heap_bytes, []
    for host, n in hosts.items():
        room = machine[host] / n
        if place.spark.sparkContext.master == "yarn":  # which ends a container that takes more
            room = min(room, heap + _overhead(place, heap) + (place.mib("spark.executor.pyspark.memory") or 0))
        rooms.append(room)
    return judge_memory(min(rooms), heap, tasks, is_local=place.is_local)


def judge_memory(room: float, heap: float, tasks: int, *, is_local: bool = False) -> Row:
    """Whether the workers of so many tasks at once, and the JVM with its heap, have room in so many bytes; and if the JVM is the
    driver's, whether its heap is large enough. For executors, check clock looks at the heap.
    """
    need = tasks * WORKER_BYTES + _JVM_BESIDE_BYTES
    each = max(0.0, room - heap - _JVM_BESIDE_BYTES) / tasks
    figures = (
        f"{_gb(room)} an executor, {_gb(heap)} of it heap: {_gb(each)} for each of {tasks} at once; a worker takes "
    )
    figures += _gb(WORKER_BYTES)
    fits = max(1, int((room - heap - _JVM_BESIDE_BYTES) // WORKER_BYTES))
    remedy = (
        f"give executors {_gb(heap + need)} (YARN, Kubernetes: spark.executor.memoryOverhead={need / 2**30:.0f}g), "
        f"or {fits} {'task' if fits == 1 else 'tasks'} at once (spark.executor.cores, resources.cpus_per_task), or a smaller heap"
    )
    if room >= heap + need and is_local and heap < _LITTLE_HEAP_BYTES:
        return Row(
            "warn", f"{figures}; a driver that does all needs a heap of {_gb(_LITTLE_HEAP_BYTES)} at least", _MORE_HEAP
        )
    if room >= heap + need:
        return Row("ok", figures)
    if room >= min(heap, _LITTLE_HEAP_BYTES) + need:
        return Row("warn", f"{figures}: enough unless the heap fills up", remedy)
    return Row("FAIL", figures, remedy)


def scheduled_gpus(place: Place) -> Row:
    """GPUs that are asked for, scheduled and visible."""
    requested = place.config.resources.gpus_per_task or (1.0 if place.config.encoder.device == "cuda" else 0.0)
    visible = min((one.gpus for one in place.probes), default=0)
    scheduled = min((executor.gpus for executor in place.executors), default=0)
    later = place.conf(f"{_GPU}.amount") == "0" and place.conf("spark.dynamicAllocation.enabled") == "true"
    if requested and later:
        return Row("ok", "executors with GPUs are started for the features stage, see encoder for what it finds there")
    return judge_gpus(requested, None if place.is_local else scheduled, visible)


def judge_gpus(requested: float, scheduled: int | None, visible: int) -> Row:
    """What is wrong with so many GPUs a task asked for, and an executor's scheduled (None: local mode) and visible ones."""
    figures = f"{visible} visible" if scheduled is None else f"an executor has {scheduled} by Spark, {visible} visible"
    amount = f"spark.executor.resource.gpu.amount={visible or 1}"
    if requested and not visible:
        return Row(
            "FAIL",
            f"{figures}; {requested:g} a task asked for",
            "take nodes with GPUs, and check that nvidia-smi runs where executors do; or set resources.gpus_per_task to null and "
            "encoder.device to auto",
        )
    if requested and scheduled == 0:
        return Row(
            "FAIL",
            f"{figures}; {requested:g} a task asked for",
            f"tell Spark of them: --conf {amount}, see README, On GPUs",
        )
    if scheduled is not None and scheduled > visible:
        return Row(
            "FAIL",
            figures,
            "mend the discovery script, or the driver and isolation of the node: nvidia-smi does not see them",
        )
    if visible and scheduled == 0:
        return Row(
            "warn",
            f"{figures}: left idle by Spark",
            f"--conf {amount} and resources.gpus_per_task, see README, On GPUs",
        )
    if scheduled and not requested:
        return Row("warn", f"{figures}, and no task asks for one", "set resources.gpus_per_task to 1, or to a share")
    return Row("ok", figures if visible or requested else "none, and none asked for: the encoder runs on processors")


def _overhead(place: Place, heap: int) -> int:
    """What an executor's container may have beside its heap; YARN rounds the sum up, by a step that only its scheduler knows."""
    factor = float(place.conf("spark.executor.memoryOverheadFactor", _OVERHEAD_FACTOR))
    return place.mib("spark.executor.memoryOverhead") or max(_LEAST_OVERHEAD_BYTES, int(factor * heap))


def _gb(n_bytes: float) -> str:
    return f"{n_bytes / 1e9:.1f} GB"
