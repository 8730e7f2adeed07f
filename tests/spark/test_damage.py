"""Damaged tables, foreign tables, full disks and a second run: one line on what is wrong, and nothing is altered."""

import resource
import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import deltalake
import psutil
import pyarrow as pa
import pytest
import yaml
from pyspark.sql import DataFrame, SparkSession
from pyspark.sql import functions as F

from jobs import patients
from jobs.runtime.settings.config import Config, ConfigError
from jobs.runtime.tables.layout import DamagedTableError
from jobs.runtime.tables.stopped import why_stopped
from jobs.runtime.tables.tables import ConcurrentRunError, Tables, spark_schema
from tests.messages import plain
from tests.spark.conftest import in_shared_session
from udfs.schemas import TILES

ROWS, CHECKPOINT, LAST = 3, 3, 4  # versions: made, given a property, then a commit for each row


@pytest.fixture(scope="module")
def whole(spark: SparkSession, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A root with a table of three rows in three files, and a checkpoint in its log."""
    root = tmp_path_factory.mktemp("whole")
    tables = Tables(spark, str(root))
    tables.create("tiles")
    tables.set_property("tiles", "delta.checkpointInterval", str(CHECKPOINT))
    for number in range(ROWS):
        tables.append("tiles", rows(spark, f"a{number}"))
    return root


def rows(spark: SparkSession, image_id: str) -> DataFrame:
    row = (image_id, 0, 0, "1", 448, 0, 1.0, 0.0, "hash", "run")
    return spark.createDataFrame([row], spark_schema(TILES)).coalesce(1)


def entry(version: int, kind: str = "json") -> str:
    return f"_delta_log/{version:020}.{kind}"


def cut(path: Path, *, checked: bool) -> None:
    """Truncate a file; unless `checked`, without the checksum that Hadoop keeps of it."""
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    if not checked:
        path.with_name(f".{path.name}.crc").unlink()


def zero(path: Path) -> None:
    """Make a file zeros, as a crash of the machine may, without the checksum that Hadoop keeps of it."""
    path.write_bytes(bytes(99))
    path.with_name(f".{path.name}.crc").unlink()


def without_checkpoint(table: Path, *versions: int) -> None:
    (table / "_delta_log/_last_checkpoint").unlink()
    (table / entry(CHECKPOINT, "checkpoint.parquet")).unlink()
    for version in versions:
        (table / entry(version)).unlink()


DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "entry cut short": (lambda t: cut(t / entry(LAST), checked=False), f"{entry(LAST)} in TABLE is damaged"),
    "entry and its checksum": (lambda t: cut(t / entry(LAST), checked=True), f"{entry(LAST)} in TABLE is damaged"),
    "entry of zeros": (lambda t: zero(t / entry(LAST)), f"{entry(LAST)} in TABLE is damaged"),
    "entry in the middle": (lambda t: without_checkpoint(t, 2), f"{entry(2)} in TABLE is missing"),
    "first entry": (lambda t: without_checkpoint(t, 0), f"{entry(0)} in TABLE is missing"),
    "checkpoint": (
        lambda t: cut(t / entry(CHECKPOINT, "checkpoint.parquet"), checked=False),
        f"{entry(CHECKPOINT, 'checkpoint.parquet')} in TABLE is damaged",
    ),
    "file": (lambda t: data_file(t).unlink(), "FILE in TABLE is missing"),
    "file cut short": (lambda t: cut(data_file(t), checked=False), "FILE in TABLE is damaged"),
    "file and its checksum": (lambda t: cut(data_file(t), checked=True), "FILE in TABLE is damaged"),
    "empty file": (lambda t: data_file(t).write_bytes(b""), "FILE in TABLE is damaged"),
}


def data_file(table: Path) -> Path:
    return sorted(table.glob("part-*.parquet"))[-1]


@pytest.mark.parametrize("kind", DAMAGE)
def test_damage_names_table_file_and_remedy(spark: SparkSession, whole: Path, tmp_path: Path, kind: str) -> None:
    table = tmp_path / "ä root/tiles"
    shutil.copytree(whole / "tiles", table)
    tables, file = Tables(spark, str(table.parent)), data_file(table).name
    damage, expected = DAMAGE[kind]
    damage(table)
    with pytest.raises(Exception) as stopped:
        tables.open("tiles")
        tables.read("tiles").where("image_id > 'a'").toPandas()
    said = why_stopped(stopped.value, tables)
    assert said == (
        f"table tiles: {expected.replace('FILE', file).replace('TABLE', str(table))}: restore it from a copy; without a copy, "
        "the same command makes its rows anew once you delete that folder"
    )
    if "_delta_log" in expected:
        assert isinstance(stopped.value, DamagedTableError), "before any work"


@pytest.mark.parametrize("kind", ["checkpoint is gone", "pointer to it", "sums of a version"])
def test_what_delta_mends_by_itself_is_no_damage(spark: SparkSession, whole: Path, tmp_path: Path, kind: str) -> None:
    table = tmp_path / "tiles"
    shutil.copytree(whole / "tiles", table)
    if kind == "checkpoint is gone":
        (table / entry(CHECKPOINT, "checkpoint.parquet")).unlink()
    else:
        (table / ("_delta_log/_last_checkpoint" if kind == "pointer to it" else entry(LAST, "crc"))).write_text("{x")
    tables = Tables(spark, str(tmp_path))
    tables.open("tiles")
    assert tables.read("tiles").count() == ROWS


def _foreign(table: Path, kind: str, spark: SparkSession, whole: Path) -> None:
    rows_there = spark.read.format("delta").load(str(whole / "tiles"))
    others = {
        "other types": rows_there.withColumn("patient_id", F.col("x_px").cast("bigint")),
        "another table": spark.range(3).withColumnRenamed("id", "patient_id"),
        "no key": rows_there.drop("image_id"),
        "nested": rows_there.withColumn("run_id", F.array("run_id")),
    }
    if kind in others:
        others[kind].write.format("delta").save(str(table))
    elif kind == "partitioned":
        rows_there.write.format("delta").partitionBy("patient_id").save(str(table))
    elif kind.startswith("delta."):
        key, value = kind.split("=")
        rows_there.write.format("delta").option(key, value).save(str(table))
    elif kind == "its log is gone":
        shutil.copytree(whole / "tiles", table)
        shutil.rmtree(table / "_delta_log")
    elif kind == "slides":
        table.mkdir()
        (table / "a1.tif").write_bytes(b"II")
    elif kind == "a file":
        table.write_bytes(b"x")
    else:
        spark.range(3).write.format("delta").save(str(table.parent))


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        ("other types", "patient_id is bigint, not string"),
        ("another table", "it has no column image_id; it has no column x_px"),
        ("no key", "it has no column image_id"),
        ("nested", "run_id is array<string>, not string"),
        ("partitioned", "it is partitioned by patient_id"),
        ("delta.enableDeletionVectors=true", "its property delta.enableDeletionVectors is true"),
        ("delta.columnMapping.mode=name", "its property delta.columnMapping.mode is name"),
        ("delta.appendOnly=true", "its property delta.appendOnly is true"),
        ("its log is gone", "holds no Delta table, but part-"),
        ("slides", "holds no Delta table, but a1.tif"),
        ("a file", "holds no Delta table, but tiles"),
        ("inside another table", "cannot be opened as table"),
    ],
)
def test_what_is_no_table_of_ours_is_refused_and_left_as_it_is(
    spark: SparkSession, whole: Path, tmp_path: Path, kind: str, said: str
) -> None:
    root = tmp_path / "root"
    root.mkdir()
    _foreign(root / "tiles", kind, spark, whole)
    before = {path: path.stat().st_mtime_ns for path in root.rglob("*")}
    with pytest.raises(ConfigError) as refused:
        Tables(spark, str(root)).open("tiles")
    assert said in str(refused.value) and str(root) in str(refused.value) and "\n" not in str(refused.value)
    assert "set another output.root, or move that folder away" in str(refused.value)
    assert {path: path.stat().st_mtime_ns for path in root.rglob("*")} == before


def test_a_table_of_an_older_version_is_ours(spark: SparkSession, whole: Path, tmp_path: Path) -> None:
    older = spark.read.format("delta").load(str(whole / "tiles")).drop("level_read").withColumn("mine", F.lit("note"))
    older.write.format("delta").save(str(tmp_path / "tiles"))
    tables = Tables(spark, str(tmp_path))
    tables.open("tiles")
    tables.create("tiles")
    assert {"level_read", "mine"} < set(tables.read("tiles").columns)


def test_a_job_refuses_a_foreign_table_before_it_makes_or_alters_any(
    spark: SparkSession,
    small_config: Callable[..., Config],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    config = small_config()
    spark.range(3).withColumnRenamed("id", "patient_id").write.format("delta").save(f"{config.output.root}/runs")
    status, said = _job(spark, config, tmp_path, monkeypatch, capfd)
    assert status == 2 and said.count("\n") == 1
    assert said.startswith(
        f"slidelake patients: output.root: {config.output.root}/runs is another table than runs: it has no"
    )
    assert [path.name for path in Path(config.output.root).iterdir()] == ["runs"]
    assert deltalake.DeltaTable(f"{config.output.root}/runs").version() == 0


def test_a_job_on_a_damaged_table_says_one_line(
    spark: SparkSession,
    small_config: Callable[..., Config],
    whole: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    config = small_config()
    shutil.copytree(whole / "tiles", Path(config.output.root) / "tiles")
    data_file(Path(config.output.root) / "tiles").unlink()
    status, said = _job(spark, config, tmp_path, monkeypatch, capfd)
    lines = [line for line in said.splitlines() if not line.startswith("slidelake: plan")]
    assert status == 1 and len(lines) == 1, said
    assert lines[0].startswith("slidelake patients: table tiles: part-") and "to go on" not in said


def _job(
    spark: SparkSession,
    config: Config,
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> tuple[int, str]:
    in_shared_session(spark, monkeypatch)
    file = folder / "config.yaml"
    file.write_text(yaml.safe_dump(config.model_dump(mode="json")))
    capfd.readouterr()
    status = patients.main(["--config", str(file)])
    return status, plain(capfd.readouterr().err)


@contextmanager
def _files_of_at_most(spark: SparkSession, n_bytes: int) -> Iterator[None]:
    """The session's JVM can write no larger file, as on a disk that is full."""
    port = int(spark.sparkContext.getConf().get("spark.driver.port") or 0)
    [jvm] = [
        child
        for child in psutil.Process().children()
        if child.status() != psutil.STATUS_ZOMBIE and port in {one.laddr.port for one in child.net_connections()}
    ]
    before = resource.prlimit(jvm.pid, resource.RLIMIT_FSIZE)
    resource.prlimit(jvm.pid, resource.RLIMIT_FSIZE, (n_bytes, before[1]))
    try:
        yield
    finally:
        resource.prlimit(jvm.pid, resource.RLIMIT_FSIZE, before)


def test_no_room_names_the_places_and_what_is_free_there(spark: SparkSession, tmp_path: Path) -> None:
    tables = Tables(spark, str(tmp_path))
    tables.create("tiles")
    with _files_of_at_most(spark, 100), pytest.raises(Exception) as stopped:
        tables.append("tiles", rows(spark, "a"))
    said = why_stopped(stopped.value, tables)
    assert said is not None, str(stopped.value)
    assert said.startswith(f"File too large: output.root {tmp_path} has ") and "\n" not in said
    assert "GB free, spark.local.dir " in said and said.endswith(
        ": free some, then run the same command again to go on"
    )
    tables.append("tiles", rows(spark, "a"))


@pytest.mark.parametrize(
    "text", ["[Errno 28] No space left on device: '/x'", "java.io.IOException: Disk quota exceeded"]
)
def test_other_words_for_no_room(spark: SparkSession, tmp_path: Path, text: str) -> None:
    said = why_stopped(OSError(text), Tables(spark, str(tmp_path)))
    assert said is not None and "run the same command again to go on" in said


def test_a_second_writer_is_one_line(spark: SparkSession, tmp_path: Path) -> None:
    first, second = Tables(spark, str(tmp_path)), Tables(spark, str(tmp_path))
    first.create("tiles")
    second.create("tiles")

    first.put("tiles", rows(spark, "a"), "image_id", ["a"], [])
    with pytest.raises(ConcurrentRunError) as noticed:
        second.put("tiles", rows(spark, "b"), "image_id", ["b"], [])
    said = why_stopped(noticed.value, second)
    assert said is not None and said.endswith("let one end, then run again") and "\n" not in said


def test_a_writer_that_commits_while_rows_are_made_is_one_line(
    spark: SparkSession, whole: Path, tmp_path: Path
) -> None:
    shutil.copytree(whole / "tiles", tmp_path / "tiles")
    tables, path = Tables(spark, str(tmp_path)), str(tmp_path / "tiles")

    def meanwhile(batches: Iterable[pa.RecordBatch]) -> Iterable[pa.RecordBatch]:
        deltalake.write_deltalake(path, deltalake.DeltaTable(path).to_pyarrow_table(), mode="append")
        yield from batches

    made = rows(spark, "a0").mapInArrow(meanwhile, spark_schema(TILES))
    with pytest.raises(Exception) as stopped:
        tables.put("tiles", made, "image_id", ["a0"], ["a0"])
    assert why_stopped(stopped.value, tables) == (
        f"another run wrote to {tmp_path} while this one did: let one end, then run the same command again to go on"
    )


@pytest.mark.parametrize(
    "text",
    [
        "[DELTA_CONCURRENT_APPEND.WITHOUT_HINT] Transaction conflict detected.",
        "io.delta.exceptions.ConcurrentTransactionException: ...",
        "[DELTA_PROTOCOL_CHANGED] The protocol version of the Delta table has been changed by a concurrent update.",
        "org.apache.spark.sql.delta.MetadataChangedException: x",
    ],
)
def test_what_delta_says_of_another_writer(spark: SparkSession, tmp_path: Path, text: str) -> None:
    said = why_stopped(RuntimeError(text), Tables(spark, str(tmp_path)))
    assert (
        said
        == f"another run wrote to {tmp_path} while this one did: let one end, then run the same command again to go on"
    )


@pytest.mark.parametrize(
    "text",
    [
        "FAILED_READ_FILE.NO_HINT s3a://b/tiles/part-1.parquet java.net.SocketTimeoutException: Read timed out",
        "java.io.FileNotFoundException: /tmp/blockmgr-1/0c/shuffle_1_2_0.data",
        "a patient's row is wrong",
    ],
)
def test_of_other_errors_nothing_is_said(spark: SparkSession, tmp_path: Path, text: str) -> None:
    assert why_stopped(RuntimeError(text), Tables(spark, str(tmp_path))) is None
