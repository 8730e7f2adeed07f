"""What a UDF asks of the Spark task that it runs in."""

import gc

from pyspark import TaskContext


def slot_cpus() -> int:
    """The processors of this task's slot, which its threads may use: more would fight the other slots. 1 outside Spark."""
    context = TaskContext.get()
    return int(context.cpus()) if context else 1


def task_number() -> int:
    """Of the tasks of this stage, which start in the order of their numbers. 0 outside Spark."""
    context = TaskContext.get()
    return context.partitionId() if context else 0


def gpu_address() -> str | None:
    """The address of the GPU that Spark gave this task; None where it schedules no GPUs, and outside Spark.

    A worker process serves one task after the other, and the next one may get another GPU.
    """
    context = TaskContext.get()
    gpus = context.resources().get("gpu") if context else None
    return str(gpus.addresses[0]) if gpus else None


def keep_what_is_loaded() -> None:
    """Take what is in memory now for what will stay. Of no effect outside Spark.

    PySpark collects garbage after every task, and would look at half a million objects of libraries and models each time, for
    a fifth of a second.
    """
    if TaskContext.get():
        gc.collect()
        gc.freeze()
