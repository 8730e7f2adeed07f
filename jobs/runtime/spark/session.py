"""The Spark session of a job, started by spark-submit with its settings or by `slidelake`."""

import os
import re
import signal
import sys
import threading
from pathlib import Path

import pyspark
from py4j.protocol import Py4JJavaError
from pyspark.errors import PySparkException
from pyspark.sql import SparkSession
from pyspark.sql import functions as F

from jobs.runtime.settings.config import ConfigError
from jobs.runtime.spark.delta_table import DeltaTable
from jobs.runtime.spark.jvm import jvm_of, jvm_of_spark_submit, master_of_spark_submit, pass_signals_on
from jobs.runtime.spark.streams import is_submitted

DELTA_PACKAGE = "io.delta.package"  # Scala's package object, which has the version
# Which Delta fits which Spark. It need not be what is installed: a platform brings its own.
_DELTA = {
    (4, 0): "io.delta:delta-spark_2.13:4.0.1",
    (4, 1): "io.delta:delta-spark_4.1_2.13:4.4.0",
    (4, 2): "io.delta:delta-spark_4.2_2.13:4.4.0",
}
_OLDEST_SPARK = (4, 0)
_PACKAGED_CONF = Path(__file__).parent / "conf"  # conf/spark/local.conf and conf/log4j2.properties, in a wheel
_LOCAL_TASK_FAILURES = 4  # as on clusters; Spark's local mode would end the run at the first death of a worker


def refuse_unusable_spark() -> None:
    """Raises ConfigError if the installed Spark lacks what the jobs use, or if Delta's Python side is missing."""
    found = pyspark.__version__
    if _release(found) < _OLDEST_SPARK:
        raise ConfigError(
            f"this is Spark {found}, and only since 4.0 can mapInArrow be given GPUs",
            "use Spark 4.0 or later, which EMR has from emr-spark-8.0.0 on and Databricks from 17.3 LTS on",
        )
    if DeltaTable is None:
        raise ConfigError("Delta's Python side is missing", f"{delta_remedy(found)}, or pip install 'slidelake[spark]'")


def start_session(name: str) -> SparkSession:
    """Returns the session, with Delta; raises ConfigError if Delta's jar is missing."""
    session = open_session(name)
    if not has_delta(session):
        remedy = delta_remedy(session.version)
        session.stop()
        raise ConfigError("Delta is not on Spark's class path", remedy)
    return session


def delta_remedy(spark_version: str) -> str:
    """Returns what gives that version of Spark its Delta, jar and Python side."""
    major, minor = release = _release(spark_version)
    unknown = f"io.delta:delta-spark_{major}.{minor}_2.13:VERSION (docs.delta.io/releases tells which fits)"
    return f"add --packages {_DELTA.get(release, unknown)} to spark-submit"


def open_session(name: str) -> SparkSession:
    """Returns the session, with Delta or without."""
    submitted = is_submitted()  # then there is a JVM already
    builder = SparkSession.Builder().appName(name)
    if not submitted:
        if _PACKAGED_CONF.is_dir():
            os.environ.setdefault("SPARK_CONF_DIR", str(_PACKAGED_CONF))
        coordinates = _DELTA.get(_release(pyspark.__version__))
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
        builder.config("spark.sql.extensions", "io.delta.sql.DeltaSparkSessionExtension")
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
    """Returns whether Spark finds Delta on the driver's class path."""
    try:
        session.read.format("delta").load()
    except (PySparkException, Py4JJavaError) as error:  # unknown format without Delta, missing path with Delta
        return "DATA_SOURCE_NOT_FOUND" not in str(error)
    return True


def call_static(session: SparkSession, name: str, method: str, *texts: str) -> str:
    """Returns what a static Java method of texts returns on the driver; raises AnalysisException if there is none.

    SQL's java_method calls it. Spark's optimiser evaluates an inline table on the driver, so no executor takes part.
    """
    call = F.java_method(*map(F.lit, (name, method, *texts)))
    return str(session.sql("VALUES (1)").select(call).collect()[0][0])


def is_local(session: SparkSession) -> bool:
    """Returns whether tasks run in the driver's own process; those of local-cluster do not."""
    return (session.sparkContext.master or "local").partition("[")[0] == "local"


def heap_bytes(session: SparkSession) -> int:
    """Returns the heap of a JVM that runs tasks: an executor's, or in local mode the driver's."""
    who = "driver" if is_local(session) else "executor"
    return size_of(session.sparkContext.getConf().get(f"spark.{who}.memory", "1g") or "1g")


def size_of(text: str, unit: str = "b") -> int:
    """Returns a size of Spark's settings in bytes: ``1g`` or ``512m``; a bare number counts in `unit`."""
    match = re.fullmatch(r"(\d+)([bkmgtp]?)b?", text.strip().lower())
    if not match:
        raise ConfigError(f"{text!r} is no size of memory", "write it as Spark does, for example 4g or 512m")
    return int(match[1]) << 10 * "bkmgtp".index(match[2] or unit)


def slots(session: SparkSession) -> int:
    """Returns how many tasks run at once."""
    return max(1, session.sparkContext.defaultParallelism)


def with_retries(master: str) -> str:
    """Returns a bare local master with the retries of a cluster: ``local[2]`` as ``local[2,4]``; any other as it is."""
    match = re.fullmatch(r"local(?:\[([^\],]+)\])?", master)
    return f"local[{match[1] or 1},{_LOCAL_TASK_FAILURES}]" if match else master


def _release(version: str) -> tuple[int, int]:
    """Returns major and minor of a version, whatever a platform appends: ``4.0.2-amzn-0`` is (4, 0)."""
    major, minor = version.split(".")[:2]
    return int(major), int(minor)


def _master(submitted: bool) -> str:
    """Returns the master of spark-submit or the environment, else all cores of this machine; with retries if local."""
    given = master_of_spark_submit() if submitted else ""
    return with_retries(
        given or pyspark.SparkConf().get("spark.master", None) or os.environ.get("MASTER") or "local[*]"
    )
