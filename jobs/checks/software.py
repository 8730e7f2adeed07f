"""Checks of what is installed: executors, Java, Spark, Delta, Python, packages, slidelake's own code."""

import sys

from py4j.protocol import Py4JJavaError
from pyspark.sql import functions as F

from jobs.checks.place import TASKS_PER_EXECUTOR, ExecutorError, Place, telling_line
from jobs.checks.table import INSTALL, Row, Status
from jobs.runtime.spark.resources import executors_of
from jobs.runtime.spark.session import DELTA_PACKAGE, call_static, delta_remedy, has_delta, refuse_unusable_spark
from udfs.node_facts import code_digest
from udfs.wording import package_versions, some


def executors(place: Place) -> Row:
    """Says whether there are any, and what they offer."""
    place.spark.range(1).count()  # Spark waits here until one has started
    place.executors = [] if place.is_local else executors_of(place.spark)
    at_once = place.stage.slots()
    if place.is_local:
        return Row("ok", f"Spark runs on this machine alone, {at_once} tasks at once")
    cores = sorted({executor.cores for executor in place.executors})
    each = some([str(n) for n in cores])
    return Row("ok", f"{len(place.executors)} of {each} cores, {at_once} tasks of features at once")


def java(place: Place) -> Row:
    """Says whether Java is the same everywhere; on one that is too old, Spark 4 does not start."""
    here = call_static(place.spark, "java.lang.System", "getProperty", "java.version")
    there = _on_executors(place, "java.lang.System", "getProperty", "'java.version'")
    return _compared(here, there, "give all nodes one Java, 17 or later", "warn")


def spark(place: Place) -> Row:
    """Says whether Spark is the same everywhere, and one that the jobs can use."""
    there = _on_executors(place, "org.apache.spark.package", "SPARK_VERSION")
    row = _compared(place.spark.version, there, "submit with the Spark that the cluster runs")
    if row.status == "ok":
        refuse_unusable_spark()  # raises ConfigError with a remedy
    return row


def delta(place: Place) -> Row:
    """Says whether Delta's jar is the same everywhere."""
    remedy = delta_remedy(place.spark.version)
    if not has_delta(place.spark):
        return Row("FAIL", "not on Spark's class path", remedy)
    remedy += ", which sends it to all executors"
    try:
        here, there = call_static(place.spark, DELTA_PACKAGE, "VERSION"), _on_executors(place, DELTA_PACKAGE, "VERSION")
    except Exception as error:
        return Row("FAIL", f"on the driver, not on executors ({telling_line(error)})", remedy)
    return _compared(here, there, remedy)


def python(place: Place) -> Row:
    """Says whether every executor has a Python of the driver's version."""
    here = ".".join(str(part) for part in sys.version_info[:3])
    what = place.spark.sparkContext.pythonExec
    setting = "spark.pyspark.python" if place.conf("spark.pyspark.python") == what else "PYSPARK_PYTHON"
    remedy = f"point {setting} (now {what}) at Python {here} on every node, or ship an environment by --archives"
    if place.unprobed:
        return Row("FAIL", f"does not run on executors: {some(place.unprobed, 3, '; ')}", remedy)
    if wrong := [f"{one.python} on {one.host}" for one in place.probes if one.python != here]:
        found = f"{len(wrong)} of {len(place.probes)} executors have another than the driver's {here}: {some(wrong, 3)}"
        return Row("FAIL", found, remedy)
    return Row("ok", f"{here} on driver and executors ({len(place.probes)} of {place.n_executors} looked at)")


def packages(place: Place) -> Row:
    """Says whether every executor has the driver's packages in the driver's versions."""
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
    if lacking := [name for name in place.packages if name not in here]:
        remedy = "pip install slidelake with its extras on the driver"
        return Row("FAIL", f"missing on the driver: {some(lacking)}", remedy)
    examples = f"torch {here['torch']}, pyarrow {here['pyarrow']}"
    return Row("ok", f"{len(here) - 1} that matter, the same on driver and executors: {examples}")


def code(place: Place) -> Row:
    """Says whether executors have the driver's own code."""
    here = code_digest()
    remedy = "ship the code with the job (--py-files), or install the same slidelake on every node"
    try:
        there = set(place.ask(*[code_digest] * (TASKS_PER_EXECUTOR * place.n_executors)))
    except (ExecutorError, Py4JJavaError) as error:
        return Row("FAIL", f"slidelake does not import on executors ({telling_line(error)})", remedy)
    if there != {here}:
        return Row("FAIL", "executors have another slidelake than the driver", remedy)
    return Row("ok", f"the same slidelake on driver and executors ({here[:8]})")


def _on_executors(place: Place, name: str, method: str, *arguments: str) -> set[str]:
    """Returns the results of a static method in the JVMs of executors."""
    call = F.expr(f"java_method({', '.join([repr(name), repr(method), *arguments])})").alias("value")
    n = TASKS_PER_EXECUTOR * place.n_executors
    return {str(row.value) for row in place.spark.range(0, n, numPartitions=n).select(call).collect()}


def _compared(here: str, there: set[str], remedy: str, otherwise: Status = "FAIL") -> Row:
    if there == {here}:
        return Row("ok", f"{here} on driver and executors")
    return Row(otherwise, f"{here} on the driver, {', '.join(sorted(there))} on executors", remedy)
