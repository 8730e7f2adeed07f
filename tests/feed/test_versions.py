"""One version of a table, whatever happens to the table; versions that cannot be fed are refused with the remedy."""

import json
import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from deltalake import DeltaTable, write_deltalake
from pyspark.sql import SparkSession

from jobs.training.feed import Feed, make_feed
from jobs.training.refusals import FeedError
from jobs.training.table_versions import read_columns
from tests.feed.tables import Made, cohort, write
from udfs.schemas import PATIENTS

_WRITER = """
import sys
from pathlib import Path
from tests.feed.tables import cohort, write
table, stop = Path(sys.argv[1]), Path(sys.argv[2])
patients = cohort(60, dim=5)
for turn in range(10**6):
    write(table, patients[50:])
    write(table, patients[:20], mode="overwrite")
    if turn == 0:
        print("wrote", flush=True)
    if stop.exists():
        break
"""


def _fed(feed: Feed, epoch: int = 0) -> dict[str, Any]:
    return {
        name: bag.tolist()
        for bags in feed.epoch(epoch)
        for name, bag in zip(bags.patient_id, bags.split(), strict=True)
    }


@contextmanager
def _another_writes(table: Path, stop: Path) -> Iterator[None]:
    command = [sys.executable, "-c", _WRITER, str(table), str(stop)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parents[2]) as writer:
        assert writer.stdout and writer.stdout.readline() == "wrote\n"
        try:
            yield
        finally:
            stop.touch()
    assert writer.returncode == 0


def test_another_process_that_appends_and_overwrites_changes_nothing(
    tmp_path: Path, patients: list[Made], backend: Any
) -> None:
    table = write(tmp_path / "patients", patients, files=3)
    expected = {patient.patient_id: patient.bag().tolist() for patient in patients}
    opened_before = make_feed(str(table), threads=2, backend=backend)
    with _another_writes(table, tmp_path / "stop"):
        begun, epochs = DeltaTable(str(table)).version(), 0
        while epochs < 10 or DeltaTable(str(table)).version() < begun + 4:
            assert _fed(opened_before, epochs) == expected
            assert _fed(make_feed(str(table), version=2, backend=backend), epochs) == expected
            epochs += 1
    newest = make_feed(str(table), backend=backend)
    assert newest.version > opened_before.version == 2
    assert newest.n_patients == 20


def test_a_vacuumed_version_is_refused_and_the_newest_is_not(tmp_path: Path, backend: Any) -> None:
    table = write(tmp_path / "patients", cohort(8))
    before = make_feed(str(table), backend=backend)
    write(table, cohort(6), mode="overwrite")
    DeltaTable(str(table)).vacuum(0, dry_run=False, enforce_retention_duration=False)
    told = (
        r"version 0 of .*patients is not whole any more, .*parquet is gone: it was vacuumed; train on a newer version"
    )
    with pytest.raises(FeedError, match=told):
        make_feed(str(table), version=0, backend=backend)
    with pytest.raises(FeedError, match=told):
        list(before.epoch(0))
    assert len(_fed(make_feed(str(table), backend=backend))) == 6


def test_there_is_no_such_version_or_table(table: Path, tmp_path: Path) -> None:
    newest = DeltaTable(str(table)).version()
    for version in (99, -1):
        told = (
            f"{table} has no version {version}, it has versions 0 to {newest}: name one of them, or none for the newest"
        )
        with pytest.raises(FeedError, match=f"^{re.escape(told)}$"):
            make_feed(str(table), version=version)
    with pytest.raises(FeedError, match=f"no Delta table at {tmp_path}/none: run the patients job, or correct the URI"):
        make_feed(str(tmp_path / "none"))


def test_partitions_are_refused(tmp_path: Path) -> None:
    rows = pa.Table.from_pylist([patient.row() for patient in cohort(4)], PATIENTS)
    write_deltalake(str(tmp_path / "table"), rows, partition_by=["split"])
    with pytest.raises(
        FeedError, match="is partitioned by split, which its files do not hold: write it without partitions"
    ):
        make_feed(str(tmp_path / "table"))


def test_column_mapping_is_refused(tmp_path: Path) -> None:
    rows = pa.Table.from_pylist([patient.row() for patient in cohort(4)], PATIENTS).select(["patient_id", "embeddings"])
    write_deltalake(str(tmp_path / "table"), rows)
    commit = tmp_path / "table" / "_delta_log" / f"{0:020}.json"
    lines = [json.loads(line) for line in commit.read_text().splitlines()]
    for line in lines:
        if "metaData" in line:
            line["metaData"]["configuration"] = {
                "delta.columnMapping.mode": "name",
                "delta.columnMapping.maxColumnId": "2",
            }
            described = json.loads(line["metaData"]["schemaString"])
            for i, field in enumerate(described["fields"]):
                field["metadata"] = {"delta.columnMapping.id": i + 1, "delta.columnMapping.physicalName": field["name"]}
            line["metaData"]["schemaString"] = json.dumps(described)
        if "protocol" in line:
            line["protocol"] = {"minReaderVersion": 2, "minWriterVersion": 5}
    commit.write_text("\n".join(map(json.dumps, lines)))
    with pytest.raises(FeedError, match="has column mapping, its files name columns otherwise: write it anew without"):
        make_feed(str(tmp_path / "table"))


def test_a_patient_in_two_rows_is_refused(tmp_path: Path) -> None:
    table = write(tmp_path / "table", [*cohort(4), Made(2, 3)])
    with pytest.raises(FeedError, match="has several rows of patients p0002: a patient must be one row per encoder"):
        make_feed(str(table))


def test_bags_of_one_encoder_and_two_widths_are_refused(tmp_path: Path) -> None:
    table = write(tmp_path / "table", [Made(0, 3, dim=4), Made(1, 3, dim=5)])
    with pytest.raises(FeedError, match=r"has bags of \[4, 5\] columns of encoder made: run the main job again"):
        make_feed(str(table))


def test_a_bag_that_is_not_as_long_as_its_row_says_is_an_error(tmp_path: Path, backend: Any) -> None:
    row = Made(0, 3).row() | {"n_tiles": 4}
    write_deltalake(str(tmp_path / "table"), pa.Table.from_pylist([row], PATIENTS))
    with pytest.raises(FeedError, match="patient p0000: embeddings has 48 bytes, 4 tiles of 4 float32 are 64"):
        _fed(make_feed(str(tmp_path / "table"), backend=backend))


def test_a_table_without_splits_is_fed_whole_and_a_split_of_it_refused(tmp_path: Path, backend: Any) -> None:
    rows = pa.Table.from_pylist([patient.row() for patient in cohort(4)], PATIENTS).drop(["split"])
    write_deltalake(str(tmp_path / "table"), rows)
    assert len(_fed(make_feed(str(tmp_path / "table"), backend=backend))) == 4
    with pytest.raises(FeedError, match="has no patient of split train, its splits are none: run the splits job"):
        make_feed(str(tmp_path / "table"), split="train", backend=backend)


def test_deletion_vectors_are_refused_until_they_are_purged(spark: SparkSession, tmp_path: Path) -> None:
    """As Databricks may turn them on; the remedy is the one that the message names."""
    path, name = str(tmp_path / "patients"), f"delta.`{tmp_path / 'patients'}`"
    rows = spark.createDataFrame(pa.Table.from_pylist([patient.row() for patient in cohort(10)], PATIENTS))
    rows.coalesce(1).write.format("delta").option("delta.enableDeletionVectors", "true").save(path)
    assert len(_fed(make_feed(path))) == 10
    spark.sql(f"DELETE FROM {name} WHERE patient_id = 'p0003'")
    with pytest.raises(
        FeedError, match=r"has deletion vectors, .* run REORG TABLE delta\.`.*` APPLY \(PURGE\), then train on"
    ):
        make_feed(path)
    spark.sql(f"REORG TABLE {name} APPLY (PURGE)")
    assert set(_fed(make_feed(path))) == {patient.patient_id for patient in cohort(10)} - {"p0003"}
    assert len(_fed(make_feed(path, version=0))) == 10


def test_a_file_of_newer_types_is_refused_until_it_is_written_anew(tmp_path: Path, backend: Any) -> None:
    """As deltalake's own update writes it; the remedy is the one that the message names."""
    path = str(write(tmp_path / "patients", cohort(10)))
    table = DeltaTable(path)
    table.update(predicate="patient_id = 'p0003'", updates={"label": "'other'"})
    told = r"pyarrow [\d.]+ cannot read .*\.parquet \(.*\): where update, .* let Spark write the table anew, or deltalake, "
    with pytest.raises(FeedError, match=told) as refused:
        make_feed(path, backend=backend)
    with pytest.raises(FeedError, match=told):
        read_columns(path, ("patient_id", "label"))
    assert f'DeltaTable("{path}").optimize.z_order(["patient_id"])' in str(refused.value)
    table.optimize.z_order(["patient_id"])
    feed = make_feed(path, backend=backend)
    assert "other" in feed.classes
    assert _fed(feed) == {patient.patient_id: patient.bag().tolist() for patient in cohort(10)}


def test_large_strings_and_bytes_are_read_by_pyarrow(tmp_path: Path) -> None:
    """As writers of large Arrow tables leave them."""
    rows = pa.Table.from_pylist([patient.row() for patient in cohort(10)], PATIENTS)
    large = {pa.string(): pa.large_string(), pa.binary(): pa.large_binary()}
    path = str(tmp_path / "patients")
    write_deltalake(
        path, rows.cast(pa.schema([field.with_type(large.get(field.type, field.type)) for field in PATIENTS]))
    )
    feed = make_feed(path, columns=("embeddings", "tile_index"))
    assert feed.backend == "pyarrow"
    assert _fed(feed) == {patient.patient_id: patient.bag().tolist() for patient in cohort(10)}
    with pytest.raises(
        FeedError, match=r"petastorm knows no large strings, .*: let Spark write it anew, or take backend"
    ):
        make_feed(path, backend="petastorm")
