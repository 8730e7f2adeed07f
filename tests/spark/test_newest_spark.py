"""The main job on the newest Spark, with the newest pyarrow, held against the tables of the Spark that training runs beside."""

from pathlib import Path

import polars as pl
import yaml
from pyspark.sql import SparkSession

from tests.faults.frames import assert_same_rows, frames
from tests.newest import submit_to_newest_spark
from tests.spark.conftest import Finished


def test_the_newest_spark_makes_the_same_tables(finished: Finished, spark: SparkSession, tmp_path: Path) -> None:
    settings = finished.config.model_dump(mode="json")
    settings["output"]["root"] = str(tmp_path / "tables")
    (tmp_path / "my.yaml").write_text(yaml.safe_dump(settings))
    done = submit_to_newest_spark("jobs/preprocess.py", "--config", str(tmp_path / "my.yaml"))
    assert done.returncode == 3, done.stderr  # two slides of the cohort are missing
    assert not [word for word in ("Traceback", " WARN ", "Warning") if word in done.stderr]
    expected = frames(Path(finished.config.output.root))
    for name, found in frames(tmp_path / "tables").items():
        assert_same_rows(found, expected[name])
    [there] = pl.read_delta(str(tmp_path / "tables/runs"))["versions"]
    ours, newest = (tuple(map(int, version.split(".")[:2])) for version in (spark.version, there["pyspark"]))
    assert newest > ours
    assert int(there["pyarrow"].partition(".")[0]) >= 26
