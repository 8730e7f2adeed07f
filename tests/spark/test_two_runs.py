"""Two runs at once upon the same tables: the later one stops, and says why."""

from pathlib import Path

import pytest
from pyspark.sql import SparkSession

from jobs.runtime.tables.tables import ConcurrentRunError, Tables, spark_schema
from udfs.schemas import TILES


def test_a_second_writer_is_noticed_before_it_writes(spark: SparkSession, tmp_path: Path) -> None:
    first, second = Tables(spark, str(tmp_path)), Tables(spark, str(tmp_path))
    for tables in (first, second):
        tables.create("tiles")
    row = ("a", 0, 0, "1", 448, 0, 1.0, 0.0, "hash", "run")
    rows = spark.createDataFrame([row], spark_schema(TILES))
    first.put("tiles", rows, "image_id", ["a"], [])
    with pytest.raises(ConcurrentRunError, match="another run writes to"):
        second.put("tiles", rows, "image_id", ["a"], [])
    first.put("tiles", rows, "image_id", ["a"], ["a"])
    assert first.read("tiles").count() == 1
