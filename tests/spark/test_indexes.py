"""Table indexes: a row a slide that was read, which lets the features pass read tiles without the slide's header."""

import shutil
from dataclasses import replace
from pathlib import Path

import pandas as pd
import polars as pl
import pytest
from deltalake import DeltaTable
from pyspark.sql import SparkSession

from jobs import features, patients, preprocess, slides
from jobs.runtime.run.run import Run
from jobs.runtime.run.summary import failed_slides, read_state, summarise
from jobs.runtime.run.waves import work_in_waves
from jobs.runtime.tables.tables import Tables
from tests.conftest import config_in, preprocess_in
from tests.spark.conftest import COHORT, TABLES, Again, Finished, by, rows_of, unchanged, without
from udfs import schemas
from udfs.wsi.tiff.index import SlideIndex


def test_every_slide_that_was_read_has_its_index(finished: Finished) -> None:
    indexes = by(rows_of(finished.config, "indexes"), "image_id")
    read = {name: row for name, row in by(rows_of(finished.config, "slides"), "image_id").items() if row["width_px"]}
    assert set(indexes) == set(read) == {path.stem for path in finished.slides.iterdir()}
    for image_id, row in indexes.items():
        slide = read[image_id]
        assert [row[name] for name in ("size_bytes", "file_version", "params_hash", "run_id")] == [
            slide[name] for name in ("size_bytes", "file_version", "params_hash", "run_id")
        ]
        index = SlideIndex.from_bytes(row["index"])
        assert index is not None and index.file.size_bytes == row["size_bytes"]
        assert (index.width_px, index.height_px) == (slide["width_px"], slide["height_px"])
        assert [level.downsample for level in index.levels] == slide["level_downsamples"]


def test_features_are_the_same_with_and_without_an_index_but_more_is_read_without(
    spark: SparkSession, finished: Finished, again: Again
) -> None:
    expected = without(rows_of(finished.config, "features"), "run_id")
    runs = []
    for missing in ("features", "indexes"):  # the second time, as in tables of a version that had no indexes
        config = again()
        shutil.rmtree(f"{config.output.root}/features")
        shutil.rmtree(f"{config.output.root}/{missing}", ignore_errors=True)
        runs.append(preprocess_in(spark, config))
        assert without(rows_of(config, "features"), "run_id") == expected
        assert runs[-1].record.counts["slides_processed"] == 0
    with_index, without_index = (run.record.reads for run in runs)
    assert set(with_index) == set(without_index) == {(row["image_id"], "features") for row in expected}
    for key, (size, traffic) in with_index.items():
        assert without_index[key][0] == size
        assert without_index[key][1].bytes > traffic.bytes > 0
    with unchanged(config, *TABLES):
        assert preprocess_in(spark, config).record.counts["waves"] == 0


def test_a_slide_replaced_while_a_run_is_at_work_fails_and_the_next_run_heals_it(
    spark: SparkSession, finished: Finished, encoder_weights: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "slides"
    folder.mkdir()
    for name in ("m1", "m2", "k1"):
        shutil.copy(finished.slides / f"{name}.tif", folder)
    rows = [row for row in COHORT if row[2] in ("007", "009")]
    config = config_in(tmp_path, folder, encoder_weights, rows, tiling={"max_background": 0.5})

    def change(run: Run, wave: pd.DataFrame) -> None:
        del run, wave
        (folder / "m2.tif").unlink()
        shutil.copy(finished.slides / "d1.tif", folder / "m2.tif")

    stages = (*slides.JOB.stages, change, *features.JOB.stages, *patients.JOB.stages)
    run = Run(config, spark, replace(preprocess.JOB, stages=stages))
    survey = work_in_waves(run, retry_failed=False)
    [failed] = failed_slides(
        read_state(run.tables, run.job, survey, run.config.encoders).slides
    )  # a line makes the exit status 3
    assert failed.startswith("failed: m2: file_changed: ") and "run again" in failed
    assert {row["image_id"] for row in rows_of(config, "features")} == {"m1", "k1"}
    assert by(rows_of(config, "patients"), "patient_id")["007"]["complete"] is False

    healed = preprocess_in(spark, config)
    assert healed.record.counts["slides_processed"] == 1
    row = by(rows_of(config, "slides"), "image_id")["m2"]
    index = SlideIndex.from_bytes(by(rows_of(config, "indexes"), "image_id")["m2"]["index"])
    assert (row["status"], row["error_code"], row["width_px"]) == ("ok", None, 1408)
    assert index is not None and index.width_px == 1408
    encoded = [row for row in rows_of(config, "features") if row["image_id"] == "m2"]
    assert len(encoded) == row["n_tiles"] > 0
    assert by(rows_of(config, "patients"), "patient_id")["007"]["complete"] is True
    assert set(healed.record.reads) == {("m2", "slides"), ("m2", "features")}
    assert failed_slides(read_state(healed.tables, healed.job, survey, healed.config.encoders).slides) == []


def test_the_summary_says_what_was_read_of_what(finished: Finished) -> None:
    survey = pd.DataFrame(
        {"patient_id": [row[2] for row in COHORT], "removed": False}, index=[row[0] for row in COHORT]
    )
    state = read_state(finished.run.tables, finished.run.job, survey, finished.config.encoders)
    lines = summarise(finished.run.job, finished.run.record, finished.config, state).splitlines()
    [line] = [line for line in lines if line.startswith("  read ")]
    total = sum(path.stat().st_size for path in finished.slides.iterdir())
    requests = sum(traffic.requests for _, traffic in finished.run.record.reads.values())
    assert f" of {total / 1e6:.1f} MB, " in line and f" in {requests:,} requests; " in line


@pytest.mark.parametrize("name", ["runs", "slides"])
def test_a_table_of_an_older_version_gets_the_columns_that_it_lacks(
    spark: SparkSession, finished: Finished, tmp_path: Path, name: str
) -> None:
    lacking = {"runs": "reads", "slides": "tissue_fraction"}[name]
    before = rows_of(finished.config, name)
    old = spark.read.format("delta").load(f"{finished.config.output.root}/{name}").drop(lacking)
    old.write.format("delta").save(f"{tmp_path}/{name}")
    tables = Tables(spark, str(tmp_path))
    tables.create(name)
    version = DeltaTable(f"{tmp_path}/{name}").version()
    assert version == 1
    now = pl.read_delta(f"{tmp_path}/{name}")
    assert set(now.columns) == set(schemas.TABLES[name].schema.names)
    assert now[lacking].is_null().all() and len(now) == len(before)
    field = next(column for column in tables.read(name).schema if column.name == lacking)
    assert field.metadata["comment"] == schemas.TABLES[name].schema.field(lacking).metadata[b"comment"].decode()
    whole = spark.read.format("delta").load(f"{finished.config.output.root}/{name}")
    assert field.dataType == whole.schema[lacking].dataType
    tables.append(name, whole)
    assert len(pl.read_delta(f"{tmp_path}/{name}").filter(pl.col(lacking).is_not_null())) > 0
    tables.create(name)
    assert DeltaTable(f"{tmp_path}/{name}").version() == version + 1
