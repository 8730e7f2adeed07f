"""The encoder's runtime: what makes rows another's and what does not, and a choice by measurement that tables keep."""

from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from pyspark.sql import SparkSession

from jobs.runtime.run import encoder_runtime as encoders
from jobs.runtime.settings.config import ConfigError
from jobs.runtime.tables.tables import Tables
from tests.conftest import preprocess_in
from tests.spark.conftest import TABLES, Again, Finished, rows_of, unchanged
from udfs.wsi.encoder.encoder_spec import Precision
from udfs.wsi.encoder.fastest import Measured


def embeddings(config: Any) -> NDArray[np.float32]:
    rows = rows_of(config, "features")
    return np.array([[row["embedding_avg"], row["embedding_max"]] for row in rows], np.float32)


def test_another_runtime_in_fp32_leaves_rows_as_they_are_and_another_precision_redoes_them(
    spark: SparkSession, finished: Finished, again: Again
) -> None:
    expected = embeddings(finished.config)
    with unchanged(again(), *TABLES):
        assert preprocess_in(spark, again(encoder={"runtime": "openvino"})).record.counts["tiles_encoded"] == 0
    config = again(encoder={"runtime": "openvino", "precision": "bf16"})
    run = preprocess_in(spark, config)
    assert run.record.counts["tiles_encoded"] == len(expected)
    found = embeddings(config)
    cosines = (found * expected).sum(-1) / np.linalg.norm(found, axis=-1) / np.linalg.norm(expected, axis=-1)
    assert cosines.mean() >= 0.999 and (found != expected).any()
    with unchanged(config, *TABLES):
        assert preprocess_in(spark, config).record.counts["tiles_encoded"] == 0


def test_a_measured_runtime_is_told_and_kept_with_the_tables(
    spark: SparkSession, again: Again, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config = again(encoder={"runtime": "auto"})
    run = preprocess_in(spark, config)
    told = [line for line in capsys.readouterr().err.splitlines() if line.startswith("encoder: ")]
    runtime, precision = run.encoder_runs_by
    [taken] = [line for line in told if line.endswith("<- taken")]
    assert f"{runtime} {precision}: " in taken
    assert {" ".join(line.split()[1:3]) for line in told[1:]} >= {"torch fp32:", "openvino fp32:"}
    kept = Tables(spark, config.output.root).property("features", "slidelake.encoder")
    assert f'"runtime": "{runtime}", "precision": "{precision}"' in str(kept)

    monkeypatch.setattr(encoders, "measure_runtimes", None)  # to call it would be an error
    with unchanged(config, *TABLES):
        later = preprocess_in(spark, config)
    assert later.encoder_runs_by == (runtime, precision)
    assert later.record.counts["tiles_encoded"] == 0


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_choice_of_openvino_asks_for_it_where_it_is_not_installed_and_matters(
    spark: SparkSession, again: Again, monkeypatch: pytest.MonkeyPatch, precision: Precision
) -> None:
    config = again(encoder={"runtime": "auto"})
    measured = [Measured("torch", "fp32", 10.0, 1.0), Measured("openvino", precision, 20.0, 1.0)]
    monkeypatch.setattr(encoders, "measure_runtimes", lambda *_: measured)
    assert preprocess_in(spark, config).encoder_runs_by == ("openvino", precision)
    monkeypatch.setattr(encoders, "find_spec", lambda _: None)
    if precision == "fp32":  # PyTorch gives the same rows
        with unchanged(config, *TABLES):
            assert preprocess_in(spark, config).encoder_runs_by == ("torch", "fp32")
        return
    with pytest.raises(ConfigError, match=r"made with OpenVINO.*slidelake\[openvino\]"):
        preprocess_in(spark, config)


def test_a_precision_that_is_not_right_is_refused(
    spark: SparkSession, again: Again, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(encoders, "measure_runtimes", lambda *_: [Measured("torch", "bf16", 10.0, 0.99)])
    with pytest.raises(ConfigError, match=r"cosine to fp32 is 0\.99000 .* leave it out"):
        preprocess_in(spark, again(encoder={"runtime": "auto", "precision": "bf16"}))
