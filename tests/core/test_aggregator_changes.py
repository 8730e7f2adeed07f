"""What job vectors changes in a table, and in which wave."""

from jobs.runtime.run.slide_tiles import TilesOfSlide
from jobs.vectors import Changes, VectorKey, VectorRow, changes_of, wanted_rows
from udfs.aggregate_tiles import Of
from udfs.wsi.aggregator.aggregator import AggregatorSpec, load_aggregator

MOVED, GONE, STAYS = (VectorKey(slide, "small", "mean") for slide in ("moved", "gone", "stays"))


def test_the_row_of_a_slide_that_moved_to_another_patient_is_replaced_in_one_wave() -> None:
    have = {MOVED: VectorRow("P9", 3, "old"), GONE: VectorRow("P9", 1, "old"), STAYS: VectorRow("P1", 2, "same")}
    wanted = {MOVED: VectorRow("P1", 3, "new"), STAYS: VectorRow("P1", 2, "same")}
    changes, _ = changes_of(wanted, have, {})
    waves = {patient: changes.of_patients([patient]) for patient in changes.patients}
    assert waves.keys() == {"P1", "P9"}
    assert waves["P1"].due.keys() == waves["P1"].replaced.keys() == {MOVED}
    assert not waves["P9"].due and waves["P9"].replaced.keys() == {GONE}
    assert changes.of_patients(["P1", "P9"]) == changes != Changes()


def test_slides_that_wait_and_their_patients_keep_the_rows_that_they_have() -> None:
    mean = {"mean": (AggregatorSpec("mean", "mean"), load_aggregator(AggregatorSpec("mean", "mean")))}
    before = [TilesOfSlide("a", "small", "P1", 3, "1"), TilesOfSlide("b", "small", "P2", 2, "1")]
    waits = [TilesOfSlide("a", "small", "P1", 3, "2"), TilesOfSlide("b", "small", "P2", 2, None)]
    waits.append(TilesOfSlide("c", "small", "P1", 2, None))
    due_of: dict[Of, set[VectorKey]] = {"image_id": {VectorKey("a", "small", "mean")}, "patient_id": set()}
    for of, due in due_of.items():
        changes, _ = changes_of(wanted_rows(waits, mean, of), wanted_rows(before, mean, of), {})
        assert changes.due.keys() == changes.replaced.keys() == due
