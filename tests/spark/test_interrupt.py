"""Ctrl-C while Spark is at work: it ends soon, whatever the driver waits for, and Spark works on afterwards."""

import os
import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from operator import methodcaller

import pandas as pd
import pytest
from pyspark.sql import DataFrame, SparkSession

from jobs.runtime.interrupt import CtrlC

WORK_S = 60.0


def long_work(spark: SparkSession) -> DataFrame:
    def work(batches: Iterable[pd.DataFrame]) -> Iterator[pd.DataFrame]:
        time.sleep(WORK_S)
        yield from batches

    return spark.range(1, numPartitions=1).mapInPandas(work, "id bigint")


@pytest.mark.filterwarnings("ignore:toPandas attempted Arrow")
@pytest.mark.parametrize("wait", [methodcaller("collect"), methodcaller("toPandas")], ids=["collect", "toPandas"])
def test_what_spark_is_at_is_cancelled(
    spark: SparkSession, wait: Callable[[DataFrame], object], capsys: pytest.CaptureFixture[str]
) -> None:
    tracker, ended = spark.sparkContext.statusTracker(), threading.Event()

    def press_when_it_works() -> None:
        while not ended.wait(0.05):
            if tracker.getActiveJobsIds():
                os.kill(os.getpid(), signal.SIGINT)
                return

    presser = threading.Thread(target=press_when_it_works)
    before, began = signal.getsignal(signal.SIGINT), time.monotonic()
    try:
        with pytest.raises((Exception, KeyboardInterrupt)), CtrlC(spark) as ctrl_c:
            presser.start()
            wait(long_work(spark))
    finally:
        ended.set()
        presser.join()
        signal.signal(signal.SIGINT, before)
    assert ctrl_c.came and time.monotonic() - began < WORK_S / 2
    assert "slidelake: interrupted: Spark cancels what it works on" in capsys.readouterr().err
    assert spark.range(3).count() == 3
