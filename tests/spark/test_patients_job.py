"""The job patients alone: it loads no model, and knows all the same which features are not those of today's settings."""

import json

import pytest
from deltalake import DeltaTable
from pyspark.sql import SparkSession

from jobs import patients
from jobs.runtime.run.run import ORIGINS, Run
from jobs.runtime.run.waves import work_in_waves
from jobs.runtime.settings.config import Config, ConfigError
from jobs.runtime.tables.tables import Tables
from tests.spark.conftest import Again, Finished, rows_of, unchanged, without


def run_job(spark: SparkSession, config: Config) -> Run:
    run = Run(config, spark, patients.JOB)
    work_in_waves(run, retry_failed=False)
    return run


def test_rows_are_made_without_a_checkpoint_and_only_of_features_of_the_same_settings(
    spark: SparkSession, finished: Finished, again: Again, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("jobs.runtime.run.run.load_models", None)  # to call it would be an error
    config = again()
    table = DeltaTable(f"{config.output.root}/patients")
    assert table.delete("patient_id IN ('001', '003')")["num_deleted_rows"] == 2
    run = run_job(spark, config)
    assert run.record.counts["patients_built"] == 2 and run.record.problems == []
    assert without(rows_of(config, "patients"), "run_id") == without(rows_of(finished.config, "patients"), "run_id")
    [encoder] = config.encoders
    assert run.identity.recipe(encoder) == finished.run.identity.recipe(encoder)
    waiting = "6 patients wait for the slides and features jobs: run them, then this again"
    for other in ({"input_px": 64}, {"weights": "elsewhere.pth"}):
        config = again(encoder=other)
        with unchanged(config, "patients"):
            assert run_job(spark, config).record.problems == [waiting]


def test_features_whose_licence_forbids_it_are_not_for_commercial_use(
    spark: SparkSession, again: Again, caplog: pytest.LogCaptureFixture
) -> None:
    config = again().model_copy(update={"licence": "commercial"})
    [encoder] = config.encoders
    run_job(spark, config)
    assert caplog.text.count(f"the licence of encoder {encoder} is not known") == 1
    origins = json.dumps({encoder: {"licence": "CC-BY-NC-4.0", "licence.commercial": "false"}})
    Tables(spark, config.output.root).set_property("features", ORIGINS, origins)
    with (
        unchanged(config, "patients"),
        pytest.raises(ConfigError, match=rf"licence of encoder {encoder} \(CC-BY-NC-4\.0\) forbids commercial use"),
    ):
        run_job(spark, config)
