"""A slide whose tasks died while executors went, in job features: it is taken up again, for it need not be at fault."""

import os
import signal
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from pyspark import TaskContext
from pyspark.sql import SparkSession

from jobs import features, slides
from jobs.runtime.run.run import Run
from jobs.runtime.run.waves import work_in_waves
from jobs.runtime.settings.config import Config
from tests.conftest import SMALL_COHORT
from tests.faults.frames import frame
from udfs.encode_tiles import encode_tiles
from udfs.failures import DEATHS_BEFORE_QUARANTINE

Encode = Callable[[Iterable[pa.RecordBatch]], Iterable[pa.RecordBatch]]


def deadly(encode: Encode) -> Encode:
    """The same, but that its worker is killed each time until the slide is given up."""

    def run(batches: Iterable[pa.RecordBatch]) -> Iterable[pa.RecordBatch]:
        context = TaskContext.get()
        if context and context.attemptNumber() < DEATHS_BEFORE_QUARANTINE:
            os.kill(os.getpid(), signal.SIGKILL)
        return encode(batches)

    return run


def test_a_slide_given_up_by_the_features_job_is_taken_up_again_where_executors_went(
    spark: SparkSession, small_config: Callable[..., Config], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = small_config(SMALL_COHORT[:1], tiling={"max_background": 0.8})
    work_in_waves(Run(config, spark, slides.JOB), retry_failed=False)
    made: list[Encode] = []

    def make(*arguments: Any, **options: Any) -> Encode:
        made.append(encode_tiles(*arguments, **options))
        return made[0] if made[1:] else deadly(made[0])

    monkeypatch.setattr(features, "encode_tiles", make)
    monkeypatch.setattr("jobs.runtime.run.waves.executors_gone", lambda _: {"7"} if made else set())
    work_in_waves(Run(config, spark, features.JOB), retry_failed=False)

    [slide] = frame(Path(config.output.root), "slides").to_dicts()
    encoded = frame(Path(config.output.root), "features").height
    assert (slide["status"], slide["error_code"], slide["error_message"]) == ("ok", None, None)
    assert encoded == slide["n_tiles"] > 0
