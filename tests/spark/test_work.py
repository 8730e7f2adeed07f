"""What workers tell of their work, as Spark's UI shows it."""

from collections.abc import Callable, Iterable, Iterator
from types import SimpleNamespace
from typing import Any

import pandas as pd
import pytest
from pyspark import TaskContext
from pyspark.sql import DataFrame, SparkSession
from pyspark.sql import functions as F

from jobs.runtime.run.run import Run
from jobs.runtime.settings.config import Config
from udfs.schemas import WORK

WORK_OF_A_UNIT = {"requests": 2, "bytes": 1 << 33, "waited_s": 0.0, "decoded_s": 0.25, "encoded_s": 1.5}
assert [field.name for field in WORK] == list(WORK_OF_A_UNIT)


def two_tasks(spark: SparkSession, attempts: int = 1) -> DataFrame:
    """In each a tile, which tells nothing, and a unit; all attempts but the last die when they have told."""

    def tell(batches: Iterable[pd.DataFrame]) -> Iterator[pd.DataFrame]:
        for _ in batches:
            yield pd.DataFrame({"n_tiles": [None, 3], "work": [None, WORK_OF_A_UNIT]}, dtype=object)
            context = TaskContext.get()
            if context and context.attemptNumber() < attempts - 1:
                raise RuntimeError("this attempt is to die")

    work = "struct<requests bigint, bytes bigint, waited_s double, decoded_s double, encoded_s double>"
    return spark.range(2, numPartitions=2).mapInPandas(tell, f"n_tiles int, work {work}")


def shown(spark: SparkSession, group: str) -> dict[str, int]:
    """The accumulators that Spark's UI shows with the stages of a job group, by name."""
    context: Any = spark.sparkContext._jsc.sc()
    context.listenerBus().waitUntilEmpty()
    tracker = spark.sparkContext.statusTracker()
    jobs = [tracker.getJobInfo(job) for job in tracker.getJobIdsForGroup(group)]
    found: dict[str, int] = {}
    for stage in [stage for job in jobs if job for stage in job.stageIds]:
        updates = context.statusStore().lastStageAttempt(stage).accumulatorUpdates()
        for one in (updates.apply(i) for i in range(updates.size())):
            assert one.name() not in found
            found[one.name()] = int(one.value())
    return found


class WithoutCatalyst:
    """A JVM with all classes but these."""

    def __init__(self, jvm: Any) -> None:
        self._jvm = jvm
        self.org = SimpleNamespace(apache=SimpleNamespace(spark=jvm.org.apache.spark.gone))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._jvm, name)


@pytest.fixture
def run(spark: SparkSession, small_config: Callable[..., Config]) -> Iterator[Run]:
    """One whose jobs are of a group of its own."""
    run = Run(small_config(), spark, "features")
    spark.sparkContext.setJobGroup(run.run_id, "tests")
    yield run
    spark.sparkContext.setJobGroup("", "tests")


def test_sums_are_those_of_attempts_that_lived(run: Run) -> None:
    rows = run.show_work(two_tasks(run.spark, attempts=2)).collect()
    assert [row.n_tiles for row in rows] == [None, 3] * 2
    assert shown(run.spark, run.run_id) == {
        "tiles": 6,
        "requests": 4,
        "bytes read": 1 << 34,
        "decoding, ms": 500,
        "encoding, ms": 3000,
    }, "and nothing of what nobody did: to wait for bytes"


def test_a_spark_that_is_built_otherwise_shows_none_and_says_so_once(
    run: Run, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = two_tasks(run.spark)
    with monkeypatch.context() as patch:
        patch.setattr(run.spark, "_jvm", WithoutCatalyst(run.spark._jvm))
        assert run.show_work(rows) is rows and run.show_work(rows) is rows
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "table runs, column work" in said
    assert len(rows.collect()) == 4
    assert shown(run.spark, run.run_id) == {}


def test_an_engine_that_refuses_only_when_it_computes_shows_none_and_the_rows_are_there(
    run: Run, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(
        "jobs.runtime.run.work._added", lambda rows, name, column: F.raise_error(F.lit("not in this engine"))
    )
    assert len(run.show_work(two_tasks(run.spark)).collect()) == 4
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "not in this engine" in said and "table runs, column work" in said
