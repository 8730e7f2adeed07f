"""Signals while Spark is at work: it ends soon, whatever the driver waits for, and Spark works on afterwards."""

import os
import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from operator import methodcaller
from typing import Any

import pandas as pd
import pytest
from pyspark.sql import DataFrame, SparkSession

from jobs.runtime.spark.cancelling import Cancelling
from jobs.runtime.spark.signals import Stopped, stop_signals

WORK_S = 60.0


def long_work(spark: SparkSession) -> DataFrame:
    def work(batches: Iterable[pd.DataFrame]) -> Iterator[pd.DataFrame]:
        time.sleep(WORK_S)
        yield from batches

    return spark.range(1, numPartitions=1).mapInPandas(work, "id bigint")


@pytest.fixture
def handlers() -> Iterator[None]:
    """Those of pytest, back again: after a stop, slidelake keeps them until the process ends."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.usefixtures("handlers")
@pytest.mark.parametrize(
    ("sent", "name", "wait"),
    [
        ([signal.SIGINT], "Ctrl-C", methodcaller("collect")),
        ([signal.SIGINT] * 3, "Ctrl-C", methodcaller("toPandas")),
        ([signal.SIGTERM, signal.SIGTERM], "SIGTERM", methodcaller("count")),
        ([signal.SIGHUP, signal.SIGTERM], "SIGHUP", methodcaller("toPandas")),
    ],
    ids=lambda value: "",
)
def test_what_spark_is_at_is_cancelled(
    spark: SparkSession,
    sent: list[signal.Signals],
    name: str,
    wait: Callable[[DataFrame], object],
    caplog: pytest.LogCaptureFixture,
) -> None:
    tracker, ended = spark.sparkContext.statusTracker(), threading.Event()

    def send_when_it_works() -> None:
        while not ended.wait(0.05):
            if tracker.getActiveJobsIds():
                for number in sent:
                    os.kill(os.getpid(), number)
                    time.sleep(0.05)
                return

    sender = threading.Thread(target=send_when_it_works)
    began = time.monotonic()
    try:
        with pytest.raises(Stopped, match=f"^{name}$"), stop_signals(), Cancelling(spark):
            sender.start()
            wait(long_work(spark))
    finally:
        ended.set()
        sender.join()
    assert time.monotonic() - began < WORK_S / 2
    said = caplog.text
    assert f"slidelake: {name}: Spark's work is cancelled" in said
    assert said.count("still ending") == sent.count(signal.SIGINT) - (name == "Ctrl-C")
    assert spark.range(3).count() == 3


@pytest.mark.usefixtures("handlers")
def test_what_does_not_wait_for_spark_ends_some_seconds_later(spark: SparkSession) -> None:
    began = time.monotonic()
    with pytest.raises(Stopped, match="SIGTERM"), stop_signals(), Cancelling(spark):
        threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGTERM)).start()
        time.sleep(WORK_S)
    assert time.monotonic() - began < WORK_S / 2
    assert spark.range(3).count() == 3


@pytest.mark.usefixtures("handlers")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_signal_to_the_jvm_reaches_python_and_the_jvm_lives(spark: SparkSession, number: signal.Signals) -> None:
    jvm: Any = spark._jvm
    pid = jvm.java.lang.ProcessHandle.current().pid()
    with pytest.raises(Stopped, match=number.name), stop_signals(), Cancelling(spark):
        os.kill(pid, number)
        time.sleep(WORK_S)
    assert spark.range(3).count() == 3
