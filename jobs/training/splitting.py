"""Who is in train, validation and test: patients dealt to splits or folds, stratified, by their number of images. Plain Python.

The method is minimisation (Pocock and Simon 1975, doi:10.2307/2529712), with unequal shares, and images as units. Margins are
the cohort, each centre, each label, and each label of each centre. Each margin has a deficit in each split: its share of the
images, less the images dealt already. A hash of seed and patient_id orders the patients, and each goes where the sum of its
margins' deficits is largest, whatever its own number of images. Then single patients are dealt again while that brings the
margins nearer to their shares. (scikit-learn's StratifiedGroupKFold knows no unequal shares, and moves patients when others
come.)

Small margins: a centre of three patients cannot be dealt 80/10/10. So the shares hold over the cohort, and in each margin as
far as whole patients allow. A split may lack patients of a small centre, and which ones it gets changes with the seed.
"""

import hashlib
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Literal, TypeVar

from udfs.wording import named

VERSION = 1  # raise it when the same settings deal otherwise
SPLITS = ("train", "validation", "test")
Stratum = Literal["center_id", "label"]
Part = TypeVar("Part", str, int)  # a split or a fold
_EPSILON = 1e-6  # images; less is rounding of floats


@dataclass(frozen=True)
class Patient:
    """What counts of a patient when it is dealt."""

    patient_id: str
    center_id: str
    label: str | None
    n_images: int


def assign_splits(
    patients: Iterable[Patient],
    fractions: Mapping[str, float],
    assigned: Mapping[str, str],
    *,
    stratify: Sequence[Stratum] = ("center_id", "label"),
    seed: int = 0,
) -> dict[str, str]:
    """Returns the split of each patient by patient_id.

    Every split's images differ from its share by at most the images of the largest patient, if nobody had a split before, or
    got it from this function with the same number of images.

    `patients` are all, in any order, also those that have a split. `fractions` are the shares of the images; they sum to 1.
    `assigned` has the splits of patients that keep theirs. `stratify` names the margins beside the cohort.
    """
    return _deal(patients, fractions, assigned, stratify, f"splits {seed}")


def assign_folds(
    patients: Iterable[Patient],
    folds: int,
    assigned: Mapping[str, int],
    *,
    stratify: Sequence[Stratum] = ("center_id", "label"),
    seed: int = 0,
) -> dict[str, int]:
    """Returns the fold, 0 to folds - 1, of each patient of train and validation; as `assign_splits`, with equal shares."""
    return _deal(patients, dict.fromkeys(range(folds), 1 / folds), assigned, stratify, f"folds {seed}")


@dataclass(frozen=True)
class ClassGaps:
    """The splits that lack a class, one text each."""

    refused: list[str]  # training refuses the splits, since nothing can be learned or measured
    lacking: list[str]  # validation and test with two classes or more, which are measured without the others


def missing_classes(labels: Mapping[str, Iterable[str | None]]) -> ClassGaps:
    """Returns which splits lack a class. Validation and test without a labelled patient lack none.

    `labels` are those of the patients of each split, train among them; None for a patient without one.
    """
    counts = {name: Counter(label for label in of_split if label is not None) for name, of_split in labels.items()}
    classes = sorted(set().union(*counts.values()))
    if len(classes) < 2:
        n = sum(found.total() for found in counts.values())
        return ClassGaps([f"{n} labelled patients have {len(classes)} classes, and two at least are needed"], [])
    gaps = ClassGaps([], [])
    for name, found in counts.items():
        missing = [label for label in classes if not found[label]]
        if missing and (found or name == "train"):
            texts = gaps.refused if name == "train" or len(found) < 2 else gaps.lacking
            texts.append(f"split {name} has {found.total()} labelled patients, 0 of {', '.join(map(named, missing))}")
    return gaps


def _deal(
    patients: Iterable[Patient],
    shares: Mapping[Part, float],
    assigned: Mapping[str, Part],
    stratify: Sequence[Stratum],
    salt: str,
) -> dict[str, Part]:
    by_chance = sorted(patients, key=lambda patient: hashlib.sha256(f"{salt} {patient.patient_id}".encode()).digest())
    margins = {patient.patient_id: _margins(patient, stratify) for patient in by_chance}
    parts = [part for part, share in shares.items() if share > 0]
    deficits: dict[tuple[object, ...], dict[Part, float]] = defaultdict(lambda: dict.fromkeys(shares, 0.0))
    for patient in by_chance:
        for margin in margins[patient.patient_id]:
            for part, share in shares.items():
                deficits[margin][part] += share * patient.n_images

    def put(patient: Patient, part: Part, sign: int = 1) -> None:
        for margin in margins[patient.patient_id]:
            deficits[margin][part] -= sign * patient.n_images

    def pull(patient: Patient, part: Part) -> float:
        return sum(deficits[margin][part] for margin in margins[patient.patient_id])

    def move(patient: Patient, part: Part) -> None:
        put(patient, dealt[patient.patient_id], -1)
        dealt[patient.patient_id] = part
        put(patient, part)

    dealt: dict[str, Part] = {}
    new = [patient for patient in by_chance if patient.patient_id not in assigned]
    for patient in by_chance:
        if patient.patient_id in assigned:
            dealt[patient.patient_id] = assigned[patient.patient_id]
            put(patient, assigned[patient.patient_id])
    for patient in new:
        dealt[patient.patient_id] = max(parts, key=lambda part: pull(patient, part))
        put(patient, dealt[patient.patient_id])

    # Each move lessens the sum of all squared deficits, so this ends.
    moved = True
    while moved:
        moved = False
        for patient in new:
            here = dealt[patient.patient_id]
            there = max(parts, key=lambda part: pull(patient, part))
            gain = pull(patient, there) - pull(patient, here) - patient.n_images * len(margins[patient.patient_id])
            if gain > _EPSILON:
                move(patient, there)
                moved = True
    # The sum over all margins may leave the cohort itself further off than a patient: its own shares come first.
    whole = deficits[()]
    largest = max((patient.n_images for patient in by_chance), default=0)
    while new:
        there = max(parts, key=lambda part: whole[part])
        far = [patient for patient in new if whole[there] - whole[dealt[patient.patient_id]] > largest + _EPSILON]
        if not far:
            break
        move(max(far, key=lambda patient: pull(patient, there) - pull(patient, dealt[patient.patient_id])), there)
    return dealt


def _margins(patient: Patient, stratify: Sequence[Stratum]) -> list[tuple[object, ...]]:
    """Returns the keys of a patient's margins; () is the cohort."""
    values = [(name, getattr(patient, name)) for name in stratify]
    return [chosen for size in range(len(values) + 1) for chosen in combinations(values, size)]
