"""The stainnet job on finished tables: a checkpoint that anyone can load, a picture, the same again."""

import argparse
from pathlib import Path

import fsspec
import numpy as np
import pytest
import torch
from PIL import Image
from pyspark.sql import SparkSession

from jobs import stainnet
from jobs.runtime.run.run import Run
from jobs.runtime.settings.config import Config, ConfigError
from tests.spark.conftest import Finished
from udfs.wsi.stain.stain_network import load_stainnet
from udfs.wsi.store import write_bytes


def config_of(finished: Finished, checkpoint: Path | str, reference: str = "a2") -> Config:
    settings = finished.config.stainnet.model_copy(
        update={"reference": reference, "checkpoint": str(checkpoint), "tiles": 16, "steps": 150}
    )
    return finished.config.model_copy(update={"stainnet": settings})


def test_the_checkpoint_has_the_published_layout_and_the_picture_is_there(
    spark: SparkSession, finished: Finished, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    paths = [tmp_path / "new" / "one.pth", tmp_path / "other.pth"]
    for path in (paths[0], f"file://{paths[1]}"):
        assert stainnet.fit_to_reference(Run(config_of(finished, path), spark, stainnet.JOB), argparse.Namespace()) == 0
    report = capsys.readouterr().out
    weights = torch.load(paths[0], weights_only=True)
    shapes = {"0": (32, 3, 1, 1), "2": (32, 32, 1, 1), "4": (3, 32, 1, 1)}
    assert {name: tuple(tensor.shape) for name, tensor in weights.items() if name.endswith("weight")} == {
        f"rgb_trans.{layer}.weight": shape for layer, shape in shapes.items()
    }
    assert len(weights) == 6 and paths[0].stat().st_size < 16_384
    again = torch.load(paths[1], weights_only=True)
    assert all(torch.equal(weights[name], again[name]) for name in weights)  # deterministic
    tile = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    normalised = load_stainnet(str(paths[0])).normalise(tile)
    assert normalised.shape == tile.shape and normalised.dtype == np.uint8
    assert sorted(path.name for path in tmp_path.rglob("*.*")) == ["one.png", "one.pth", "other.png", "other.pth"]
    with Image.open(paths[0].with_suffix(".png")) as picture:
        assert picture.width > 3 * 200 and np.asarray(picture.convert("RGB")).std() > 5
    [line] = [line for line in report.splitlines() if line.split()[:1] == ["all"]][:1]
    untouched, student = (float(number) for number in line.split()[-2:])
    assert student < 8  # grey levels, after 150 steps of the usual 3,000
    assert untouched > 0


def test_few_tiles_are_of_few_slides_and_the_reference_is_one_of_them(
    spark: SparkSession, finished: Finished, tmp_path: Path
) -> None:
    run = Run(config_of(finished, tmp_path / "net.pth"), spark, stainnet.JOB)
    for seed in (0, 1):
        settings = run.config.stainnet.model_copy(update={"tiles": 4, "seed": seed})
        drawn = stainnet.draw_tiles(run.tables, settings, run.images)
        assert drawn["image_id"].value_counts().to_list() == [2, 2]
        assert "a2" in set(drawn["image_id"])


def test_a_checkpoint_goes_to_a_store_by_its_uri() -> None:
    write_bytes("memory://models/deep/net.pth", b"weights", {"account_key": "of another store"})
    assert fsspec.filesystem("memory").cat("/models/deep/net.pth") == b"weights"


def test_a_reference_without_tiles_is_a_setting_to_mend(
    spark: SparkSession, finished: Finished, tmp_path: Path
) -> None:
    run = Run(config_of(finished, tmp_path / "net.pth", reference="e1"), spark, stainnet.JOB)
    with pytest.raises(ConfigError, match=r"stainnet\.reference = e1 has no tiles"):
        stainnet.fit_to_reference(run, argparse.Namespace())
    assert list(tmp_path.iterdir()) == []


def test_without_tables_the_message_says_what_to_run_first(
    spark: SparkSession, finished: Finished, tmp_path: Path
) -> None:
    config = config_of(finished, tmp_path / "net.pth").model_copy(
        update={"output": finished.config.output.model_copy(update={"root": str(tmp_path / "nothing")})}
    )
    with pytest.raises(ConfigError, match="run the slides job first"):
        stainnet.fit_to_reference(Run(config, spark, stainnet.JOB), argparse.Namespace())
