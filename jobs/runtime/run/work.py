"""What workers tell of their work, summed: for table runs, and for Spark's UI."""

from dataclasses import astuple, dataclass
from typing import Any

from py4j.protocol import Py4JError
from pyspark.errors import PySparkException
from pyspark.sql import Column, DataFrame, SparkSession
from pyspark.sql import functions as F


@dataclass(frozen=True)
class Work:
    """As `udfs.schemas.WORK`."""

    requests: int = 0
    bytes: int = 0
    waited_s: float = 0.0
    decoded_s: float = 0.0
    encoded_s: float = 0.0

    def __add__(self, other: "Work") -> "Work":
        return Work(*(mine + its for mine, its in zip(astuple(self), astuple(other), strict=True)))


class NoAccumulatorsError(Exception):
    """This Spark has not what they are fed by, or refuses it."""


def try_accumulators(spark: SparkSession) -> None:
    """Add to one, which has no name and so is not shown: an engine may refuse only when it is to compute.

    Raises:
        NoAccumulatorsError: `in_accumulators` is not to be used here.
    """
    one = spark.range(1)
    try:
        one.select(_added(one, None, F.lit(1).cast("bigint"))).collect()
    except (TypeError, Py4JError, PySparkException) as error:
        raise NoAccumulatorsError(str(error).partition("\n")[0]) from None


def in_accumulators(rows: DataFrame) -> DataFrame:
    """The rows, whose columns n_tiles and work are added up in accumulators of Spark's while they are computed; persist them.

    The UI and the history server show these with the stage that computed the rows, and the event log has them. What a task
    that died had told is not in them; rows that are computed again, for their executor is gone, count twice.

    Args:
        rows: with n_tiles and `udfs.schemas.WORK`, both null where there is nothing to tell; of a Spark that `try_accumulators`
            found fit.
    """
    sums = {
        "tiles": F.col("n_tiles"),
        "requests": F.col("work.requests"),
        "bytes read": F.col("work.bytes"),
        "waiting for bytes, ms": 1000 * F.col("work.waited_s"),
        "decoding, ms": 1000 * F.col("work.decoded_s"),
        "encoding, ms": 1000 * F.col("work.encoded_s"),
    }
    # What is never more than zero, such as the encoding of stage slides, is not shown.
    whole = {name: F.nullif(F.round(column).cast("bigint"), F.lit(0)) for name, column in sums.items()}
    added = F.array(*(_added(rows, name, column) for name, column in whole.items()))
    # A condition that all rows meet: unlike a column, it copies no row, and rows of tiles are through before it is looked at.
    return rows.where(F.col("n_tiles").isNull() | (F.size(added) == len(whole)))


def _added(rows: DataFrame, name: str | None, column: Column) -> Column:
    """A boolean; to compute it adds the column, a bigint, to a new accumulator of that name, unless it is null.

    PySpark's accumulators have no names, and the UI shows none without. The JVM's have, but nothing in PySpark's API feeds them.
    Catalyst can: its expressions call methods of objects, as they do to fill the beans of Java's users.
    """
    jvm: Any = rows.sparkSession._jvm
    context: Any = rows.sparkSession.sparkContext._jsc
    catalyst = jvm.org.apache.spark.sql.catalyst.expressions
    bridge = jvm.org.apache.spark.sql.classic.ExpressionUtils
    accumulator = catalyst.Literal.fromObject(context.sc().longAccumulator(*([name] if name else [])))
    setters = jvm.PythonUtils.toScalaMap({"add": bridge.expression(column._jc)})
    fed = catalyst.objects.InitializeJavaBean(accumulator, setters)
    # What it gives back is of no interest; that it is not deterministic keeps the optimiser from moving or doubling it.
    none, boolean = jvm.PythonUtils.toSeq([]), jvm.org.apache.spark.sql.types.DataType.fromDDL("boolean")
    told = catalyst.objects.Invoke(fed, "isZero", boolean, none, none, True, True, False)
    return type(column)(bridge.column(told))
