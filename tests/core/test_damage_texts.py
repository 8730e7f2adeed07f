"""What errors say of damage to a table: only what is gone or spoilt is damage, not what could not be reached."""

import pytest

from jobs.runtime.tables.layout import damage_of, table_in

ROOT = "/data/my tables"
TABLE = f"{ROOT}/features"
PART = "part-00000-1f-c000.snappy.parquet"
NOT_FOUND = "java.io.FileNotFoundException: "
STACK = "\n\tat org.apache.http.impl.conn.ConnectionPool.lease(ConnectionPool.java:7)\n\tat py4j.GatewayConnection.run(G.java:9)"


@pytest.mark.parametrize(
    "text",
    [
        f"{NOT_FOUND}{TABLE}/{PART} (Too many open files)",
        f"{NOT_FOUND}{TABLE}/{PART} (Permission denied)",
        f"{NOT_FOUND}File file:{TABLE}/{PART} does not exist\nCaused by: java.io.IOException: Too many open files",
        f"[CANNOT_READ_FILE_FOOTER] Could not read footer: file:{TABLE}/{PART}. java.net.SocketException: Connection reset",
        f"[CANNOT_READ_FILE_FOOTER] file:{TABLE}/{PART}\nCaused by: java.net.ConnectException: refused",
        f"[FAILED_READ_FILE.NO_HINT] file:{TABLE}/{PART} java.net.SocketTimeoutException: Read timed out",
        f"ParquetDecodingException: {TABLE}/{PART}\nCaused by: java.io.IOException: Input/output error",
        f"CANNOT_READ_FILE_FOOTER {TABLE}/{PART} org.apache.hadoop.security.AccessControlException: Permission denied: user=x",
        f"CANNOT_READ_FILE_FOOTER {TABLE}/{PART} java.nio.file.AccessDeniedException: 403",
        f"DELTA_STATE_RECOVER_ERROR {TABLE}/_delta_log: java.net.UnknownHostException: account",
        f"{NOT_FOUND}{TABLE}/{PART}",
        f"{NOT_FOUND}File file:/elsewhere/features/{PART} does not exist",
        f"{NOT_FOUND}File file:/elsewhere{TABLE}/{PART} does not exist",
        f"{NOT_FOUND}File file:{TABLE}_old/{PART} does not exist",
        f"{NOT_FOUND}/tmp/features/shuffle_1.data (No such file or directory)\nwhile writing {TABLE}/{PART}",
    ],
)
def test_what_could_not_be_reached_or_lies_elsewhere_is_no_damage(text: str) -> None:
    assert damage_of(text, "features", TABLE) is None
    assert damage_of(text + STACK, "features", TABLE) is None


@pytest.mark.parametrize(
    ("text", "path"),
    [
        (f"{NOT_FOUND}File file:{TABLE}/{PART} does not exist", TABLE),
        (f"{NOT_FOUND}\nFile file:/data/my%20tables/features/{PART} does not exist\n\nIt is possible", TABLE),
        (f"{NOT_FOUND}{TABLE}/{PART} (No such file or directory)", TABLE),
        (f"{NOT_FOUND}File file:{TABLE}/{PART} does not exist", f"file://{TABLE}"),
        (f"{NOT_FOUND}File does not exist: hdfs://name:8020/t/features/{PART}", "/t/features"),
        (f"{NOT_FOUND}File does not exist: hdfs://name:8020/t/features/{PART}", "hdfs:///t/features"),
        (f"{NOT_FOUND}No such file or directory: s3a://b/t/features/{PART}", "s3a://b/t/features"),
        (f"[FAILED_READ_FILE.FILE_NOT_EXIST] abfss://c@a.x.net/t/features/{PART}.", "abfss://c@a.x.net/t/features"),
    ],
)
def test_a_file_that_is_gone_is_named_and_deleting_comes_last(text: str, path: str) -> None:
    said = damage_of(text + STACK, "features", path)
    assert said == (
        f"table features: {PART} in {path} is missing: restore it from a copy; without a copy, the same command makes its rows "
        "anew once you delete that folder"
    )


@pytest.mark.parametrize("text", ["[CANNOT_READ_FILE_FOOTER]", "is not a Parquet file", "ChecksumException:"])
@pytest.mark.parametrize(
    ("name", "loss"), [("splits", "its patients are dealt anew"), ("runs", "earlier runs is lost")]
)
def test_a_spoilt_file_is_damage_and_what_would_be_lost_is_said(text: str, name: str, loss: str) -> None:
    said = damage_of(f"{text} file:{ROOT}/{name}/{PART}{STACK}", name, f"{ROOT}/{name}")
    assert said is not None and f"table {name}: {PART} in {ROOT}/{name} is damaged: restore it" in said
    assert said.endswith(f"{loss} once you delete that folder")


def test_a_table_is_known_by_its_own_path() -> None:
    paths = {name: f"{ROOT}/{name}" for name in ("slides", "features")}
    assert table_in(f"file:{TABLE}/{PART}", paths) == "features"
    assert table_in(f"file:/data/my%20tables/slides/_delta_log/{0:020}.json", paths) == "slides"
    assert table_in(f"file:/scratch/features/{PART}", paths) is None
