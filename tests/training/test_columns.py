"""Columns of small tables, and labels that are not trained on."""

from dataclasses import replace
from pathlib import Path

import pytest

from jobs.training.labelled import CohortError, read_training_set
from jobs.training.refusals import FeedError, NoTableError
from jobs.training.table_versions import read_columns
from tests.training.cohorts import Signal, draw_cohort, runs_table, write_patients


def test_rows_from_before_a_column_came_have_none_of_it(tmp_path: Path) -> None:
    uri = runs_table(tmp_path, {"old": None, "new": {"uni": {"tiling.tile_px": "448"}}})
    version, rows = read_columns(uri, ("run_id", "features"))
    assert version == 1
    found = {row["run_id"]: row["features"] for row in rows.to_pylist()}
    assert found == {"old": None, "new": [("uni", [("tiling.tile_px", "448")])]}
    assert read_columns(uri, ("run_id",), 0)[1].to_pydict() == {"run_id": ["old"]}
    with pytest.raises(FeedError, match="version 7"):
        read_columns(uri, ("run_id",), 7)
    with pytest.raises(KeyError):
        read_columns(uri, ("none",))
    with pytest.raises(NoTableError, match="no Delta table"):
        read_columns(str(tmp_path / "nothing"), ("run_id",))


@pytest.mark.parametrize(("label", "told"), [("nan", "'nan'"), ("ce", "'CE' and 'ce'"), ("C E", "'C E' and 'CE'")])
def test_labels_that_a_csv_may_not_have_are_not_trained_on(tmp_path: Path, label: str, told: str) -> None:
    first, *others = draw_cohort(20, Signal(dim=4, bag=(5, 8)))
    table = str(write_patients(tmp_path, [replace(first, label=label), *others]))
    with pytest.raises(CohortError, match=f"labels that the CSV may not have: {told}: correct column label of the CSV"):
        read_training_set(table, None)
