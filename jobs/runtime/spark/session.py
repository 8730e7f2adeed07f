"""The Spark session of a job, wherever it was started: by spark-submit with its own settings, or by `slidelake`."""

import os
import re
import signal
import sys
import threading
from pathlib import Path

import pyspark
from pyspark.sql import SparkSession

from jobs.runtime.settings.config import ConfigError
from jobs.runtime.spark.delta_table import DeltaTable
from jobs.runtime.spark.jvm import has_class, jvm_of, jvm_of_spark_submit, master_of_spark_submit, pass_signals_on
from jobs.runtime.spark.streams import is_submitted

_DELTA_CLASS = "io.delta.sql.DeltaSparkSessionExtension"
DELTA_PACKAGE = "io.delta.package"  # Scala's package object, which has the version
# Which Delta fits which Spark; whatever is installed, for on a platform that is the platform's.
_DELTA = {
    (4, 0): "io.delta:delta-spark_2.13:4.0.1",
    (4, 1): "io.delta:delta-spark_4.1_2.13:4.4.0",
    (4, 2): "io.delta:delta-spark_4.2_2.13:4.4.0",
}
_OLDEST_SPARK = (4, 0)
_PACKAGED_CONF = Path(__file__).parent / "conf"  # conf/spark/local.conf and conf/log4j2.properties, in a wheel
_LOCAL_TASK_FAILURES = 4  # what clusters have; Spark's local mode would end the run at the first death of a worker


def refuse_unusable_spark() -> None:
    """Look at the Spark that there is, before it starts.

    Raises:
        ConfigError: it lacks what the jobs use, or Delta's Python side is missing.
    """
    found = pyspark.__version__
    if _release(found) < _OLDEST_SPARK:
        raise ConfigError(
            f"this is Spark {found}, and only since 4.0 can mapInArrow be given GPUs",
            "use Spark 4.0 or later, which EMR has from emr-spark-8.0.0 on and Databricks from 17.3 LTS on",
        )
    if DeltaTable is None:
        raise ConfigError("Delta's Python side is missing", f"{delta_remedy(found)}, or pip install 'slidelake[spark]'")


def start_session(name: str) -> SparkSession:
    """The session, with Delta.

    Raises:
        ConfigError: Delta's jar is not there.
    """
    session = open_session(name)
    if not has_delta(session):
        remedy = delta_remedy(session.version)
        session.stop()
        raise ConfigError("Delta is not on Spark's class path", remedy)
    return session


def delta_remedy(spark_version: str) -> str:
    """What gives that version of Spark its Delta, jar and Python side."""
    major, minor = _release(spark_version)
    unknown = f"io.delta:delta-spark_{major}.{minor}_2.13:VERSION (docs.delta.io/releases tells which fits)"
    return f"add --packages {_delta_for(spark_version) or unknown} to spark-submit"


def open_session(name: str) -> SparkSession:
    """The session, whether Delta is there or not."""
    submitted = is_submitted()  # then there is a JVM already
    builder = SparkSession.Builder().appName(name)
    if not submitted:
        if _PACKAGED_CONF.is_dir():
            os.environ.setdefault("SPARK_CONF_DIR", str(_PACKAGED_CONF))
        coordinates = _delta_for(pyspark.__version__)
        if coordinates and not list(Path(pyspark.__file__).parent.glob("jars/delta-spark_*.jar")):
            builder = builder.config("spark.jars.packages", coordinates)
    master = _master(submitted)
    if master.startswith("local"):
        os.environ.setdefault("PYSPARK_PYTHON", sys.executable)
        builder = builder.master(master)
    if submitted:  # at once, since the start takes long
        pass_signals_on(jvm_of_spark_submit())
    of_ctrl_c = signal.getsignal(signal.SIGINT)
    session: SparkSession = (
        builder.config("spark.sql.extensions", _DELTA_CLASS)
        .config("spark.sql.catalog.spark_catalog", "org.apache.spark.sql.delta.catalog.DeltaCatalog")
        .config("spark.sql.session.timeZone", "UTC")
        # So that SQL means what it says, whatever stands in a path: ${...} is no variable, and a backslash escapes.
        .config("spark.sql.variable.substitute", "false")
        .config("spark.sql.parser.escapedStringLiterals", "false")
        .getOrCreate()
    )
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGINT, of_ctrl_c)  # PySpark takes it for itself
    pass_signals_on(jvm_of(session))
    return session


def has_delta(session: SparkSession) -> bool:
    """Whether Delta's jar is on the driver's class path."""
    return has_class(session, _DELTA_CLASS)


def is_local(session: SparkSession) -> bool:
    """Whether tasks run in the driver's own process; those of local-cluster do not."""
    return (session.sparkContext.master or "local").partition("[")[0] == "local"


def heap_bytes(session: SparkSession) -> int:
    """The heap of a JVM that tasks run in: an executor's, or the driver's own where all runs in one process."""
    who = "driver" if is_local(session) else "executor"
    return size_of(session.sparkContext.getConf().get(f"spark.{who}.memory", "1g") or "1g")


def size_of(text: str, unit: str = "b") -> int:
    """A size as Spark's settings have it, in bytes: ``1g`` or ``512m``; a bare number counts in `unit`."""
    match = re.fullmatch(r"(\d+)([bkmgtp]?)b?", text.strip().lower())
    if not match:
        raise ConfigError(f"{text!r} is no size of memory", "write it as Spark does, for example 4g or 512m")
    return int(match[1]) << 10 * "bkmgtp".index(match[2] or unit)


def slots(session: SparkSession) -> int:
    """How many tasks run at once."""
    return max(1, session.sparkContext.defaultParallelism)


def with_retries(master: str) -> str:
    """A bare local master with the retries of a cluster: ``local[2]`` as ``local[2,4]``; any other as it is."""
    match = re.fullmatch(r"local(?:\[([^\],]+)\])?", master)
    return f"local[{match[1] or 1},{_LOCAL_TASK_FAILURES}]" if match else master


def _delta_for(spark_version: str) -> str | None:
    """Coordinates of the Delta that fits, None where none was known when this was written."""
    return _DELTA.get(_release(spark_version))


def _release(version: str) -> tuple[int, int]:
    """Major and minor of a version, whatever a platform puts behind: ``4.0.2-amzn-0`` is (4, 0)."""
    major, minor = version.split(".")[:2]
    return int(major), int(minor)


def _master(submitted: bool) -> str:
    """Where to run: as spark-submit or the environment says, else all cores of this machine; with retries if local."""
    given = master_of_spark_submit() if submitted else ""
    return with_retries(
        given or pyspark.SparkConf().get("spark.master", None) or os.environ.get("MASTER") or "local[*]"
    )
