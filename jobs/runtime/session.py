"""The Spark session of a job, wherever it was started: by spark-submit with its own settings, or by `slidelake`."""

import os
import re
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pyspark
from py4j.protocol import Py4JJavaError
from pyspark.sql import SparkSession

from jobs.runtime.config import ConfigError
from jobs.runtime.streams import is_submitted

_DELTA_CLASS = "io.delta.sql.DeltaSparkSessionExtension"
DELTA_COORDINATES = f"io.delta:delta-spark_2.13:{version('delta-spark')}"
_PACKAGED_CONF = Path(__file__).parent / "conf"  # conf/spark/local.conf and conf/log4j2.properties, in a wheel
_LOCAL_TASK_FAILURES = 4  # what clusters have; Spark's local mode would end the run at the first death of a worker


def start_session(name: str) -> SparkSession:
    """The session, with Delta.

    Raises:
        ConfigError: Delta's jar is not there.
    """
    session = open_session(name)
    if not has_delta(session):
        session.stop()
        raise ConfigError(f"Delta is not on Spark's class path: add --packages {DELTA_COORDINATES} to spark-submit")
    return session


def open_session(name: str) -> SparkSession:
    """The session, whether Delta is there or not."""
    submitted = is_submitted()  # then there is a JVM already
    builder = SparkSession.Builder().appName(name)
    if not submitted:
        if _PACKAGED_CONF.is_dir():
            os.environ.setdefault("SPARK_CONF_DIR", str(_PACKAGED_CONF))
        if not list(Path(pyspark.__file__).parent.glob("jars/delta-spark_*.jar")):
            builder = builder.config("spark.jars.packages", DELTA_COORDINATES)
    master = _master(submitted)
    if master.startswith("local"):
        os.environ.setdefault("PYSPARK_PYTHON", sys.executable)
        builder = builder.master(master)
    session: SparkSession = (
        builder.config("spark.sql.extensions", _DELTA_CLASS)
        .config("spark.sql.catalog.spark_catalog", "org.apache.spark.sql.delta.catalog.DeltaCatalog")
        .config("spark.sql.session.timeZone", "UTC")
        .getOrCreate()
    )
    return session


def has_delta(session: SparkSession) -> bool:
    """Whether Delta's jar is on the driver's class path."""
    jvm: Any = session._jvm
    try:
        jvm.java.lang.Thread.currentThread().getContextClassLoader().loadClass(_DELTA_CLASS)
    except Py4JJavaError:
        return False
    return True


def is_local(session: SparkSession) -> bool:
    """Whether tasks run in the driver's own process; those of local-cluster do not."""
    return (session.sparkContext.master or "local").partition("[")[0] == "local"


def heap_bytes(session: SparkSession) -> int:
    """The heap of a JVM that tasks run in: an executor's, or the driver's own where all runs in one process."""
    jvm: Any = session._jvm
    if is_local(session):
        return int(jvm.java.lang.Runtime.getRuntime().maxMemory())
    configured = session.conf.get("spark.executor.memory", "1g")
    return int(jvm.org.apache.spark.network.util.JavaUtils.byteStringAsBytes(configured))


def slots(session: SparkSession) -> int:
    """How many tasks run at once."""
    return max(1, session.sparkContext.defaultParallelism)


def with_retries(master: str) -> str:
    """A bare local master with the retries of a cluster: ``local[2]`` as ``local[2,4]``; any other as it is."""
    match = re.fullmatch(r"local(?:\[([^\],]+)\])?", master)
    return f"local[{match[1] or 1},{_LOCAL_TASK_FAILURES}]" if match else master


def _master(submitted: bool) -> str:
    """Where to run: as spark-submit or the environment says, else all cores of this machine; with retries if local."""
    if submitted:
        pyspark.SparkContext._ensure_initialized()  # SparkConf() asks the JVM only then
    return with_retries(pyspark.SparkConf().get("spark.master", None) or os.environ.get("MASTER") or "local[*]")
