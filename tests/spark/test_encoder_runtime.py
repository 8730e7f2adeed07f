"""The encoder's runtime: another one in fp32 gives the same rows, and another precision gives others."""

from typing import Any

import numpy as np
from numpy.typing import NDArray
from pyspark.sql import SparkSession

from tests.conftest import preprocess_in
from tests.spark.conftest import TABLES, Again, Finished, rows_of, unchanged


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


def test_an_encoder_that_gives_one_vector_leaves_the_maximum_null(spark: SparkSession, again: Again) -> None:
    config = again(encoder={"pooling": "pooled"})
    preprocess_in(spark, config)
    features = rows_of(config, "features")
    assert {len(row["embedding_avg"]) for row in features} == {256}
    assert {row["embedding_max"] for row in features} == {None}
    for patient in rows_of(config, "patients"):
        assert len(patient["embeddings_avg"]) == 4 * 256 * patient["n_tiles"]
        assert patient["embeddings_max"] is None
