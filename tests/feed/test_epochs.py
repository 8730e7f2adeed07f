"""The order of epochs: everybody once, all shards equally long, whatever their number."""

from collections import Counter

from hypothesis import given, settings
from hypothesis import strategies as st

from jobs.training.feed import epochs
from jobs.training.feed.epochs import FedPatient, n_steps, plan_epoch


def _patients(groups_a_file: list[list[int]]) -> list[FedPatient]:
    """Patients of row groups of so many rows."""
    listed: list[FedPatient] = []
    group = 0
    for file, sizes in enumerate(groups_a_file):
        for size in sizes:
            for row in range(size):
                listed.append(FedPatient(f"p{len(listed)}", "", 0, 1, 4, "float32", file, group, row, 64 * 2**20))
            group += 1
    return listed


TABLES = st.lists(st.lists(st.integers(1, 5), min_size=1, max_size=4), min_size=1, max_size=5).map(_patients)


@settings(derandomize=True, deadline=None, max_examples=150)
@given(TABLES, st.integers(1, 7), st.integers(1, 9), st.integers(0, 5), st.booleans())
def test_everybody_comes_once_and_shards_are_equally_long(
    patients: list[FedPatient], world: int, batch_size: int, epoch: int, shuffle: bool
) -> None:
    came: Counter[str] = Counter()
    for rank in range(world):
        steps = plan_epoch(patients, (rank, world), batch_size, 7, epoch, shuffle)
        assert len(steps) == n_steps(len(patients), world, batch_size)
        assert all(1 <= len(step) <= batch_size for step in steps)
        # at most one step of a shard is filled up, where it has nobody left
        assert sum(turn.repeated for step in steps for turn in step) <= 1 or len(patients) < world
        came.update(turn.patient.patient_id for step in steps for turn in step if not turn.repeated)
    assert came == Counter(patient.patient_id for patient in patients)


def test_an_order_belongs_to_a_seed_and_an_epoch() -> None:
    patients = _patients([[4] * 5] * 3)
    orders = [
        tuple(turn.patient.patient_id for [turn] in plan_epoch(patients, (0, 1), 1, seed, epoch, True))
        for seed in (0, 1)
        for epoch in (0, 1, 2)
    ]
    assert len(set(orders)) == len(orders)
    again = plan_epoch(patients, (0, 1), 1, 1, 2, True)
    assert tuple(turn.patient.patient_id for [turn] in again) == orders[-1]


def test_shards_read_files_of_their_own() -> None:
    patients = _patients([[4] * 5] * 12)
    files = [
        {turn.patient.file for step in plan_epoch(patients, (rank, 4), 2, 0, 0, True) for turn in step}
        for rank in range(4)
    ]
    assert [len(those) for those in files] == [3] * 4
    assert set.union(*files) == set(range(12))


def test_neighbours_are_mixed_as_far_as_memory_goes() -> None:
    """64 MiB a patient, two of them in a row group: row groups by themselves at first, so that training begins, then two
    together.
    """
    assert epochs.MIX_BYTES == 4 * 64 * 2**20
    groups = [turn.patient.group for [turn] in plan_epoch(_patients([[2] * 33]), (0, 1), 1, 0, 0, True)]
    for first in range(0, 6, 2):
        assert len(set(groups[first : first + 2])) == 1
    for first in range(6, 66, 4):
        assert len(set(groups[first : first + 4])) == 2
    assert any(groups[i] == groups[i + 2] != groups[i + 1] for i in range(6, 64))
