"""How good probabilities are: AUROC, log losses, calibration and confusion, with bootstrap intervals.

Every figure is computed for many resamples at once. A resample of n patients is how often each was drawn: axes r resamples,
n patients, c classes; a row of ones is the sample itself.
"""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
Metric = Callable[[Ints, Floats, Floats], Floats]  # labels [n], probabilities [n, c], counts [r, n] -> [r]

BINS = 10  # of confidence, for calibration
_SMALLEST = 1e-15  # a probability, before its logarithm; as the STRIP AI challenge does
_RESAMPLES, _COVERAGE = 1000, 0.95
_NUMBERS_AT_ONCE = 10_000_000


def auroc(labels: Ints, probabilities: Floats, counts: Floats) -> Floats:
    """Area under the ROC curve: of the second class if there are two, else the mean over one class against the rest.

    Classes without a patient in `labels` are left out. NaN for a resample that lacks one of the others, and if all patients
    have one class.
    """
    classes = [1] if probabilities.shape[1] == 2 else np.unique(labels)
    areas = [_area(labels == k, probabilities[:, k], counts) for k in classes]
    return np.asarray(np.mean(areas, axis=0))


def _area(positive: NDArray[np.bool_], scores: Floats, counts: Floats) -> Floats:
    """The chance that a positive scores above a negative, ties for half (Mann and Whitney)."""
    order = np.argsort(scores, kind="stable")
    starts = np.flatnonzero(np.diff(scores[order], prepend=-np.inf))  # of runs of equal scores
    drawn = counts[:, order]
    wins = np.add.reduceat(drawn * positive[order], starts, axis=1)
    losses = np.add.reduceat(drawn * ~positive[order], starts, axis=1)
    below = np.cumsum(losses, axis=1) - losses / 2
    pairs = wins.sum(1) * losses.sum(1)
    with np.errstate(invalid="ignore"):
        return np.asarray(np.where(pairs > 0, (wins * below).sum(1) / np.where(pairs > 0, pairs, 1), np.nan))


def log_loss(labels: Ints, probabilities: Floats, counts: Floats) -> Floats:
    """Mean of -ln of the probability of what was true."""
    return np.asarray(counts @ _losses(labels, probabilities) / counts.sum(1))


def weighted_log_loss(labels: Ints, probabilities: Floats, counts: Floats) -> Floats:
    """The weighted multi-class log loss of the STRIP AI challenge: a mean over classes of the mean over their patients.

    All classes weigh the same, as there: ``-(sum_k w_k sum_i y_ik ln(p_ik) / n_k) / sum_k w_k``, a row of probabilities
    divided by its sum, then cut to 1e-15 and 1 - 1e-15. Classes without a patient are left out.
    """
    losses = _losses(labels, probabilities)
    member = (labels[:, None] == np.arange(probabilities.shape[1])).astype(np.float64)
    sizes = counts @ member
    sums = counts @ (member * losses[:, None])
    there = sizes > 0
    return np.asarray((sums / np.where(there, sizes, 1)).sum(1) / there.sum(1))


def _losses(labels: Ints, probabilities: Floats) -> Floats:
    shares = probabilities / probabilities.sum(1, keepdims=True)
    return np.asarray(-np.log(np.clip(shares[np.arange(len(labels)), labels], _SMALLEST, 1 - _SMALLEST)))


def accuracy(labels: Ints, probabilities: Floats, counts: Floats) -> Floats:
    """Share of patients whose most probable class is the true one."""
    return np.asarray(counts @ (probabilities.argmax(1) == labels) / counts.sum(1))


def balanced_accuracy(labels: Ints, probabilities: Floats, counts: Floats) -> Floats:
    """Mean over the classes that are there of the share of their patients found."""
    member = (labels[:, None] == np.arange(probabilities.shape[1])).astype(np.float64)
    sizes = counts @ member
    found = counts @ (member * (probabilities.argmax(1) == labels)[:, None])
    there = sizes > 0
    return np.asarray((found / np.where(there, sizes, 1)).sum(1) / there.sum(1))


def calibration_error(labels: Ints, probabilities: Floats, counts: Floats) -> Floats:
    """Expected calibration error: by bins of confidence, the mean gap between confidence and accuracy.

    Guo et al. 2017, doi:10.48550/arXiv.1706.04599, equation 3: of the most probable class, in `BINS` bins of equal width.
    A sample of n patients that is calibrated perfectly has about ``sqrt(bins / n) / 3``, not 0.
    """
    confidence = probabilities.max(1)
    gap = (probabilities.argmax(1) == labels) - confidence
    return np.asarray(np.abs(counts @ (_in_bin(confidence) * gap[:, None])).sum(1) / counts.sum(1))


def _in_bin(confidence: Floats) -> Floats:
    """[n, BINS], one-hot; upper edges belong to their bin."""
    place = np.clip(np.ceil(confidence * BINS).astype(np.int64) - 1, 0, BINS - 1)
    return np.asarray(place[:, None] == np.arange(BINS), np.float64)


METRICS: dict[str, Metric] = {
    "auroc": auroc,
    "log_loss": log_loss,
    "weighted_log_loss": weighted_log_loss,
    "accuracy": accuracy,
    "balanced_accuracy": balanced_accuracy,
    "calibration_error": calibration_error,
}


def measure(labels: Ints, probabilities: Floats) -> dict[str, float]:
    """Every metric of a sample. NaN where it has none."""
    counts = np.ones((1, len(labels)))
    return {name: float(metric(labels, probabilities, counts)[0]) for name, metric in METRICS.items()}


@dataclass(frozen=True)
class Interval:
    """A figure and where it lies in 95 of 100 resamples; None where it can't be told, a class being absent."""

    value: float | None
    low: float | None
    high: float | None

    def __str__(self) -> str:
        if self.value is None:
            return "-"
        return f"{self.value:.3f} [{self.low:.3f}, {self.high:.3f}]" if self.low is not None else f"{self.value:.3f}"


@dataclass(frozen=True)
class ReliabilityBin:
    """Patients of like confidence in their most probable class."""

    low: float
    high: float
    n: int
    confidence: float
    accuracy: float


@dataclass(frozen=True)
class Evaluation:
    """All figures of one split."""

    classes: tuple[str, ...]
    n: int
    n_by_class: dict[str, int]
    metrics: dict[str, Interval]
    confusion: list[list[int]]  # [true][most probable]
    reliability: list[ReliabilityBin]  # bins with patients only
    by_center: dict[str, dict[str, Interval]]  # with n_by_class, in the order of the centres' names
    n_by_center: dict[str, int]

    def to_json(self) -> dict[str, Any]:
        """As plain values."""
        return asdict(self)


def evaluate(
    labels: Ints, probabilities: Floats, classes: Sequence[str], centers: Sequence[str], seed: int = 0
) -> Evaluation:
    """Every figure of a split, overall and for each centre.

    Args:
        labels: int64 [n], indices into classes.
        probabilities: [n, c], rows sum to 1.
        classes: names.
        centers: of the patients.
        seed: of the resamples: patients drawn with replacement, 1000 times; percentiles 2.5 and 97.5 of those that have the
            figure.

    Raises:
        ValueError: there is no patient, or labels do not fit.
    """
    probabilities = np.asarray(probabilities, np.float64)
    if not len(labels) or probabilities.shape != (len(labels), len(classes)) or not 0 <= labels.min() <= labels.max():
        raise ValueError(f"{len(labels)} labels and probabilities {probabilities.shape} for {len(classes)} classes")
    of_center = np.asarray(centers)
    everyone = np.ones(len(labels), bool)
    places = {str(center): of_center == center for center in sorted(set(centers))}
    top = probabilities.argmax(1)
    confusion = np.zeros((len(classes), len(classes)), np.int64)
    np.add.at(confusion, (labels, top), 1)
    return Evaluation(
        classes=tuple(classes),
        n=len(labels),
        n_by_class={name: int((labels == k).sum()) for k, name in enumerate(classes)},
        metrics=_intervals(labels, probabilities, everyone, seed),
        confusion=confusion.tolist(),
        reliability=_reliability(labels, probabilities),
        by_center={center: _intervals(labels, probabilities, place, seed) for center, place in places.items()},
        n_by_center={center: int(place.sum()) for center, place in places.items()},
    )


def _intervals(labels: Ints, probabilities: Floats, place: NDArray[np.bool_], seed: int) -> dict[str, Interval]:
    labels, probabilities = labels[place], probabilities[place]
    n, rng = len(labels), np.random.default_rng(seed)
    resampled: dict[str, list[Floats]] = {name: [] for name in METRICS}
    at_once = max(1, min(_RESAMPLES, _NUMBERS_AT_ONCE // n))
    for start in range(0, _RESAMPLES, at_once):
        counts = rng.multinomial(n, np.full(n, 1 / n), min(at_once, _RESAMPLES - start)).astype(np.float64)
        for name, metric in METRICS.items():
            resampled[name].append(metric(labels, probabilities, counts))
    intervals = {}
    for name, value in measure(labels, probabilities).items():
        values = np.concatenate(resampled[name])
        values = values[np.isfinite(values)]
        tail = (1 - _COVERAGE) / 2
        low, high = np.quantile(values, (tail, 1 - tail)) if len(values) and np.isfinite(value) else (None, None)
        known = float(value) if np.isfinite(value) else None
        intervals[name] = Interval(known, None if low is None else float(low), None if high is None else float(high))
    return intervals


def _reliability(labels: Ints, probabilities: Floats) -> list[ReliabilityBin]:
    confidence = probabilities.max(1)
    right = probabilities.argmax(1) == labels
    member = _in_bin(confidence).astype(bool)
    return [
        ReliabilityBin(
            k / BINS,
            (k + 1) / BINS,
            int(member[:, k].sum()),
            float(confidence[member[:, k]].mean()),
            float(right[member[:, k]].mean()),
        )
        for k in range(BINS)
        if member[:, k].any()
    ]
