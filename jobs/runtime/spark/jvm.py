"""What only Spark's JVM can do: the one module that reaches into it.

PySpark, Python and fsspec have no public means for these:

- Signals: the JVM of spark-submit on YARN and Kubernetes gets SIGTERM instead of Python, and would end by it before the run is
  recorded. Python's `signal` module sees only Python's own signals, and Java's public shutdown hooks run when Spark is
  already stopping.
- Before there is a session: the stderr, the terminal and the master of spark-submit. Python's own stderr is a pipe to
  spark-submit's stdout, and PySpark's SparkConf is empty until a session exists.
- Hadoop paths: whether the driver can write to a store is a matter of Hadoop's connectors and credentials. fsspec has
  others, and PySpark creates and deletes no single file.
- The list of executors: PySpark's StatusTracker has jobs and stages only. Spark's REST API has executors, but not if the UI is
  off or, on YARN, behind the proxy of the ResourceManager.
"""

import os
from contextlib import suppress
from functools import cache
from typing import Any

from py4j.protocol import Py4JError
from pyspark.java_gateway import launch_gateway
from pyspark.sql import SparkSession

_STDERR = 2


@cache
def jvm_of_spark_submit() -> Any:
    """Returns the JVM that started this process; needs no session."""
    launch: Any = launch_gateway
    return launch().jvm


def jvm_of(session: SparkSession) -> Any:
    """Returns the JVM of the driver."""
    return session._jvm


class StderrOfSparkSubmit:
    """The stderr of spark-submit, which sends Python's own stderr to stdout.

    The JVM writes: another handle on the file behind it would write over what the JVM writes.
    """

    def write(self, text: str) -> None:
        """Writes a text as UTF-8."""
        data = text.encode("utf-8", "backslashreplace")
        try:
            stream: Any = jvm_of_spark_submit().java.lang.System.err
            stream.write(data, 0, len(data))
            stream.flush()
        except Exception:  # the JVM has ended: better in stdout than nowhere
            os.write(_STDERR, data)


def spark_submit_has_a_terminal() -> bool:
    """Returns whether spark-submit runs on a terminal."""
    with suppress(Py4JError):  # a platform whose JVM takes no such calls
        return jvm_of_spark_submit().java.lang.System.console() is not None
    return False


def master_of_spark_submit() -> str:
    """Returns the master that spark-submit was given; empty if none."""
    return str(jvm_of_spark_submit().org.apache.spark.SparkConf().get("spark.master", ""))


def pass_signals_on(jvm: Any) -> None:
    """Lets a JVM send the signals that it gets to this process, instead of ending by them before the run is recorded.

    The JVM gets a signal instead of Python if it is Python's parent (spark-submit on YARN and Kubernetes), or as well if both are
    in one process group. Java has no other interface for signals than sun.misc.Signal, which the module jdk.unsupported exports.
    A signal that was ignored when the JVM started stays ignored. A terminal sends Ctrl-C to Python too, so the JVM passes Ctrl-C
    on as SIGTERM, which does not count as pressed twice.
    """
    with suppress(Py4JError):  # a platform whose JVM takes no such calls
        interface = jvm.java.lang.Class.forName("sun.misc.SignalHandler")
        for name, sent in (("INT", "TERM"), ("TERM", "TERM"), ("HUP", "HUP")):
            words = jvm.java.util.ArrayList()
            for word in ("sh", "-c", f"kill -{sent} {os.getpid()}"):
                words.add(word)
            send = jvm.java.beans.EventHandler.create(interface, jvm.java.lang.ProcessBuilder(words), "start")
            jvm.sun.misc.Signal.handle(jvm.sun.misc.Signal(name), send)


def hadoop_path(session: SparkSession, uri: str) -> tuple[Any, Any]:
    """Returns Hadoop's file system of a URI, as the driver opens it for Spark, and the path in it."""
    context: Any = session.sparkContext
    path = jvm_of(session).org.apache.hadoop.fs.Path(uri)
    return path.getFileSystem(context._jsc.hadoopConfiguration()), path


def executor_summaries(session: SparkSession) -> list[Any]:
    """Returns Spark's ExecutorSummary of each executor that runs or ended."""
    context: Any = session.sparkContext
    summaries = context._jsc.sc().statusStore().executorList(False)
    rows = (summaries.apply(i) for i in range(summaries.size()))
    return [row for row in rows if row.id() != "driver"]
