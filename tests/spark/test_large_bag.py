"""A bag too large for a heap or for a table's cell: its patient gets no new row, and nobody loses one."""

from collections.abc import Callable

import pytest
from deltalake import DeltaTable
from pyspark.sql import SparkSession

from jobs.patients import tasks_for
from jobs.runtime.settings.config import Config
from jobs.runtime.spark.resources import plain_executors
from tests.conftest import preprocess_in
from tests.spark.conftest import COHORT, Finished, by, rows_of, unchanged, without
from udfs.bag_patients import HEAP_A_BAG


def test_only_the_patient_whose_bag_is_too_large_goes_without_a_row(
    spark: SparkSession, finished: Finished, again: Callable[..., Config], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = again()
    before = by(rows_of(finished.config, "patients"), "patient_id")
    sizes = {name: len(row["embeddings"]) for name, row in before.items()}
    largest = max(sizes, key=lambda name: sizes[name])
    assert sorted(sizes.values())[-2] < sizes[largest]
    DeltaTable(f"{config.output.root}/patients").delete("patient_id != '009'")
    monkeypatch.setattr("jobs.patients.MAX_BAG_BYTES", sizes[largest] - 1)
    with unchanged(config, "slides", "tiles", "features"):
        run = preprocess_in(spark, config)
    [problem] = run.record.problems
    tiles, fit = before[largest]["n_tiles"], (sizes[largest] - 1) // (256 * 4)
    for part in (
        f"patient {largest}",
        f"{tiles} tiles",
        f"{sizes[largest]:,} bytes",
        "max_tiles_per_patient",
        f" {fit} ",
    ):
        assert part in problem
    after = rows_of(config, "patients")
    expected = [row for row in rows_of(finished.config, "patients") if row["patient_id"] != largest]
    assert without(after, "run_id") == without(expected, "run_id")
    with unchanged(config, "slides", "tiles", "features", "patients"):
        assert preprocess_in(spark, config).record.problems == [problem]  # said every time, until it is mended


@pytest.mark.parametrize("limit", ["MAX_BAG_BYTES", "heap_bytes"])
def test_with_less_room_a_right_row_stays_and_nothing_is_said(
    spark: SparkSession, again: Callable[..., Config], monkeypatch: pytest.MonkeyPatch, limit: str
) -> None:
    config = again()
    monkeypatch.setattr(f"jobs.patients.{limit}", 1 if limit == "MAX_BAG_BYTES" else lambda _: HEAP_A_BAG)
    with unchanged(config, "features", "patients"):
        run = preprocess_in(spark, config, retry_failed=True)  # patient 004 has a slide that failed and is tried again
    assert run.record.problems == []


def test_with_less_room_an_outdated_row_stays_and_is_named(
    spark: SparkSession, again: Callable[..., Config], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = again([(*row[:4], "CE") if row[2] == "002" else row for row in COHORT])  # so that its row is built again
    monkeypatch.setattr("jobs.patients.heap_bytes", lambda _: HEAP_A_BAG)
    for _ in range(2):  # said every time, until it is mended
        with unchanged(config, "features", "patients"):
            [problem] = preprocess_in(spark, config).record.problems
        assert "patient 002" in problem and "its row stays" in problem
    monkeypatch.undo()
    run = preprocess_in(spark, config)
    assert run.record.problems == [] and by(rows_of(config, "patients"), "patient_id")["002"]["label"] == "CE"


@pytest.mark.parametrize(
    ("room", "executors", "tasks"), [(0.5, 1, 1), (1, 1, 1), (2, 1, 2), (3.9, 1, 3), (1, 3, 3), (2, 2, 4), (100, 1, 5)]
)
def test_large_bags_are_built_by_as_many_tasks_as_the_heap_has_room_for(
    room: float, executors: int, tasks: int
) -> None:
    largest, small = 50_000 * 1280 * 2, 1_000 * 1280 * 2  # bytes
    heap = int(room * HEAP_A_BAG * largest)
    assert tasks_for([largest, small] * 5, heap, executors) == tasks, "five files of a quarter of a gigabyte"
    assert tasks_for([], heap, executors) == 1


def test_on_one_machine_the_heap_is_that_of_one(spark: SparkSession) -> None:
    assert plain_executors(spark) == 1
