"""What a UDF asks of the Spark task that it runs in."""

from pyspark import TaskContext


def slot_cpus() -> int:
    """The processors of this task's slot, which its threads may use: more would fight the other slots. 1 outside Spark."""
    context = TaskContext.get()
    return int(context.cpus()) if context else 1
