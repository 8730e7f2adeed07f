"""Columns of small tables, and what is told of the runs that made a model's patients."""

from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from deltalake import write_deltalake

from jobs.training.labelled import CohortError, TrainingSet, feature_settings, read_training_set
from jobs.training.refusals import FeedError, NoTableError
from jobs.training.table_versions import read_columns
from tests.training.cohorts import Signal, draw_cohort, write_patients
from udfs.schemas import RUNS


def _runs(folder: Path, recipes: dict[str, dict[str, str] | None]) -> str:
    """Table runs, of which the first commit is from before the column features came."""
    old = pa.schema([field for field in RUNS if field.name != "features"])
    for number, (run_id, recipe) in enumerate(recipes.items()):
        row: dict[str, Any] = {"run_id": run_id, "started_at": datetime(2026, 1, 1 + number, tzinfo=UTC)}
        schema = RUNS if number else old
        features = {"features": list(recipe.items()) if recipe else None} if number else {}
        rows = pa.Table.from_pylist([row | features], schema)
        write_deltalake(str(folder / "runs"), rows, mode="append", schema_mode="merge")
    return str(folder / "runs")


def test_rows_from_before_a_column_came_have_none_of_it(tmp_path: Path) -> None:
    uri = _runs(tmp_path, {"old": None, "new": {"tiling.tile_px": "448"}})
    version, rows = read_columns(uri, ("run_id", "features"))
    assert version == 1
    found = {row["run_id"]: row["features"] for row in rows.to_pylist()}
    assert found == {"old": None, "new": [("tiling.tile_px", "448")]}
    assert read_columns(uri, ("run_id",), 0)[1].to_pydict() == {"run_id": ["old"]}
    with pytest.raises(FeedError, match="version 7"):
        read_columns(uri, ("run_id",), 7)
    with pytest.raises(KeyError):
        read_columns(uri, ("none",))
    with pytest.raises(NoTableError, match="no Delta table"):
        read_columns(str(tmp_path / "nothing"), ("run_id",))


def test_a_model_knows_the_recipes_of_its_patients(tmp_path: Path) -> None:
    patients = draw_cohort(20, Signal(dim=4, bag=(5, 8)))  # their rows are of run "drawn"
    table = str(write_patients(tmp_path, patients))
    found = read_training_set(table, None)
    assert feature_settings(found, str(tmp_path / "runs")) == ()
    uri = _runs(tmp_path, {"old": None, "drawn": {"tiling.tile_px": "448"}, "later": {"tiling.tile_px": "224"}})
    assert feature_settings(found, uri) == ({"tiling.tile_px": "448"},)


def test_rows_of_a_run_that_was_killed_are_trained_on_only_when_one_has_ended_since(tmp_path: Path) -> None:
    patients = draw_cohort(20, Signal(dim=4, bag=(5, 8)))
    found = read_training_set(str(write_patients(tmp_path, patients)), None)
    ended = "20260102T000000-aaaaaa"
    uri = _runs(tmp_path, {"old": None, ended: {"tiling.tile_px": "448"}})

    def written_by(run_id: str) -> TrainingSet:
        first, *others = found.splits["train"]
        return replace(found, splits=found.splits | {"train": [replace(first, run_id=run_id), *others]})

    assert feature_settings(written_by("20260101T000000-bbbbbb"), uri) == ({"tiling.tile_px": "448"},)
    with pytest.raises(CohortError, match=r"20260103T000000-cccccc .* left no record, so it was killed"):
        feature_settings(written_by("20260103T000000-cccccc"), uri)


@pytest.mark.parametrize(("label", "told"), [("nan", "'nan'"), ("ce", "'CE' and 'ce'"), ("C E", "'C E' and 'CE'")])
def test_labels_that_a_csv_may_not_have_are_not_trained_on(tmp_path: Path, label: str, told: str) -> None:
    first, *others = draw_cohort(20, Signal(dim=4, bag=(5, 8)))
    table = str(write_patients(tmp_path, [replace(first, label=label), *others]))
    with pytest.raises(CohortError, match=f"labels that the CSV may not have: {told}: correct column label of the CSV"):
        read_training_set(table, None)
