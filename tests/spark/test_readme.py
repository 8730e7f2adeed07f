"""The commands of the README, executed."""

import argparse
import os
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from pyspark.sql import SparkSession

from jobs import splits
from jobs.runtime.run.run import Run
from jobs.runtime.settings.config import Config
from tests.conftest import preprocess_in, write_csv
from tests.slides.damage import BAD_SLIDES

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()


def _blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


def test_the_python_blocks_run(
    spark: SparkSession,
    sample: Path,
    small_slides: Path,
    small_config: Callable[..., Config],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    demo = tmp_path / "data/demo"
    shutil.copytree(small_slides, demo / "slides")
    shutil.copy(sample, demo / "slides")
    BAD_SLIDES["zero_bytes"](small_slides / "a1.tif", demo / "slides", "bad")
    rows = [(sample.stem, "north", "001", 0, "CE"), ("bad", "north", "002", 0, "LAA")]
    everybody = {"train": 1.0, "validation": 0.0, "test": 0.0}
    config = small_config(rows, root=demo / "slides", output={"root": str(demo / "tables")}, splits=everybody)
    preprocess_in(spark, config)
    assert splits.split(Run(config, spark, splits.JOB), argparse.Namespace(redo=False)) == 0
    monkeypatch.chdir(tmp_path)
    blocks = _blocks("python")
    assert len(blocks) == 6
    for block in blocks:
        exec(compile(block, "README.md", "exec"), {})


def test_a_newcomer_runs_the_job_on_their_own_slides(small_slides: Path, encoder_weights: Path, tmp_path: Path) -> None:
    for name in (".venv", "conf", "jobs"):
        (tmp_path / name).symlink_to(ROOT / name)
    csv = write_csv(tmp_path / "my.csv", [("c1", "north", "001", 0, "CE")])
    script = next(block for block in _blocks("sh") if "my.yaml" in block)
    edits = {
        "patients: data/patients.csv": f"patients: {csv}",
        "root: data/slides": f"root: {small_slides}",
        "root: data/tables": f"root: {tmp_path}/tables",
        "  efficientnet_b0: ": "  test_efficientnet: ",
        "weights: null                  # path or URI of its": f"weights: {encoder_weights}  #",
    }
    edit = "; ".join(f"s|{old}|{new}|" for old, new in edits.items())
    copy = "cp conf/cohort.yaml my.yaml"
    assert copy in script
    script = script.replace(copy, f"{copy}; sed -i '{edit}' my.yaml #")
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("PYSPARK_", "SPARK_"))}
    done = subprocess.run(
        ["bash", "-euc", script],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "1 of 1 have a row" in done.stdout
