"""output.schema: tables by name in a catalog that stays, a metastore of Hive in a folder."""

import json
import os
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from pyspark.sql import SparkSession

from jobs import slides
from jobs.runtime.settings.config import Config
from tests.messages import plain

ROOT = Path(__file__).parents[2]


def test_tables_are_registered_commented_and_queried_by_name(tmp_path: Path) -> None:
    conf = {
        "spark.sql.catalogImplementation": "hive",
        "spark.sql.warehouse.dir": f"{tmp_path}/warehouse",
        "spark.hadoop.javax.jdo.option.ConnectionURL": f"jdbc:derby:;databaseName={tmp_path}/metastore;create=true",
        "spark.driver.extraJavaOptions": f"-XX:TieredStopAtLevel=1 -Dderby.stream.error.file={tmp_path}/derby.log",
        "spark.driver.memory": "1g",
    }
    options = [part for key, value in conf.items() for part in ("--conf", f"{key}={value}")]
    done = subprocess.run(
        [sys.executable, "tests/spark/registered.py", str(tmp_path)],
        cwd=ROOT,
        env=os.environ
        | {"SPARK_LOCAL_IP": "127.0.0.1", "PYSPARK_SUBMIT_ARGS": shlex.join([*options, "pyspark-shell"])},
        capture_output=True,
        text=True,
        check=False,
        timeout=180,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "found.json").read_text())
    here = "output.schema: "
    assert found["no_schema"] == (
        f"{here}Spark's catalog has no schema lab: CREATE SCHEMA lab, or name one that exists"
    )
    assert found["rows"] == [["a1", "001"]]
    image_id = "the slide image, from the patient CSV"
    for name, comment in (("slides", "One row per image of the CSV"), ("tiles", "One row per tile with enough tissue")):
        assert found["comments"][name][0] == image_id
        assert found["comments"][name][1].startswith(comment)
    assert found["again"] == ""
    assert found["found_again"] == [1, 0]  # its row, and no new version
    assert found["elsewhere"] == (
        f"{here}lab.slides is there already and is file:{tmp_path}/tables/slides, not {tmp_path}/tables2/slides: "
        "set another output.schema, or rename or drop that table"
    )
    assert "lab.slides is there already and is a table whose files are missing" in found["gone"]


def test_a_schema_that_can_not_be_had_ends_a_job_before_it_writes(
    spark: SparkSession,
    small_config: Callable[..., Config],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr("jobs.runtime.run.cli.start_session", lambda _: spark)
    monkeypatch.setattr(spark, "stop", lambda: None)  # it goes on for other tests
    file = tmp_path / "config.yaml"
    config = small_config(output={"schema": "default"})
    file.write_text(yaml.safe_dump(config.model_dump(mode="json")))
    capfd.readouterr()
    assert slides.main(["--config", str(file)]) == 2
    said = plain(capfd.readouterr().err)
    assert said.startswith("slidelake slides: output.schema: Spark's own catalog, which default would be in, ends with")
    assert said.count("\n") == 1 and not Path(config.output.root).exists()
