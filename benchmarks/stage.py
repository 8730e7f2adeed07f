"""The features pass by Spark on this machine, as the job runs it from planned units to kept rows."""

from collections.abc import Sequence
from typing import Any

import pyarrow as pa
from pyspark import StorageLevel
from pyspark.sql import DataFrame, SparkSession

from benchmarks.work import Unit, n_tiles
from jobs.runtime.spark.session import slots, start_session
from jobs.runtime.tables.tables import spark_schema
from udfs.encode_tiles import FeatureSpec, encode_tiles
from udfs.plan_units import pack_tasks
from udfs.schemas import ENCODED, UNITS

_prepared: list[tuple[SparkSession, DataFrame, FeatureSpec, int]] = []  # of this process


def prepare(spec: FeatureSpec, units: Sequence[Unit]) -> None:
    """Start a session in this process, and give it the units: those of a task in a partition, as the job does."""
    spark = start_session("slidelake benchmark")
    tasks = pack_tasks([(unit["image_id"], unit["unit"], unit["cost"]) for unit in units], slots(spark))
    rows = pa.Table.from_pylist(list(units), UNITS).append_column("task", pa.array(tasks, pa.int32()))
    parts = spark.createDataFrame(rows).repartitionByRange(len(set(tasks)), "task")
    planned = parts.sortWithinPartitions("task", "unit").drop("task").persist(StorageLevel.DISK_ONLY)
    planned.count()
    _prepared[:] = [(spark, planned, spec, n_tiles(units))]


def encode() -> int:
    """All units; how many tiles were encoded."""
    [(spark, planned, spec, tiles)] = _prepared
    done = spark.sparkContext.accumulator(0)
    function: Any = encode_tiles(spec, "benchmark", done.add, tiles_ahead=tiles)
    encoded = planned.mapInArrow(function, spark_schema(ENCODED)).persist(StorageLevel.DISK_ONLY)
    ends = encoded.where("x_px IS NULL").select("n_tiles", "error_message").collect()
    encoded.unpersist(blocking=True)
    if sum(end.n_tiles for end in ends) != tiles:
        raise AssertionError(next((end.error_message for end in ends if end.error_message), "tiles are missing"))
    return tiles
