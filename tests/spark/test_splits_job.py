"""The job splits: its table, the column of patients, its CSVs; run again, with patients added, with what must not change."""

import argparse
import os
import re
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import polars as pl
import pytest
from deltalake import DeltaTable
from pyspark.sql import SparkSession

from jobs import splits
from jobs.runtime.cohort.locating import read_cohort
from jobs.runtime.cohort.patient_csv import parse_cohort
from jobs.runtime.run.run import Run
from jobs.runtime.settings.config import Config, ConfigError
from jobs.training.splitting import SPLITS, Patient, assign_splits
from tests.conftest import config_in, preprocess_in
from tests.slides.patients import synthetic_rows
from tests.spark.conftest import COHORT, Again, by, rows_of, unchanged

HALVES = {"train": 0.5, "validation": 0.25, "test": 0.25}


def split_in(spark: SparkSession, config: Config, *, redo: bool = False) -> Run:
    run = Run(config, spark, splits.JOB)
    assert splits.split(run, argparse.Namespace(redo=redo)) == 0
    return run


def splits_of(config: Config) -> dict[str, str]:
    rows = pl.read_delta(f"{config.output.root}/splits")
    assert not rows["patient_id"].is_duplicated().any()
    return dict(zip(rows["patient_id"], rows["split"], strict=True))


def csvs(config: Config) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in Path(config.output.root, "splits_csv").iterdir()}


def test_the_table_the_column_and_the_csvs_agree_and_a_second_run_writes_nothing(
    spark: SparkSession, again: Again, capsys: pytest.CaptureFixture[str]
) -> None:
    config = again(splits=HALVES | {"folds": 2})
    run = split_in(spark, config)
    rows = by(pl.read_delta(f"{config.output.root}/splits").to_dicts(), "patient_id")
    assert rows.keys() == {row[2] for row in COHORT}
    assert {name: row["split"] for name, row in by(rows_of(config, "patients"), "patient_id").items()} == {
        name: row["split"]
        for name, row in rows.items()
        if name != "005"  # it has no tile, and so no row
    }
    assert all((row["fold"] is None) == (row["split"] == "test") for row in rows.values())
    assert rows["001"] | {"split": "", "fold": 0, "params_hash": ""} == {
        "patient_id": "001", "split": "", "fold": 0, "center_id": "north", "label": "CE", "n_images": 2, "seed": 0,
        "params_hash": "", "run_id": run.record.run_id,
    }  # fmt: skip
    header, *lines = Path(config.patients).read_bytes().splitlines(keepends=True)
    files = csvs(config)
    for name, data in files.items():
        assert data.startswith(header), name
    parts = [files[f"{name}.csv"][len(header) :].splitlines(keepends=True) for name in SPLITS]
    assert sorted(line for part in parts for line in part) == sorted(lines)
    for name in SPLITS:
        patients = {image.patient_id for image in parse_cohort(files[f"{name}.csv"])}
        assert patients == {name_ for name_, row in rows.items() if row["split"] == name}
    for fold in (0, 1):
        held_out = {image.patient_id for image in parse_cohort(files[f"fold_{fold}_validation.csv"])}
        learned_from = {image.patient_id for image in parse_cohort(files[f"fold_{fold}_train.csv"])}
        assert held_out == {name for name, row in rows.items() if row["fold"] == fold}
        assert learned_from == {name for name, row in rows.items() if row["fold"] == 1 - fold}
    said = capsys.readouterr().out
    assert "none among 8 slides" in said and "7 patients dealt, 0 kept" in said
    times = {path: path.stat().st_mtime_ns for path in Path(config.output.root, "splits_csv").iterdir()}
    with unchanged(config, "patients", "slides", "runs"):
        before = DeltaTable(f"{config.output.root}/splits").version()
        split_in(spark, config)
        assert DeltaTable(f"{config.output.root}/splits").version() == before
    assert {path: path.stat().st_mtime_ns for path in times} == times
    assert "0 patients dealt, 7 kept their split" in capsys.readouterr().out


def test_patients_that_come_are_dealt_nobody_moves_and_a_rebuilt_row_keeps_its_split(
    spark: SparkSession, again: Again
) -> None:
    first = again([row for row in COHORT if row[2] != "009"], splits=HALVES)
    split_in(spark, first)
    before = splits_of(first)
    rows: list[tuple[Any, ...]] = [row for row in COHORT if row[0] != "a2"]  # 009 comes, 001 loses an image
    config = again([*reversed(rows)], splits=HALVES)
    preprocess_in(spark, config)  # rebuilds 001
    assert by(rows_of(config, "patients"), "patient_id")["001"]["n_images"] == 1
    assert {row["patient_id"]: row["split"] for row in rows_of(config, "patients")} == {
        name: split for name, split in before.items() if name != "005"
    } | {"009": None}
    split_in(spark, config)
    after = splits_of(config)
    assert before.items() <= after.items() and after.keys() - before.keys() == {"009"}
    table = by(pl.read_delta(f"{config.output.root}/splits").to_dicts(), "patient_id")
    assert table["001"]["n_images"] == 1
    assert by(rows_of(config, "patients"), "patient_id")["009"]["split"] == after["009"]
    with unchanged(config, "patients"):
        assert preprocess_in(spark, config).record.counts["waves"] == 0  # a split shapes no bag


def test_what_would_move_a_patient_is_refused_and_folds_may_change(spark: SparkSession, again: Again) -> None:
    split_in(spark, again(splits=HALVES))
    before = splits_of(again(splits=HALVES))
    for changed, said in (
        ({"seed": 3}, "splits.seed is 3, it was 0"),
        ({"validation": 0.1, "test": 0.4}, "splits.validation is 0.1, it was 0.25; splits.test is 0.4, it was 0.25"),
        ({"stratify": "center_id"}, "splits.stratify is"),
    ):
        with pytest.raises(ConfigError, match=r"set it back; or give --redo to deal all patients anew") as caught:
            split_in(spark, again(splits=HALVES | changed))
        assert said in str(caught.value)
    config = again(splits=HALVES | {"folds": 2})
    split_in(spark, config)
    assert splits_of(config) == before
    assert set(csvs(config)) >= {"fold_0_train.csv", "fold_1_validation.csv"}


def test_redo_deals_anew_where_settings_differ_and_only_there(
    spark: SparkSession, again: Again, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config = again(splits=HALVES | {"folds": 2})
    split_in(spark, config)
    before = splits_of(config)
    with unchanged(config, "patients", "slides"):
        version = DeltaTable(f"{config.output.root}/splits").version()
        split_in(spark, again(splits=HALVES | {"folds": 2}), redo=True)  # nothing differs: nobody is dealt
        assert DeltaTable(f"{config.output.root}/splits").version() == version
    capsys.readouterr()
    other: dict[str, Any] = {"train": 0.4, "validation": 0.3, "test": 0.3, "seed": 5, "folds": 2}
    rows: list[tuple[Any, ...]] = [*COHORT, ("new", "north", "010", 0, "CE")]
    config = again(rows, splits=other)
    with monkeypatch.context() as killed:  # after the rows, before the settings are noted
        killed.setattr(splits, "_note_settings", lambda run: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            split_in(spark, config, redo=True)
    with pytest.raises(ConfigError, match="--redo"):
        split_in(spark, config)
    run = split_in(spark, config, redo=True)
    images = Counter(row[2] for row in rows)
    cohort = {row[2]: Patient(row[2], row[1], row[4], images[row[2]]) for row in rows}
    fresh = assign_splits(cohort.values(), {name: other[name] for name in SPLITS}, {}, seed=5)
    assert splits_of(config) == fresh != before
    shown = {row["patient_id"]: row["split"] for row in rows_of(config, "patients")}
    assert shown == {name: fresh[name] for name in shown}
    table = by(pl.read_delta(f"{config.output.root}/splits").to_dicts(), "patient_id")
    assert {row["seed"] for row in table.values()} == {5} and len({row["params_hash"] for row in table.values()}) == 1
    assert all((row["fold"] is None) == (row["split"] == "test") for row in table.values())
    assert run.record.counts["patients_dealt"] == 8
    assert "8 patients dealt, 0 kept their split" in capsys.readouterr().out
    split_in(spark, again(rows, splits=other))
    assert "0 patients dealt, 8 kept their split" in capsys.readouterr().out
    with pytest.raises(ConfigError, match=r"splits\.seed is 0, it was 5"):
        split_in(spark, again(rows, splits=HALVES))


def test_each_warning_says_what_is_refused_and_what_is_empty(
    spark: SparkSession, again: Again, capsys: pytest.CaptureFixture[str]
) -> None:
    def warnings(splits: dict[str, Any], *, redo: bool = False) -> list[str]:
        rows = [(f"i{i}", "north", f"{i:03}", 0, "CE" if i % 2 else "LAA") for i in range(4)]
        split_in(spark, again(rows, splits=splits), redo=redo)
        lines = capsys.readouterr().out.splitlines()
        return [line.removeprefix("  WARNING   ") for line in lines if line.startswith("  WARNING")]

    assert warnings({"train": 1.0, "validation": 0, "test": 0}) == []  # nobody asked for the splits that are empty
    rare = {"train": 0.98, "validation": 0.01, "test": 0.01}  # 4 images: a hundredth is nobody
    assert warnings(rare, redo=True) == [
        f"split {name} has 0 labelled patients, and splits.{name} is 0.01: add patients, or deal anew with --redo and another "
        "splits.seed or other shares"
        for name in ("validation", "test")
    ]
    folds = [line for line in warnings(rare | {"folds": 4}) if "fold" in line]
    assert [line.partition(" has ")[0] for line in folds] == [
        f"training.fold={fold} is refused: split validation" for fold in range(4)
    ]
    [line] = warnings({"train": 0.75, "validation": 0.25, "test": 0}, redo=True)
    assert re.match("train refuses these splits: split validation has 1 labelled patients, 0 of (CE|LAA): add", line)


def test_a_slide_under_two_names_is_refused_before_anything_is_written(
    spark: SparkSession, again: Again, finished: Any, tmp_path: Path
) -> None:
    root = tmp_path / "slides"
    shutil.copytree(finished.slides, root)
    for number in range(6):  # patient 009's slide under six more names: not all can be in one split
        shutil.copy(root / "k1.tif", root / f"k1_{number}.tif")
        os.utime(root / f"k1_{number}.tif", (number, number))
    rows: list[tuple[Any, ...]] = [("k1", "south", "009", 0, None)]
    rows += [(f"k1_{number}", "south", f"1{number}", 0, None) for number in range(6)]
    config = again(rows, root=root, splits=HALVES)
    preprocess_in(spark, config)
    with pytest.raises(
        ConfigError, match=r"1 slides are in two splits under two names: k1 \(patient 009, \w+\) is k1_0 "
    ):
        split_in(spark, config)
    assert not [name for name in ("splits_csv", "splits") if Path(config.output.root, name).exists()]


@pytest.fixture
def large(tmp_path: Path, small_slides: Path, encoder_weights: Path) -> Callable[..., Config]:
    """754 patients in 11 centres, who have no slides yet."""
    return lambda **sections: config_in(tmp_path, small_slides, encoder_weights, synthetic_rows(), **sections)


def test_754_patients_in_11_centres(
    spark: SparkSession, large: Callable[..., Config], capsys: pytest.CaptureFixture[str]
) -> None:
    config = large()
    split_in(spark, config)
    said = capsys.readouterr().out
    print(said)  # pytest -s shows the table
    assert "WARNING" not in said
    images = {
        name: read_cohort(config.model_copy(update={"patients": f"{config.output.root}/splits_csv/{name}.csv"})).images
        for name in SPLITS
    }
    total = sum(len(of_split) for of_split in images.values())
    assert total == len(read_cohort(config).images)
    for name, of_split in images.items():
        assert abs(len(of_split) / total - getattr(config.splits, name)) < 0.002
        assert len({image.center_id for image in of_split}) == 11
    patients = [{image.patient_id for image in of_split} for of_split in images.values()]
    assert sum(map(len, patients)) == len(set().union(*patients)) == 754
    last = said.splitlines()[[line.split()[:2] for line in said.splitlines()].index(["all", "all"])]
    assert [int(cell) for cell in last.split()[5:8]] == [len(of_split) for of_split in images.values()]


def test_folds_that_are_dealt_anew_stay(spark: SparkSession, large: Callable[..., Config]) -> None:
    for folds in (5, 10):
        split_in(spark, large(splits={"folds": folds}))
    config = large(splits={"folds": 10})
    version = DeltaTable(f"{config.output.root}/splits").version()
    split_in(spark, config)
    assert DeltaTable(f"{config.output.root}/splits").version() == version


def test_the_main_job_reads_a_csv_back_and_finds_nothing_to_do(spark: SparkSession, again: Again) -> None:
    config = again(splits=HALVES)
    split_in(spark, config).write_record("done")
    assert "splits" in {row["job"] for row in rows_of(config, "runs")}
    train = config.model_copy(update={"patients": f"{config.output.root}/splits_csv/train.csv"})
    assert 0 < len(read_cohort(train).images) < len(COHORT)
    with unchanged(config, "slides", "tiles", "features", "patients"):
        assert preprocess_in(spark, train).record.counts["waves"] == 0
