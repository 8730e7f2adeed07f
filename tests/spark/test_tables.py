"""The tables as others read them: deltalake, polars, DuckDB and Spark SQL; comments, protocol, no secrets."""

import json
from pathlib import Path
from typing import Any

import deltalake
import duckdb
import polars as pl
import pyarrow as pa
import pytest
import yaml
from pyspark.sql import SparkSession
from pyspark.sql.types import StructType

from jobs import preprocess
from jobs.runtime.tables import tables as tables_module
from jobs.runtime.tables.layout import Log, open_log
from jobs.runtime.tables.tables import Tables, spark_schema
from tests.spark.conftest import SECRET, TABLES, Again, Finished, in_shared_session
from udfs import schemas

KEYS = {
    "slides": ["image_id"],
    "tiles": ["image_id", "x_px", "y_px"],
    "indexes": ["image_id"],
    "features": ["image_id", "x_px", "y_px"],
    "patients": ["patient_id"],
    "runs": ["run_id"],
}


def path_of(finished: Finished, name: str) -> str:
    return f"{finished.config.output.root}/{name}"


def comparable(rows: list[dict[str, Any]], name: str) -> list[dict[str, Any]]:
    """Rows by key, maps as dicts and bytes as bytes, which the readers give in several shapes."""

    def plain(value: Any) -> Any:
        if isinstance(value, bytearray | memoryview):
            return bytes(value)
        if isinstance(value, list | tuple):
            items = [plain(item) for item in value]
            if items and all(isinstance(item, dict) and set(item) == {"key", "value"} for item in items):
                return {item["key"]: item["value"] for item in items}
            if items and all(isinstance(item, list) and len(item) == 2 for item in items):
                return dict(items)
            return items
        return {key: plain(item) for key, item in value.items()} if isinstance(value, dict) else value

    cleaned = [{key: plain(value) for key, value in row.items() if key[-3:] != "_at"} for row in rows]
    return sorted(cleaned, key=lambda row: [row[key] for key in KEYS[name]])


@pytest.mark.parametrize("name", TABLES)
def test_four_readers_see_the_same_rows(spark: SparkSession, finished: Finished, name: str) -> None:
    path = path_of(finished, name)
    table = deltalake.DeltaTable(path)
    with_polars = comparable(pl.read_delta(path).to_dicts(), name)
    assert with_polars
    assert list(with_polars[0]) == [column for column in schemas.TABLES[name].schema.names if column[-3:] != "_at"]
    # DuckDB's own reader of Delta is an extension that it downloads; its Parquet reader over the live files is not.
    with duckdb.connect() as connection:
        relation = connection.sql("SELECT * FROM read_parquet($files)", params={"files": table.file_uris()})
        with_duckdb = pl.DataFrame(relation.to_arrow_table()).to_dicts()
    assert comparable(with_duckdb, name) == with_polars
    by_deltalake = deltalake.QueryBuilder().register("t", table).execute("SELECT * FROM t")
    assert comparable(pl.DataFrame(by_deltalake).to_dicts(), name) == with_polars
    by_spark = spark.sql(f"SELECT * FROM delta.`{path}`").collect()
    assert comparable([row.asDict(recursive=True) for row in by_spark], name) == with_polars


@pytest.mark.parametrize("name", TABLES)
def test_every_column_says_what_it_holds(spark: SparkSession, finished: Finished, name: str) -> None:
    comments = {row.col_name: row.comment for row in spark.sql(f"DESCRIBE delta.`{path_of(finished, name)}`").collect()}
    assert list(comments) == schemas.TABLES[name].schema.names
    assert all(comment and len(comment) > 5 for comment in comments.values())
    for column, comment in comments.items():
        if column.endswith("_px") and column != "tile_px":
            assert "level-0 pixels" in comment, column
        if column.startswith("mpp"):
            assert "micrometres" in comment, column


@pytest.mark.parametrize("name", TABLES)
def test_old_readers_can_read_the_table(finished: Finished, name: str) -> None:
    table = deltalake.DeltaTable(path_of(finished, name))
    protocol, properties = table.protocol(), table.metadata().configuration
    assert (protocol.min_reader_version, protocol.min_writer_version) == (1, 2)
    assert not protocol.reader_features and not protocol.writer_features
    assert properties["delta.enableDeletionVectors"] == "false"
    assert properties["delta.columnMapping.mode"] == "none"
    assert table.metadata().partition_columns == []


@pytest.mark.parametrize("name", [name for name in KEYS if name != "runs"])
def test_keys_are_not_null(finished: Finished, name: str) -> None:
    nullable = {
        column.name: column.nullable for column in deltalake.DeltaTable(path_of(finished, name)).schema().fields
    }
    assert not any(nullable[key] for key in KEYS[name])


def test_the_run_is_on_record(finished: Finished) -> None:
    [row] = comparable(pl.read_delta(path_of(finished, "runs")).to_dicts(), "runs")
    assert (row["run_id"], row["job"], row["status"]) == (finished.run.record.run_id, "preprocess", "done")
    settings = json.loads(row["config"])
    assert settings["tiling"]["max_background"] == 0.5
    assert settings["slides"]["storage_options"] == {"account_key": "***"}
    assert row["counts"]["slides_processed"] == 10 and row["counts"]["waves"] == 2
    assert set(row["tables_written"]) >= {"slides", "tiles", "features", "patients"}
    assert {"plan", "slides", "features", "patients"} <= set(row["timings"])
    assert row["versions"]["pyspark"] and row["versions"]["slidelake"]
    sizes = {path.stem: path.stat().st_size for path in finished.slides.iterdir()}
    reads = {(read["image_id"], read["stage"]): read for read in row["reads"]}
    assert set(reads) == {(image_id, stage) for image_id in sizes for stage in ("slides", "features")}
    assert len(reads) == len(row["reads"])
    for (image_id, _), read in reads.items():
        assert read["size_bytes"] == sizes[image_id]
        assert 0 < read["bytes_read"] < 2 * read["size_bytes"] and read["requests"] > 0 and read["seconds_waited"] >= 0
    for stage, work in row["work"].items():
        of_stage = [read for (_, read_in), read in reads.items() if read_in == stage]
        for name in ("requests", "bytes_read", "seconds_waited"):
            assert work[name] == pytest.approx(sum(read[name] for read in of_stage))


def test_secrets_are_in_no_file_and_no_row(finished: Finished) -> None:
    assert finished.config.slides.storage_options["account_key"] == SECRET
    files = [path for path in Path(finished.config.output.root).rglob("*") if path.is_file()]
    assert len(files) > 20
    assert [path for path in files if SECRET.encode() in path.read_bytes()] == []
    for name in TABLES:  # Parquet compresses, so the files alone do not tell
        assert SECRET not in str(pl.read_delta(path_of(finished, name)).to_dicts())


def test_a_table_is_one_entry(spark: SparkSession, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fields = [
        pa.field(name, pa.string(), metadata={"comment": f"{name} of the note"}) for name in ("patient_id", "run_id")
    ]
    notes = schemas.Table(
        "notes", pa.schema(fields), "One row per note", {"delta.dataSkippingStatsColumns": "patient_id"}
    )
    monkeypatch.setitem(schemas.TABLES, "notes", notes)
    tables = Tables(spark, str(tmp_path))
    assert not tables.exists("notes") and tables.read("notes").columns == notes.schema.names
    tables.create("notes")
    tables.append("notes", spark.createDataFrame([("001", "a run")], spark_schema(notes.schema)))
    assert tables.version("notes") == 1 and tables.versions_written() == {"notes": 1} and not tables.versions_opened

    written = deltalake.DeltaTable(tables.path("notes"))
    assert written.metadata().description == "One row per note"
    assert written.metadata().configuration.items() >= notes.layout.items()
    assert written.to_pyarrow_table().to_pylist() == [{"patient_id": "001", "run_id": "a run"}]
    opened = Tables(spark, str(tmp_path))
    opened.open("notes")
    assert opened.exists("notes") and opened.versions_opened == {"notes": 1} and opened.versions_written() == {}


def test_columns_that_an_older_version_lacks_are_null_to_who_only_reads(spark: SparkSession, tmp_path: Path) -> None:
    spark.createDataFrame([("001", "train", "a run")], "patient_id string, split string, run_id string").write.format(
        "delta"
    ).save(f"{tmp_path}/splits")
    [row] = Tables(spark, str(tmp_path)).read("splits").select("patient_id", "split", "fold").collect()
    assert tuple(row) == ("001", "train", None)
    assert deltalake.DeltaTable(f"{tmp_path}/splits").version() == 0


def test_a_job_makes_the_tables_that_it_writes_and_no_other(finished: Finished) -> None:
    made = {path.name for path in Path(finished.config.output.root).iterdir()}
    assert made == {*preprocess.JOB.writes, "runs"}


def test_a_run_opens_each_log_once(
    spark: SparkSession, again: Again, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened: list[str] = []

    def count(session: SparkSession, name: str, path: str, schema: StructType) -> Log | None:
        opened.append(name)
        return open_log(session, name, path, schema)

    monkeypatch.setattr(tables_module, "open_log", count)
    in_shared_session(spark, monkeypatch)
    config = again()
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config.model_dump(mode="json")))
    assert preprocess.main(["--config", str(tmp_path / "config.yaml"), "on_failed_slides=ignore"]) == 0
    assert sorted(opened) == sorted(preprocess.JOB.tables)
    runs = pl.read_delta(f"{config.output.root}/runs").sort("started_at")
    last = runs.to_dicts()[-1]
    assert dict(last["tables_read"]).keys() == set(preprocess.JOB.tables) - {"splits"}  # which does not exist
    assert last["tables_written"] in ([], {})
