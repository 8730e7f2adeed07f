"""Tables in folders of any name that is not refused: written by Spark, read by Spark, the feed, deltalake and polars."""

import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import deltalake
import pandas as pd
import polars as pl
import pytest
import yaml
from pyspark.errors import AnalysisException
from pyspark.sql import SparkSession

from jobs import preprocess, slides
from jobs.runtime.run.run import Run
from jobs.runtime.run.summary import read_state, summarise
from jobs.runtime.settings.config import Config
from jobs.runtime.spark.session import DELTA_PACKAGE, call_static, has_delta
from jobs.runtime.tables.tables import Tables, spark_schema
from jobs.training.table_versions import read_columns
from tests.messages import plain
from tests.spark.conftest import in_shared_session
from udfs.schemas import TILES

NAMES = [
    "ümläut e\u0301 漢字 🔬",
    " a  b #1 ?x +y :z =1 @,;&!^()~|<>",
    "'q' \"r\" *[1]{2} $HOME ${env:HOME} ${spark.app.name}",
    "100% %4",
    "..._-x",
]


@pytest.mark.parametrize("name", NAMES)
def test_a_table_is_written_and_read_by_all(spark: SparkSession, tmp_path: Path, name: str) -> None:
    tables = Tables(spark, str(tmp_path / name / "../.." / tmp_path.name / name))
    tables.open("tiles")
    tables.create("tiles")
    rows = spark.createDataFrame([("a", 0, 0, "1", 448, 0, 1.0, 0.0, "hash", "run")], spark_schema(TILES))
    tables.put("tiles", rows, "image_id", ["a"], [])
    tables.put("tiles", rows, "image_id", ["a"], ["a"])
    tables.set_property("tiles", "slidelake.test", name)
    tables.open("tiles")
    path = str(tmp_path / name / "tiles")
    assert tables.property("tiles", "slidelake.test") == name
    assert tables.read("tiles").count() == 1
    assert read_columns(path, ["image_id"])[1].to_pylist() == [{"image_id": "a"}]
    assert deltalake.DeltaTable(path).to_pyarrow_table().num_rows == 1
    assert pl.read_delta(path, use_pyarrow=True).height == 1
    assert [*tmp_path.iterdir()] == [tmp_path / name] and [*(tmp_path / name).iterdir()] == [tmp_path / name / "tiles"]


def test_the_printed_next_step_runs(spark: SparkSession, small_config: Callable[..., Config], tmp_path: Path) -> None:
    run = Run(small_config(output={"root": str(tmp_path / "ü b '\" #{1}")}), spark, preprocess.JOB)
    for name in ("slides", "patients"):
        run.tables.create(name)
    survey = pd.DataFrame({"patient_id": [], "removed": pd.Series(dtype=bool)})
    summary = summarise(run.job, run.record, run.config, read_state(run.tables, run.job, survey, run.config.encoders))
    [line] = [line for line in summary.splitlines() if line.startswith("  next")]
    step = line.removeprefix("  next").partition(", or")[0].strip()
    assert "patient_id" in eval(step, {"polars": pl}).columns


POSIX = """
import sys
from jobs.runtime.settings.config import ConfigError
from jobs.runtime.spark.session import start_session
from jobs.runtime.tables.tables import Tables
spark = start_session("posix")
for root in sys.argv[1:]:
    try:
        Tables(spark, root).open("tiles")
        print("ok")
    except ConfigError as error:
        print(error)
spark.stop()
"""


def test_letters_that_java_can_not_write_are_refused_with_the_remedy(tmp_path: Path) -> None:
    environment = os.environ | {"LC_ALL": "POSIX", "SPARK_LOCAL_IP": "127.0.0.1", "PYSPARK_PYTHON": sys.executable}
    command = [sys.executable, "-c", POSIX, str(tmp_path / "ümläut"), str(tmp_path / "plain")]
    done = subprocess.run(command, env=environment, capture_output=True, check=True, timeout=120)
    refused, plain = done.stdout.decode().splitlines()
    assert "ümläut has letters that Java cannot write in this locale" in refused and "set LC_ALL=C.UTF-8" in refused
    assert plain == "ok" and not [*tmp_path.iterdir()]


def test_a_place_that_can_not_be_ends_a_job_in_one_line(
    spark: SparkSession,
    small_config: Callable[..., Config],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    in_shared_session(spark, monkeypatch)
    file = tmp_path / "config.yaml"
    file.write_text(yaml.safe_dump(small_config().model_dump(mode="json")))
    capfd.readouterr()
    assert slides.main(["--config", str(file), f"output.root={tmp_path}/%41"]) == 2
    said = plain(capfd.readouterr().err)
    assert said.count("\n") == 1 and said.startswith("slidelake slides: output.root: '%41' in a path")
    assert not list(tmp_path.glob("%41")) and not (tmp_path / "A").exists()


def test_a_static_method_of_java_is_called_on_the_driver_and_no_job_runs(spark: SparkSession) -> None:
    spark.sparkContext.setJobGroup("static", "static")
    assert int(call_static(spark, "java.lang.System", "getProperty", "java.version").partition(".")[0]) >= 17
    assert re.fullmatch(r"\d+\.\d+\.\d+", call_static(spark, DELTA_PACKAGE, "VERSION"))
    assert not spark.sparkContext.statusTracker().getJobIdsForGroup("static")
    assert has_delta(spark)
    with pytest.raises(AnalysisException, match=r"class no\.such not found"):
        call_static(spark, "no.such", "method")
