"""What a job cannot write is refused before Spark starts, with the reason, and nothing is left where it was tried."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from jobs.runtime.settings.config import Config, ConfigError
from jobs.runtime.tables.writable import refuse_unwritable


@pytest.fixture(autouse=True)
def no_other_store(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HADOOP_CONF_DIR", "YARN_CONF_DIR", "DATABRICKS_RUNTIME_VERSION", "SPARK_CONF_DIR", "SPARK_HOME"):
        monkeypatch.delenv(name, raising=False)


def config_for(root: str, **sections: Any) -> Config:
    return Config.model_validate({"patients": "p.csv", "output": {"root": root}, **sections})


def _file(path: Path) -> None:
    path.write_text("x")


def _file_above(path: Path) -> None:
    path.parent.parent.mkdir()
    path.parent.write_text("x")


def _broken_link(path: Path) -> None:
    path.symlink_to("nowhere")


def _link_to_file(path: Path) -> None:
    (path.parent / "file").write_text("x")
    path.symlink_to("file")


def _file_for_table(path: Path) -> None:
    path.mkdir()
    (path / "features").write_text("x")


def _broken_link_for_table(path: Path) -> None:
    path.mkdir()
    (path / "runs").symlink_to("nowhere")


@pytest.mark.parametrize("scheme", ["", "file://", "local://"])
@pytest.mark.parametrize(
    ("below", "prepare", "reason"),
    [
        ("root", _file, "is a file, not a folder"),
        ("a/b/root", _file_above, "b is a file, not a folder"),
        ("root", _broken_link, "is a link to nothing"),
        ("root", _link_to_file, "is a file, not a folder"),
        ("root", _file_for_table, "features is a file, not a folder"),
        ("root", _broken_link_for_table, "runs is a link to nothing"),
        ("x" * 300, lambda path: None, "File name too long"),
    ],
)
def test_a_root_that_can_not_be_made_is_refused(
    tmp_path: Path, scheme: str, below: str, prepare: Callable[[Path], None], reason: str
) -> None:
    prepare(tmp_path / below)
    with pytest.raises(ConfigError) as caught:
        refuse_unwritable(config_for(f"{scheme}{tmp_path / below}"), "preprocess")
    line = str(caught.value)
    assert line.startswith("output.root: ") and reason in line and line.isprintable()
    assert "or set output.root to another place" in line


@pytest.mark.parametrize("root", ["/proc/x", "/proc/1/x/y", "file:///sys/x"])
def test_a_root_on_a_disk_that_takes_no_folder_is_refused(root: str) -> None:
    with pytest.raises(ConfigError, match=r"output\.root: .* cannot be written"):
        refuse_unwritable(config_for(root), "slides")


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")
@pytest.mark.parametrize(("mode", "below"), [(0o755, "root"), (0o755, "root/a/b"), (0o700, "root/a"), (0o555, "")])
def test_a_root_without_the_right_to_write_is_refused(tmp_path: Path, mode: int, below: str) -> None:
    for folder in (tmp_path, *tmp_path.parents[:2]):
        folder.chmod(0o755)
    (tmp_path / "of root").mkdir(mode=mode)
    os.seteuid(65534)
    try:
        with pytest.raises(
            ConfigError, match=r"Permission denied: .*of root.* give this user the right to write there"
        ):
            refuse_unwritable(config_for(str(tmp_path / "of root" / below)), "slides")
    finally:
        os.seteuid(0)


@pytest.mark.parametrize("root", ["new", "new/and/deep", "there", "there/ü 100% #b", "link"])
def test_where_it_can_be_written_nothing_stays(tmp_path: Path, root: str) -> None:
    (tmp_path / "there/slides/_delta_log").mkdir(parents=True)
    (tmp_path / "link").symlink_to("there")
    before = sorted(tmp_path.rglob("*"))
    refuse_unwritable(config_for(str(tmp_path / root)), "preprocess")
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize(
    ("job", "section", "key"),
    [
        ("splits", "splits", "csv"),
        ("train", "training", "output"),
        ("predict", "predict", "csv"),
        ("stainnet", "stainnet", "checkpoint"),
        ("patches", "patches", "folder"),
    ],
)
def test_all_that_a_job_writes_is_tried_and_nothing_of_other_jobs(
    tmp_path: Path, job: str, section: str, key: str
) -> None:
    (tmp_path / "file").write_text("x")
    config = config_for(str(tmp_path / "t"), **{section: {key: str(tmp_path / "file/below.csv")}})
    with pytest.raises(ConfigError, match=rf"{section}\.{key}: .*file is a file, not a folder"):
        refuse_unwritable(config, job)
    refuse_unwritable(config, "slides")
    over = config_for(str(tmp_path / "t"), **{section: {key: str(tmp_path / "file")}})
    if key in ("csv", "checkpoint") and job != "splits":
        refuse_unwritable(over, job)  # a file may be written over


@pytest.mark.parametrize("root", ["s3a://bucket/tables", "abfss://c@a.dfs.core.windows.net/t", "hdfs:///proc/x"])
def test_what_this_machine_does_not_know_is_left_to_spark(root: str) -> None:
    refuse_unwritable(config_for(root), "preprocess")


def test_plain_paths_may_be_of_another_store_on_a_cluster(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HADOOP_CONF_DIR", "/etc/hadoop/conf")
    refuse_unwritable(config_for("/proc/x"), "preprocess")
    with pytest.raises(ConfigError):
        refuse_unwritable(config_for("file:///proc/x"), "preprocess")


def _site(store: str, key: str = "fs.defaultFS") -> str:
    return f"<configuration>\n<property>\n  <name>{key}</name>\n  <value>{store}</value>\n</property></configuration>"


@pytest.mark.parametrize("variable", ["SPARK_CONF_DIR", "SPARK_HOME"])
@pytest.mark.parametrize(
    ("name", "text", "is_local"),
    [
        ("spark-defaults.conf", "spark.hadoop.fs.defaultFS hdfs://name:8020", False),
        (
            "spark-defaults.conf",
            "spark.master yarn\n  spark.hadoop.fs.defaultFS\t=\tabfss://c@a.dfs.core.windows.net/",
            False,
        ),
        ("spark-defaults.conf", "spark.hadoop.fs.defaultFS:s3a://bucket", False),
        ("spark-defaults.conf", "spark.hadoop.fs.default.name=viewfs:///", False),
        ("core-site.xml", _site("hdfs://name:8020"), False),
        ("core-site.xml", _site("\n gs://bucket \n", "fs.default.name"), False),
        ("spark-defaults.conf", "spark.hadoop.fs.defaultFS file:///", True),
        ("spark-defaults.conf", "# spark.hadoop.fs.defaultFS hdfs://name:8020", True),
        ("spark-defaults.conf", "spark.eventLog.dir hdfs://name:8020/logs", True),
        ("core-site.xml", _site("file:///"), True),
        ("core-site.xml", _site("hdfs://name:8020", "dfs.other"), True),
        ("core-site.xml", "\xff no XML", True),
    ],
)
def test_plain_paths_may_be_of_the_store_in_sparks_settings(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, variable: str, name: str, text: str, is_local: bool
) -> None:
    folder = tmp_path / "conf"
    folder.mkdir()
    (folder / name).write_text(text, encoding="latin-1")
    monkeypatch.setenv(variable, str(folder if variable == "SPARK_CONF_DIR" else tmp_path))
    if is_local:
        with pytest.raises(ConfigError, match="cannot be written"):
            refuse_unwritable(config_for("/proc/x"), "preprocess")
    else:
        refuse_unwritable(config_for("/proc/x"), "preprocess")
    with pytest.raises(ConfigError, match="cannot be written"):
        refuse_unwritable(config_for("file:///proc/x"), "preprocess")
