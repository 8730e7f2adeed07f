"""How patients are dealt to splits: shares, stickiness, determinism, as properties; and a cohort of 754 in 11 centres."""

import random
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jobs.training.splitting import SPLITS, ClassGaps, Patient, assign_folds, assign_splits, missing_classes
from tests.slides.patients import synthetic_patients

FRACTIONS = {"train": 0.8, "validation": 0.1, "test": 0.1}

cohorts = st.lists(
    st.tuples(st.sampled_from("abcd"), st.sampled_from(["CE", "LAA", None]), st.integers(1, 9)), min_size=1, max_size=60
).map(lambda rows: [Patient(f"p{i}", *row) for i, row in enumerate(rows)])
shares = st.sampled_from(
    [(0.8, 0.1, 0.1), (0.7, 0.15, 0.15), (1 / 3, 1 / 3, 1 / 3), (0.9, 0.0, 0.1), (0.5, 0.25, 0.25), (1.0, 0.0, 0.0)]
).map(lambda three: dict(zip(SPLITS, three, strict=True)))
seeds = st.integers(-3, 2**40)


def images(patients: Iterable[Patient], part_of: Mapping[str, object]) -> Counter[object]:
    counts: Counter[object] = Counter()
    for patient in patients:
        counts[part_of[patient.patient_id]] += patient.n_images
    return counts


def check_shares(patients: list[Patient], part_of: Mapping[str, object], wanted: Mapping[Any, float]) -> None:
    """Each part's images are within the largest patient's of its share."""
    counts, largest = images(patients, part_of), max(patient.n_images for patient in patients)
    total = sum(counts.values())
    for part, share in wanted.items():
        assert abs(counts[part] - share * total) <= largest + 1e-6, (part, counts)


@given(cohorts, shares, seeds)
def test_every_patient_has_one_split_and_the_fractions_hold_within_a_patient(
    patients: list[Patient], fractions: dict[str, float], seed: int
) -> None:
    split_of = assign_splits(patients, fractions, {}, seed=seed)
    assert set(split_of) == {patient.patient_id for patient in patients}
    assert set(split_of.values()) <= {split for split, share in fractions.items() if share}
    check_shares(patients, split_of, fractions)


@given(cohorts, shares, seeds, st.randoms(use_true_random=False))
def test_the_order_of_rows_changes_nothing(
    patients: list[Patient], fractions: dict[str, float], seed: int, chance: random.Random
) -> None:
    shuffled = chance.sample(patients, len(patients))
    assert assign_splits(shuffled, fractions, {}, seed=seed) == assign_splits(patients, fractions, {}, seed=seed)


@given(cohorts, st.integers(0, 60), st.integers(0, 60), shares, seeds)
def test_patients_that_are_added_move_nobody_and_fill_what_lacks(
    patients: list[Patient], first: int, second: int, fractions: dict[str, float], seed: int
) -> None:
    split_of: dict[str, str] = {}
    for part in (patients[:first], patients[: first + second], patients):
        before = split_of
        split_of = assign_splits(part, fractions, before, seed=seed)
        assert before.items() <= split_of.items()
        if part:
            check_shares(part, split_of, fractions)


@given(cohorts, st.integers(2, 7), seeds)
def test_folds_share_the_images_evenly_and_stay(patients: list[Patient], folds: int, seed: int) -> None:
    some = assign_folds(patients[::2], folds, {}, seed=seed)
    fold_of = assign_folds(patients, folds, some, seed=seed)
    assert some.items() <= fold_of.items() and set(fold_of) == {patient.patient_id for patient in patients}
    check_shares(patients, fold_of, dict.fromkeys(range(folds), 1 / folds))


def test_seeds_deal_differently_and_centres_and_labels_keep_their_shares() -> None:
    patients = synthetic_patients()
    assert (len(patients), len({patient.center_id for patient in patients})) == (754, 11)
    dealt = [assign_splits(patients, FRACTIONS, {}, seed=seed) for seed in range(5)]
    assert len({tuple(sorted(split_of.items())) for split_of in dealt}) == 5
    for split_of in dealt:
        for key in ("center_id", "label"):
            for value in {getattr(patient, key) for patient in patients}:
                margin = [patient for patient in patients if getattr(patient, key) == value]
                total = sum(patient.n_images for patient in margin)
                for split, count in images(margin, split_of).items():
                    assert abs(count - FRACTIONS[str(split)] * total) <= 4, (value, split, count, total)


def test_a_split_is_a_sample_also_of_how_many_images_patients_have() -> None:
    """Large patients go to the small splits as often as any: over many seeds, test has its share of the five-image ones."""
    patients = synthetic_patients()
    large = [patient for patient in patients if patient.n_images == 5]
    dealt = [assign_splits(patients, FRACTIONS, {}, seed=seed) for seed in range(40)]
    tested = sum(split_of[patient.patient_id] == "test" for split_of in dealt for patient in large)
    assert 0.06 <= tested / (len(dealt) * len(large)) <= 0.14


def test_what_does_not_stratify_makes_no_margin() -> None:
    patients = synthetic_patients()
    relabelled = [Patient(p.patient_id, "x", "y", p.n_images) for p in patients]
    assert assign_splits(patients, FRACTIONS, {}, stratify=()) == assign_splits(relabelled, FRACTIONS, {}, stratify=())
    assert assign_splits(patients, FRACTIONS, {}, stratify=("center_id",)) != assign_splits(patients, FRACTIONS, {})


@pytest.mark.parametrize(
    ("labels", "refused", "lacking"),
    [
        ({"train": ["A", "B", None], "validation": ["B", "A"], "test": ["A", "B"]}, [], []),
        ({"train": ["A", "B"], "validation": [], "test": [None]}, [], []),  # empty on purpose, or without a label
        (
            {"train": ["A", "A", "B"], "validation": ["A"], "test": ["B", "B"]},
            ["split validation has 1 labelled patients, 0 of B", "split test has 2 labelled patients, 0 of A"],
            [],
        ),
        (
            {"train": ["A", "B", "C"], "validation": ["A", "B"], "test": ["A", "B", "C"]},
            [],
            ["split validation has 2 labelled patients, 0 of C"],
        ),
        (
            {"train": ["A", "B", "C", "D"], "validation": ["A", "A"], "test": ["D", "B"]},
            ["split validation has 2 labelled patients, 0 of B, C, D"],
            ["split test has 2 labelled patients, 0 of A, C"],
        ),
        (
            {"train": ["A", "B"], "validation": ["A", "C"], "test": ["A", "B", "C"]},
            ["split train has 2 labelled patients, 0 of C"],
            ["split validation has 2 labelled patients, 0 of B"],
        ),
        (
            {"train": [None], "validation": ["A"], "test": ["B", "A"]},
            ["split train has 0 labelled patients, 0 of A, B", "split validation has 1 labelled patients, 0 of B"],
            [],
        ),
        (
            {"train": ["A"], "validation": ["A"], "test": []},
            ["2 labelled patients have 1 classes, and two at least are needed"],
            [],
        ),
        (
            {"train": [None], "validation": [], "test": []},
            ["0 labelled patients have 0 classes, and two at least are needed"],
            [],
        ),
    ],
)
def test_splits_that_lack_a_class_are_named_with_their_numbers(
    labels: dict[str, list[str | None]], refused: list[str], lacking: list[str]
) -> None:
    assert missing_classes(labels) == ClassGaps(refused, lacking)
