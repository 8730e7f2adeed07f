"""How tables lie in files: few files a wave, row groups that training can read in small steps."""

import json
import os
from collections.abc import Iterable, Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from deltalake import DeltaTable
from pyspark.sql import SparkSession

from jobs.runtime.tables.tables import Tables, spark_schema
from tests.conftest import preprocess_in
from tests.spark.conftest import Again, Finished
from udfs import schemas

BAG_BYTES = 2 << 20


def files_added(table: Path) -> list[int]:
    """By each commit that wrote rows."""
    commits = [path.read_text().splitlines() for path in sorted((table / "_delta_log").glob("*.json"))]
    added = [sum("add" in json.loads(line) for line in commit) for commit in commits]
    return [number for number in added if number]


@pytest.mark.parametrize("name", ["slides", "tiles", "indexes", "features", "patients"])
def test_a_wave_writes_one_file_where_one_holds_it(finished: Finished, name: str) -> None:
    assert files_added(Path(finished.config.output.root) / name) == [1, 1]  # two waves


def test_no_statistics_are_kept_of_bags(finished: Finished) -> None:
    for uri in DeltaTable(f"{finished.config.output.root}/patients").file_uris():
        group = pq.ParquetFile(uri).metadata.row_group(0)
        kept = {column.path_in_schema: column.is_stats_set for column in map(group.column, range(group.num_columns))}
        assert kept["patient_id"] and not kept["embeddings"] and not kept["embeddings_max"]


@pytest.mark.parametrize("name", ["tiles", "features"])
def test_a_row_a_tile_pays_for_no_statistics_but_those_that_find_it(finished: Finished, name: str) -> None:
    log = (Path(finished.config.output.root) / name / "_delta_log").glob("*.json")
    actions = [json.loads(line) for commit in log for line in commit.read_text().splitlines()]
    kept = [json.loads(action["add"]["stats"]) for action in actions if "add" in action]
    assert len(kept) == 2  # waves
    for statistics in kept:
        assert statistics["numRecords"] > 0
        assert set(statistics["minValues"]) == set(statistics["maxValues"]) == {"image_id", "patient_id"}


@pytest.fixture
def settings_of_somebody_else(spark: SparkSession) -> Iterator[None]:
    """What users' own Spark may have: many shuffle partitions, large row groups."""
    ours = {
        "spark.sql.shuffle.partitions": "7",
        "spark.sql.adaptive.coalescePartitions.enabled": "false",
        "parquet.block.size": str(1 << 30),
    }
    before = {key: spark.conf.get(key, None) for key in ours}
    for key, value in ours.items():
        spark.conf.set(key, value)
    yield
    for key, old in before.items():
        if old is None:
            spark.conf.unset(key)
        else:
            spark.conf.set(key, old)


@pytest.mark.usefixtures("settings_of_somebody_else")
@pytest.mark.parametrize(("bytes_a_file", "fewest", "most"), [(1 << 28, 1, 1), (1, 2, 7)])
def test_patients_are_as_many_files_as_their_bags_fill(
    spark: SparkSession,
    again: Again,
    monkeypatch: pytest.MonkeyPatch,
    bytes_a_file: int,
    fewest: int,
    most: int,
) -> None:
    monkeypatch.setattr("jobs.patients.BYTES_A_FILE", bytes_a_file)
    config = again(output={"embedding_dtype": "float16"})
    preprocess_in(spark, config)
    assert fewest <= files_added(Path(config.output.root) / "patients")[-1] <= most


@pytest.mark.usefixtures("settings_of_somebody_else")
def test_row_groups_of_patients_are_small_whatever_the_settings_of_spark_are(
    spark: SparkSession, tmp_path: Path
) -> None:
    schema = schemas.TABLES["patients"].schema

    def bags(batches: Iterable[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        for batch in batches:
            for number in batch["id"].to_pylist():
                row = dict.fromkeys(schema.names) | {"patient_id": str(number), "encoder": "e"}
                row |= {name: os.urandom(BAG_BYTES) for name in ("embeddings", "embeddings_max")}
                yield pa.RecordBatch.from_pylist([row], schema)

    tables = Tables(spark, str(tmp_path))
    tables.create("patients")
    for first in (0, 20):
        rows = spark.range(first, first + 20, numPartitions=1).mapInArrow(bags, spark_schema(schema))
        tables.append("patients", rows)
    assert row_groups(tmp_path / "patients", files=2) == 40
    tables.compact("patients")
    assert row_groups(tmp_path / "patients", files=1) == 40


def row_groups(table: Path, files: int) -> int:
    """Check that full ones are of several rows and at most 32 MiB; returns the number of rows."""
    uris = DeltaTable(table).file_uris()
    assert len(uris) == files
    footers = [pq.ParquetFile(uri).metadata for uri in uris]
    groups = [footer.row_group(i) for footer in footers for i in range(footer.num_row_groups)]
    assert all(group.total_byte_size <= 32 << 20 for group in groups)
    assert max(group.num_rows for group in groups) >= 4
    return sum(group.num_rows for group in groups)
