"""What job vectors changes in a table, and in which wave."""

from jobs.vectors import Changes, VectorKey, VectorRow, changes_of

MOVED, GONE, STAYS = (VectorKey(slide, "small", "mean") for slide in ("moved", "gone", "stays"))


def test_the_row_of_a_slide_that_moved_to_another_patient_is_replaced_in_one_wave() -> None:
    have = {MOVED: VectorRow("P9", 3, "old"), GONE: VectorRow("P9", 1, "old"), STAYS: VectorRow("P1", 2, "same")}
    wanted = {MOVED: VectorRow("P1", 3, "new"), STAYS: VectorRow("P1", 2, "same")}
    changes, _ = changes_of(wanted, have, {})
    waves = {patient: changes.of_patients([patient]) for patient in changes.patients}
    assert waves.keys() == {"P1", "P9"}
    assert (waves["P1"].due.keys(), waves["P1"].replaced.keys()) == ({MOVED}, {MOVED})
    assert (waves["P9"].due.keys(), waves["P9"].replaced.keys()) == (set(), {GONE})
    assert changes.of_patients(["P1", "P9"]) == changes != Changes()
