"""Checks of what is installed: executors, Java, Spark, Delta, Python, packages, slidelake's own code."""

import sys
from collections.abc import Iterable

from py4j.protocol import Py4JJavaError
from pyspark.sql import functions as F

from jobs.checks.place import TASKS_AN_EXECUTOR, ExecutorError, Place, telling_line
from jobs.checks.table import INSTALL, Row
from jobs.runtime.spark.resources import executors_of
from jobs.runtime.spark.session import DELTA_PACKAGE, call_static, delta_remedy, has_delta, refuse_unusable_spark
from udfs.node_facts import code_digest
from udfs.wording import package_versions, some


def executors(place: Place) -> Row:
    """Whether there are any, and what they offer."""
    place.spark.range(1).count()  # Spark waits here until one has come
    place.executors = [] if place.is_local else executors_of(place.spark)
    at_once = place.stage.slots()
    if place.is_local:
        return Row("ok", f"Spark runs on this machine alone, {at_once} tasks at once")
    cores = sorted({executor.cores for executor in place.executors})
    return Row(
        "ok", f"{len(place.executors)} of {some([str(n) for n in cores])} cores, {at_once} tasks of features at once"
    )


def java(place: Place) -> Row:
    """The same Java everywhere; on one that is too old, Spark 4 does not start."""
    here = call_static(place.spark, "java.lang.System", "getProperty", "java.version")
    there = _on_executors(place, "java.lang.System", "getProperty", "'java.version'")
    if there != {here}:
        return Row("warn", _differ(here, there), "give all nodes one Java, 17 or later")
    return Row("ok", _same(here))


def spark(place: Place) -> Row:
    """The same Spark everywhere, and one that the jobs can use."""
    here, there = place.spark.version, _on_executors(place, "org.apache.spark.package", "SPARK_VERSION")
    if there != {here}:
        return Row("FAIL", _differ(here, there), "submit with the Spark that the cluster runs")
    refuse_unusable_spark()  # by a ConfigError, which has the remedy
    return Row("ok", _same(here))


def delta(place: Place) -> Row:
    """Delta's jar, the same everywhere."""
    remedy = delta_remedy(place.spark.version)
    if not has_delta(place.spark):
        return Row("FAIL", "not on Spark's class path", remedy)
    remedy += ", which sends it to all executors"
    try:
        here = call_static(place.spark, DELTA_PACKAGE, "VERSION")
        there = _on_executors(place, DELTA_PACKAGE, "VERSION")
    except Exception as error:
        return Row("FAIL", f"on the driver, not on executors ({telling_line(error)})", remedy)
    return Row("ok", _same(here)) if there == {here} else Row("FAIL", _differ(here, there), remedy)


def python(place: Place) -> Row:
    """A Python of the driver's version on every executor."""
    here = ".".join(str(part) for part in sys.version_info[:3])
    what = place.spark.sparkContext.pythonExec
    setting = "spark.pyspark.python" if place.conf("spark.pyspark.python") == what else "PYSPARK_PYTHON"
    remedy = f"point {setting} (now {what}) at Python {here} on every node, or ship an environment by --archives"
    if place.unprobed:
        return Row("FAIL", f"does not run on executors: {some(place.unprobed, 3, '; ')}", remedy)
    wrong = [(one.host, one.python) for one in place.probes if one.python != here]
    if wrong:
        found = some([f"{version} on {host}" for host, version in wrong], 3)
        of = f"{len(wrong)} of {len(place.probes)} executors"
        return Row("FAIL", f"{of} have another than the driver's {here}: {found}", remedy)
    return Row("ok", f"{_same(here)} ({len(place.probes)} of {place.n_executors} looked at)")


def packages(place: Place) -> Row:
    """The driver's packages on every executor, in the driver's versions."""
    here = package_versions(place.packages)
    other = {
        f"{name} {there} on {one.host} (driver {here.get(name, 'none')})"
        for one in place.probes
        for name, there in one.packages.items()
        if there not in (None, here.get(name))
    }
    kinds = (("missing", place.lacking(place.packages)), ("other versions", sorted(other)))
    wrong = [f"{what}: {some(names)}" for what, names in kinds if names]
    if wrong:
        return Row("FAIL", "; ".join(wrong), INSTALL)
    lacking = [name for name in place.packages if name not in here]
    if lacking:
        return Row(
            "FAIL", f"missing on the driver: {some(lacking)}", "pip install slidelake with its extras on the driver"
        )
    return Row(
        "ok",
        f"{len(here) - 1} that matter, the same on driver and executors: torch {here['torch']}, pyarrow {here['pyarrow']}",
    )


def code(place: Place) -> Row:
    """The driver's own code on the executors."""
    here = code_digest()
    remedy = "ship the code with the job (--py-files), or install the same slidelake on every node"
    try:
        there = set(place.ask(*[code_digest] * (TASKS_AN_EXECUTOR * place.n_executors)))
    except (ExecutorError, Py4JJavaError) as error:
        return Row("FAIL", f"slidelake does not import on executors ({telling_line(error)})", remedy)
    if there != {here}:
        return Row("FAIL", "executors have another slidelake than the driver", remedy)
    return Row("ok", f"the same slidelake on driver and executors ({here[:8]})")


def _on_executors(place: Place, name: str, method: str, *arguments: str) -> set[str]:
    """What a static method gives in the JVMs of executors."""
    call = F.expr(f"java_method({', '.join([repr(name), repr(method), *arguments])})").alias("value")
    n = TASKS_AN_EXECUTOR * place.n_executors
    return {str(row.value) for row in place.spark.range(0, n, numPartitions=n).select(call).collect()}


def _same(version: str) -> str:
    return f"{version} on driver and executors"


def _differ(here: str, there: Iterable[str]) -> str:
    return f"{here} on the driver, {', '.join(sorted(there))} on executors"
