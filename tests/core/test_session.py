"""Where a job runs: as it is told, with the retries of a cluster where that is one machine; and which Spark it refuses."""

import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyspark
import pytest
from pyspark.errors import PySparkException

from jobs.runtime.settings.config import ConfigError
from jobs.runtime.spark.session import delta_remedy, has_delta, refuse_unusable_spark, size_of, with_retries
from tests.messages import plain


@pytest.mark.parametrize(
    ("told", "master"),
    [
        ("local", "local[1,4]"),
        ("local[2]", "local[2,4]"),
        ("local[*]", "local[*,4]"),
        ("local[2,1]", "local[2,1]"),
        ("local-cluster[2,1,1024]", "local-cluster[2,1,1024]"),
        ("spark://host:7077", "spark://host:7077"),
        ("yarn", "yarn"),
    ],
)
def test_a_bare_local_master_is_given_retries_and_no_other_is_touched(told: str, master: str) -> None:
    assert with_retries(told) == master


@pytest.mark.parametrize("version", ["3.5.9", "3.5.6-amzn-1", "3.2.0"])
def test_a_spark_that_is_too_old_is_refused_with_the_platforms_that_have_a_later_one(
    monkeypatch: pytest.MonkeyPatch, version: str
) -> None:
    monkeypatch.setattr(pyspark, "__version__", version)
    with pytest.raises(
        ConfigError, match=f"Spark {version}, .* use Spark 4.0 .* emr-spark-8.0.0 .* 17.3 LTS"
    ) as refused:
        refuse_unusable_spark()
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("version", ["4.0.0", "4.0.2-amzn-0", "4.2.0", "4.3.0.dev0", "5.0.0"])
def test_a_later_spark_is_not_refused(monkeypatch: pytest.MonkeyPatch, version: str) -> None:
    monkeypatch.setattr(pyspark, "__version__", version)
    refuse_unusable_spark()


def test_the_remedy_names_the_delta_of_the_spark_that_there_is() -> None:
    assert delta_remedy("4.0.2-amzn-0") == "add --packages io.delta:delta-spark_2.13:4.0.1 to spark-submit"
    assert "io.delta:delta-spark_4.1_2.13:4.4.0 to" in delta_remedy("4.1.4")
    assert "io.delta:delta-spark_5.0_2.13:VERSION (docs.delta.io/releases tells which fits) to" in delta_remedy("5.0.0")


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("'path' is not specified", True),
        (
            "[DATA_SOURCE_NOT_FOUND] Failed to find the data source: delta. Make sure the provider name is correct",
            False,
        ),
    ],
)
def test_delta_is_missing_if_spark_does_not_know_its_format(text: str, found: bool) -> None:
    def load() -> None:
        raise PySparkException(text)

    session: Any = SimpleNamespace(read=SimpleNamespace(format=lambda name: SimpleNamespace(load=load)))
    assert has_delta(session) is found


def said_by(code: str, *arguments: str) -> "subprocess.CompletedProcess[str]":
    environment = os.environ | {"PYTHONDONTWRITEBYTECODE": ""}
    command = [sys.executable, "-c", code, *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


WITHOUT_DELTA = """
import importlib.metadata, sys
def version(name): raise importlib.metadata.PackageNotFoundError(name)
importlib.metadata.version = version
sys.modules["delta"] = None
from jobs.runtime.spark import session
import jobs.runtime.tables.tables
try:
    session.refuse_unusable_spark()
except session.ConfigError as error:
    print(error)
"""


def test_where_delta_has_no_python_side_and_no_package_is_known_the_tables_import_and_the_remedy_is_told() -> None:
    done = said_by(WITHOUT_DELTA)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == (
        f"Delta's Python side is missing: {delta_remedy(pyspark.__version__)}, or pip install 'slidelake[spark]'\n"
    )


def test_without_pyspark_the_command_says_in_one_line_where_to_get_it() -> None:
    code = "import sys; sys.modules['pyspark'] = None; from jobs.__main__ import main; sys.exit(main())"
    done = said_by(code, "preprocess", "--config", "my.yaml")
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1), done.stderr
    assert plain(done.stderr).startswith("slidelake preprocess: PySpark is missing: pip install 'slidelake[spark]'")


@pytest.mark.parametrize(
    ("text", "unit", "n_bytes"),
    [("1g", "b", 2**30), ("512m", "b", 2**29), ("4096", "b", 4096), ("2048", "m", 2**31), ("3KB", "m", 3072)],
)
def test_sizes_are_read_as_spark_reads_them(text: str, unit: str, n_bytes: int) -> None:
    assert size_of(text, unit) == n_bytes
    with pytest.raises(ConfigError, match="is no size of memory: write it as Spark does"):
        size_of(f"{text} or so")


def test_one_module_alone_reaches_into_the_jvm() -> None:
    root = Path(__file__).parents[2]
    private = re.compile(r"\._(jvm|jsc|gateway|jdf|jsparkSession|jc|ensure_initialized)\b")
    modules = [path for top in ("jobs", "udfs") for path in (root / top).rglob("*.py")]
    assert [path.name for path in modules if private.search(path.read_text())] == ["jvm.py"]
