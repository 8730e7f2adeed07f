"""Slides that give no tile, by their kinds: missing ones cost no task, glass and small ones are named and counted."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pyspark.sql import SparkSession

from jobs import preprocess, slides
from jobs.runtime.run.cli import conclude
from jobs.runtime.run.run import Run
from jobs.runtime.run.waves import work_in_waves
from jobs.runtime.settings.config import Config
from tests.slides.make import write_slide
from tests.spark.conftest import by, rows_of

MakeConfig = Callable[..., Config]


def find_slides(spark: SparkSession, config: Config) -> Run:
    run = Run(config, spark, slides.JOB)
    work_in_waves(run, retry_failed=False)
    return run


def tasks_of(spark: SparkSession, group: str) -> int:
    """How many tasks ran for the jobs of a group."""
    tracker = spark.sparkContext.statusTracker()
    jobs = [tracker.getJobInfo(job) for job in tracker.getJobIdsForGroup(group)]
    stages = {stage for job in jobs if job for stage in job.stageIds}
    found = [tracker.getStageInfo(stage) for stage in stages]
    return sum(stage.numCompletedTasks for stage in found if stage)


@pytest.fixture
def in_group(spark: SparkSession) -> Iterator[Callable[[str], None]]:
    yield lambda name: spark.sparkContext.setJobGroup(name, name)
    for key in ("spark.jobGroup.id", "spark.job.description"):
        spark.sparkContext.setLocalProperty(key, None)  # type: ignore[arg-type]


def test_missing_slides_cost_no_task_each(
    spark: SparkSession, small_config: MakeConfig, in_group: Callable[[str], None]
) -> None:
    missing = [(f"m{i}", "north", f"p{i % 7}", i, None) for i in range(400)]
    config = small_config([("a1", "north", "001", 0, "CE"), *missing])
    in_group("missing")
    run = find_slides(spark, config)
    assert 1 <= tasks_of(spark, "missing") < len(missing) / 2
    assert run.record.counts["slides_processed"] == 1 + len(missing)
    assert run.record.counts["waves"] == 1, "missing slides are not counted as slides to read"
    found = by(rows_of(config, "slides"), "image_id")
    assert found.keys() == {"a1", *(row[0] for row in missing)} and found["a1"]["status"] == "ok"
    for image_id, center_id, patient_id, image_num, _ in missing:
        row = {name: value for name, value in found[image_id].items() if value is not None}
        assert row.pop("error_message").endswith(": upload it, or give its uri in the CSV") and row.pop("params_hash")
        assert row == {
            **{"image_id": image_id, "center_id": center_id, "patient_id": patient_id, "image_num": image_num},
            **{"status": "failed", "error_code": "file_missing", "n_tiles": 0, "run_id": run.record.run_id},
        }


def test_slides_without_tiles_are_named_and_counted_and_no_failure(
    spark: SparkSession,
    small_slides: Path,
    small_config: MakeConfig,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    root = tmp_path / "slides"
    root.mkdir()
    for name in ("a1", "b1", "c1"):
        (root / f"{name}.tif").symlink_to(small_slides / f"{name}.tif")
    write_slide(root / "glass.tif", np.full((900, 900, 3), 245, np.uint8), compression="deflate")
    for name, shape in (("small", (400, 400, 3)), ("strip", (3000, 300, 3)), ("alone", (200, 500, 3))):
        tissue = np.random.default_rng(0).integers(0, 150, shape, np.uint8)
        write_slide(root / f"{name}.tif", tissue, compression="deflate")
    rows: list[tuple[Any, ...]] = [
        ("a1", "north", "001", 0, "CE"),
        ("b1", "north", "002", 0, "CE"),
        ("glass", "north", "002", 1, "CE"),
        ("small", "north", "002", 2, "CE"),
        ("strip", "north", "002", 3, "CE"),
        ("c1", "north", "003", 0, "CE"),
        ("alone", "north", "004", 0, "CE"),
    ]
    config = small_config(rows, root=root, tiling={"max_background": 0.8})
    run = Run(config, spark, preprocess.JOB)
    status = conclude(run, work_in_waves(run, retry_failed=False))
    said = capsys.readouterr()
    assert (status, said.err.count("failed")) == (0, 0)
    found = by(rows_of(config, "slides"), "image_id")
    assert {name: row["status"] for name, row in found.items()} == {
        **dict.fromkeys(("a1", "b1", "c1"), "ok"),
        **{"glass": "no_tissue", "small": "too_small", "strip": "too_small", "alone": "too_small"},
    }
    assert "300 x 3000 level-0 px" in found["strip"]["error_message"]
    lines = [line.strip() for line in said.out.splitlines()]
    assert "slides    3 ok, 1 without tissue, 3 too small, 0 failed" in lines
    assert any(line.startswith("no tissue glass: ") for line in lines)
    assert any(line.startswith("too small alone, small, strip: ") for line in lines)
    assert run.record.counts["slides_too_small"] == 3
    columns = ("n_images", "n_images_failed", "n_images_without_tiles", "complete")
    patients = {row["patient_id"]: tuple(row[name] for name in columns) for row in rows_of(config, "patients")}
    assert patients == {"001": (1, 0, 0, True), "002": (4, 0, 3, False), "003": (1, 0, 0, True)}
