"""What a pass needs to know of the Spark task that it runs in."""

import gc

from pyspark import TaskContext


def slot_cpus() -> int:
    """Returns the processors of this task's slot, which its threads may use without harm to other slots. 1 outside Spark."""
    context = TaskContext.get()
    return int(context.cpus()) if context else 1


def task_number() -> int:
    """Returns this task's number in its stage, whose tasks start in order. 0 outside Spark."""
    context = TaskContext.get()
    return context.partitionId() if context else 0


def gpu_address() -> str | None:
    """Returns the address of the GPU that Spark gave this task; None if Spark schedules no GPUs, and outside Spark.

    A worker process serves one task after the other, and the next one may get another GPU.
    """
    context = TaskContext.get()
    gpus = context.resources().get("gpu") if context else None
    return str(gpus.addresses[0]) if gpus else None


def keep_what_is_loaded() -> None:
    """Exempts all that is in memory now from garbage collection. Does nothing outside Spark.

    PySpark collects garbage after every task: half a million objects of libraries and models take a fifth of a second.
    """
    if TaskContext.get():
        gc.collect()
        gc.freeze()
