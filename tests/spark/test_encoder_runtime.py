"""The encoder of a run: its runtime and precision, models of one vector, presets and the tiles that they accept."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import timm
from numpy.typing import NDArray
from pyspark.sql import SparkSession

from jobs.runtime.settings.config import ConfigError
from tests.conftest import preprocess_in
from tests.spark.conftest import TABLES, Again, Finished, rows_of, unchanged


def embeddings(config: Any) -> NDArray[np.float32]:
    rows = rows_of(config, "features")
    return np.array([[row["embedding"], row["embedding_max"]] for row in rows], np.float32)


def test_another_runtime_in_fp32_leaves_rows_as_they_are_and_another_precision_redoes_them(
    spark: SparkSession, finished: Finished, again: Again
) -> None:
    expected = embeddings(finished.config)
    with unchanged(again(), *TABLES):
        assert preprocess_in(spark, again(inference={"runtime": "openvino"})).record.counts["tiles_encoded"] == 0
    config = again(inference={"runtime": "openvino", "precision": "bf16"})
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
    assert {len(row["embedding"]) for row in features} == {256}
    assert {row["embedding_max"] for row in features} == {None}
    for patient in rows_of(config, "patients"):
        assert len(patient["embeddings"]) == 4 * 256 * patient["n_tiles"]
        assert patient["embeddings_max"] is None


def test_a_preset_refuses_tiles_of_another_scale_before_any_work_and_runs_on_its_own(
    spark: SparkSession, finished: Finished, again: Again, tmp_path: Path
) -> None:
    model = timm.create_model("vit_small_patch16_224", pretrained=False, num_classes=0)
    weights = tmp_path / "kaiko.safetensors"
    safetensors.torch.save_file(model.state_dict(), weights)
    encoder = {"model": "kaiko-vits16", "weights": str(weights), "input_px": None}
    with (
        unchanged(again(), *TABLES),
        pytest.raises(ConfigError, match=r"set tiling\.tile_px to 224 and tiling\.mpp to 0\.5"),
    ):
        preprocess_in(spark, again(encoder=encoder))
    config = again(encoder=encoder | {"allow_other_scale": True})
    preprocess_in(spark, config)
    features = rows_of(config, "features")
    assert len(features) == len(rows_of(finished.config, "features"))
    assert {(len(row["embedding"]), row["embedding_max"]) for row in features} == {(384, None)}
