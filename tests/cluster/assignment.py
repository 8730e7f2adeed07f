"""Submitted to a cluster: who runs which task with which GPU, under the profile that jobs/features.py takes.

    spark-submit assignment.py FOLDER EXECUTORS '[[GPUS_PER_TASK, CPUS_PER_TASK, AT_ONCE], ...]'

For each of these it runs twice AT_ONCE tasks, of which each waits until AT_ONCE have begun, and adds a line to
FOLDER/found.jsonl: {"slots": ..., "tasks": [{"executor", "pid", "address", "cpus", "began", "ended"}, ...]}. Where AT_ONCE is 0,
the profile is to be refused: {"refused": ...}.
"""

import json
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
from pyspark import TaskContext
from pyspark.sql import SparkSession

from jobs.runtime.settings.config import ConfigError
from jobs.runtime.settings.sections import ResourcesSettings
from jobs.runtime.spark.resources import features_resources
from jobs.runtime.spark.session import start_session
from udfs.spark_task import gpu_address, slot_cpus

_SCHEMA = pa.schema(
    [
        ("executor", pa.string()),
        ("pid", pa.int64()),
        ("address", pa.string()),
        ("cpus", pa.int32()),
        ("began", pa.float64()),  # seconds of the machine's clock
        ("ended", pa.float64()),
    ]
)
_COLUMNS = "executor string, pid bigint, address string, cpus int, began double, ended double"
_PATIENCE_S = 60.0
_OVERLAP_S = 0.5  # within it, one task too many at once would begin


def meeting(folder: Path, at_once: int) -> Callable[[Iterable[pa.RecordBatch]], Iterator[pa.RecordBatch]]:
    """The mapInArrow function of tasks that meet."""

    def run(batches: Iterable[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        list(batches)
        began = time.monotonic()
        context = TaskContext.get()
        assert context is not None
        (folder / str(context.taskAttemptId())).touch()
        while len(list(folder.iterdir())) < at_once and time.monotonic() < began + _PATIENCE_S:
            time.sleep(0.02)
        time.sleep(_OVERLAP_S)
        executor = "/".join(Path.cwd().parts[-3:])  # where Spark starts it: WORK/APPLICATION/NUMBER
        row = (executor, os.getpid(), gpu_address(), slot_cpus(), began, time.monotonic())
        yield pa.RecordBatch.from_pylist([dict(zip(_SCHEMA.names, row, strict=True))], _SCHEMA)

    return run


def ran(spark: SparkSession, resources: ResourcesSettings, begun: Path, at_once: int) -> dict[str, Any]:
    """How tasks of such resources ran, or why none did."""
    try:
        stage = features_resources(spark, resources)
    except ConfigError as error:
        assert not at_once, error
        return {"refused": str(error)}
    begun.mkdir()
    rows = spark.range(0, 2 * at_once, numPartitions=2 * at_once)
    tasks = rows.mapInArrow(meeting(begun, at_once), _COLUMNS, profile=stage.profile).collect()
    return {"slots": stage.slots(), "tasks": [task.asDict() for task in tasks]}


def main(folder: Path, executors: int, asked: list[tuple[float | None, int | None, int]]) -> None:
    """See above."""
    spark = start_session("assignment")
    context: Any = spark.sparkContext
    while context._jsc.sc().statusStore().executorList(True).size() < executors + 1:  # the driver is one of them
        time.sleep(0.1)
    for number, (gpus, cpus, at_once) in enumerate(asked):
        resources = ResourcesSettings(gpus_per_task=gpus, cpus_per_task=cpus)
        with (folder / "found.jsonl").open("a") as found:
            print(json.dumps(ran(spark, resources, folder / f"begun{number}", at_once)), file=found)
    spark.stop()


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), json.loads(sys.argv[3]))
