"""Where the newest Spark, pyarrow, pandas and NumPy hide those that training by petastorm needs; all else is as in .venv."""

import os
import subprocess
import sys
from pathlib import Path

from tests.faults.commands import run_to_end

_OVERLAY = Path(sys.prefix) / "newest"
_COMMAND_S = 300


def run_with_newest_pyarrow(module: str, *arguments: str) -> "subprocess.CompletedProcess[str]":
    """`python -m module arguments` there, whatever its status."""
    return _run(sys.executable, "-m", module, *arguments)


def submit_to_newest_spark(script: str, *arguments: str) -> "subprocess.CompletedProcess[str]":
    """`spark-submit script arguments` there, whatever its status."""
    small = ("--conf", "spark.driver.memory=2g", "--conf", "spark.sql.shuffle.partitions=2")
    return _run(str(_OVERLAY / "pyspark/bin/spark-submit"), *small, script, *arguments)


def _run(*command: str) -> "subprocess.CompletedProcess[str]":
    assert _OVERLAY.is_dir(), f"{_OVERLAY} is not there: make test installs it"
    there = {
        "PYTHONPATH": str(_OVERLAY),
        "SPARK_HOME": str(_OVERLAY / "pyspark"),
        "SPARK_LOCAL_IP": "127.0.0.1",
        "PYSPARK_PYTHON": sys.executable,
    }
    return run_to_end(command, os.environ | there, _COMMAND_S)
