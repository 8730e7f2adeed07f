"""What only Spark's JVM can tell or do: PySpark has no public call for any of it, and no other module reaches into the JVM."""

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
    """The JVM that started this process, reached as PySpark reaches it; before there is a session."""
    launch: Any = launch_gateway
    return launch().jvm


class StderrOfSparkSubmit:
    """The stderr of spark-submit, which sends Python's own stderr to stdout.

    The JVM writes: another handle on the file behind it would write over what the JVM writes.
    """

    def write(self, text: str) -> None:
        """Write a text as UTF-8."""
        data = text.encode("utf-8", "backslashreplace")
        try:
            stream: Any = jvm_of_spark_submit().java.lang.System.err
            stream.write(data, 0, len(data))
            stream.flush()
        except Exception:  # the JVM has ended: better in stdout than nowhere
            os.write(_STDERR, data)


def spark_submit_has_a_terminal() -> bool:
    """Whether somebody sits before spark-submit."""
    with suppress(Py4JError):  # a platform whose JVM takes no such calls
        return jvm_of_spark_submit().java.lang.System.console() is not None
    return False


def master_of_spark_submit() -> str:
    """Where spark-submit was told to run; PySpark's SparkConf knows it only once there is a session."""
    return str(jvm_of_spark_submit().org.apache.spark.SparkConf().get("spark.master", ""))


def pass_signals_on(jvm: Any) -> None:
    """Let the JVM send the signals that it gets to this process, instead of ending by them before the run is recorded.

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


def jvm_of(session: SparkSession) -> Any:
    """The JVM of the driver."""
    return session._jvm


def call_static(session: SparkSession, name: str, method: str, *texts: str) -> str:
    """What a static Java method of texts returns on the driver; on executors, SQL's java_method calls it.

    Raises:
        Py4JJavaError: there is no such class, also among the jars of --packages.
    """
    jvm, context = jvm_of(session), session.sparkContext
    gateway: Any = context._gateway
    arguments = gateway.new_array(jvm.java.lang.Object, len(texts))
    for i, text in enumerate(texts):
        arguments[i] = text
    return str(jvm.java.beans.Expression(_load_class(session, name), method, arguments).getValue())


def has_class(session: SparkSession, name: str) -> bool:
    """Whether the driver has a class, also among the jars of --packages."""
    with suppress(Py4JError):
        return _load_class(session, name) is not None
    return False


def hadoop_path(session: SparkSession, uri: str) -> tuple[Any, Any]:
    """Hadoop's file system of a URI, as the driver opens it for Spark, and the path in it; PySpark lists and deletes nothing."""
    context: Any = session.sparkContext
    path = jvm_of(session).org.apache.hadoop.fs.Path(uri)
    return path.getFileSystem(context._jsc.hadoopConfiguration()), path


def executor_summaries(session: SparkSession) -> list[Any]:
    """What Spark knows of each executor, with those that ended; its REST API has the same, but is off with the UI."""
    context: Any = session.sparkContext
    summaries = context._jsc.sc().statusStore().executorList(False)
    rows = (summaries.apply(i) for i in range(summaries.size()))
    return [row for row in rows if row.id() != "driver"]


def _load_class(session: SparkSession, name: str) -> Any:
    return jvm_of(session).java.lang.Thread.currentThread().getContextClassLoader().loadClass(name)
