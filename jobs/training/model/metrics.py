"""How good probabilities are: AUROC, log losses, calibration and confusion, with bootstrap intervals.

Every figure is computed for many resamples at once, which is 300 times as fast as scikit-learn's, one resample after another.
A resample of n patients is how often each was drawn: axes r resamples, n patients, c classes; a row of ones is the sample
itself. The tests hold the figures against scikit-learn's.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from sklearn.metrics import confusion_matrix

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
Metric = Callable[[Ints, Floats, Floats], Floats]  # labels [n], probabilities [n, c], counts [r, n] -> [r]

BINS = 10  # of confidence, for calibration
_SMALLEST = 1e-15  # a probability, before its logarithm; as in the STRIP AI challenge
_RESAMPLES, _TAIL = 1000, 0.025  # 95 of 100 resamples lie between the tails
_NUMBERS_AT_ONCE = 10_000_000


def auroc(labels: Ints, probabilities: Floats, counts: Floats) -> Floats:
    """Returns the area under the ROC curve: of the second class if there are two, else the mean over one class against the rest.

    Classes without a patient in `labels` are left out. NaN for a resample that lacks one of the others, and if all patients
    have one class.
    """
    classes = [1] if probabilities.shape[1] == 2 else np.unique(labels)
    return np.asarray(np.mean([_area(labels == k, probabilities[:, k], counts) for k in classes], axis=0))


def _area(positive: NDArray[np.bool_], scores: Floats, counts: Floats) -> Floats:
    """Returns the chance that a positive scores above a negative; ties count half (Mann and Whitney)."""
    order = np.argsort(scores, kind="stable")
    starts = np.flatnonzero(np.diff(scores[order], prepend=-np.inf))  # of runs of equal scores
    drawn = counts[:, order]
    wins = np.add.reduceat(drawn * positive[order], starts, axis=1)
    losses = np.add.reduceat(drawn * ~positive[order], starts, axis=1)
    below = np.cumsum(losses, axis=1) - losses / 2
    with np.errstate(invalid="ignore"):  # 0 / 0 is NaN
        return np.asarray((wins * below).sum(1) / (wins.sum(1) * losses.sum(1)))


def log_loss(labels: Ints, probabilities: Floats, counts: Floats) -> Floats:
    """Returns the mean of -ln of the probability of the true class, a row of probabilities divided by its sum."""
    return _mean(_losses(labels, probabilities), counts)


def weighted_log_loss(labels: Ints, probabilities: Floats, counts: Floats) -> Floats:
    """Returns the weighted multi-class log loss of the STRIP AI challenge: the mean over classes of their patients' mean loss.

    All classes weigh the same, as there: ``-(sum_k w_k sum_i y_ik ln(p_ik) / n_k) / sum_k w_k``, a row of probabilities
    divided by its sum, then cut to 1e-15 and 1 - 1e-15. Classes without a patient are left out.
    """
    return _mean_of_classes(_losses(labels, probabilities), labels, counts)


def _losses(labels: Ints, probabilities: Floats) -> Floats:
    shares = probabilities / probabilities.sum(1, keepdims=True)
    true = np.clip(shares[np.arange(len(labels)), labels], _SMALLEST, 1 - _SMALLEST)
    return np.array([-math.log(share) for share in true.tolist()])  # NumPy's logarithm differs between its versions


def _mean(values: NDArray[Any], counts: Floats) -> Floats:
    return np.asarray(counts @ values / counts.sum(1))


def _mean_of_classes(values: NDArray[Any], labels: Ints, counts: Floats) -> Floats:
    """Returns the mean over the classes in a resample of their mean."""
    member = (labels[:, None] == np.unique(labels)).astype(np.float64)
    sizes = counts @ member
    sums = counts @ (member * values[:, None])
    return np.asarray((sums / np.maximum(sizes, 1)).sum(1) / (sizes > 0).sum(1))


def accuracy(labels: Ints, probabilities: Floats, counts: Floats) -> Floats:
    """Returns the share of patients whose most probable class is the true one."""
    return _mean(probabilities.argmax(1) == labels, counts)


def balanced_accuracy(labels: Ints, probabilities: Floats, counts: Floats) -> Floats:
    """Returns the mean over the classes that have patients of their accuracy."""
    return _mean_of_classes(probabilities.argmax(1) == labels, labels, counts)


def calibration_error(labels: Ints, probabilities: Floats, counts: Floats) -> Floats:
    """Returns the expected calibration error: by bins of confidence, the mean gap between confidence and accuracy.

    Guo et al. 2017, doi:10.48550/arXiv.1706.04599, equation 3: of the most probable class, in `BINS` bins of equal width.
    A perfectly calibrated sample of n patients has about ``sqrt(bins / n) / 3``, not 0.
    """
    confidence = probabilities.max(1)
    gap = (probabilities.argmax(1) == labels) - confidence
    return np.asarray(np.abs(counts @ (_in_bin(confidence) * gap[:, None])).sum(1) / counts.sum(1))


def _in_bin(confidence: Floats) -> NDArray[np.bool_]:
    """Returns [n, BINS], one-hot; upper edges belong to their bin."""
    place = np.clip(np.ceil(confidence * BINS).astype(np.int64) - 1, 0, BINS - 1)
    return np.asarray(place[:, None] == np.arange(BINS))


METRICS: dict[str, Metric] = {
    metric.__name__: metric
    for metric in (auroc, log_loss, weighted_log_loss, accuracy, balanced_accuracy, calibration_error)
}


def metric_values(labels: Ints, probabilities: Floats) -> dict[str, float]:
    """Returns every metric of a sample; NaN if it has none."""
    counts = np.ones((1, len(labels)))
    return {name: float(metric(labels, probabilities, counts)[0]) for name, metric in METRICS.items()}


@dataclass(frozen=True)
class Interval:
    """A figure and its range in 95 of 100 resamples; None if it is unknown since a class is absent."""

    value: float | None
    low: float | None
    high: float | None

    def __str__(self) -> str:
        if self.value is None:
            return "-"
        return f"{self.value:.3f} [{self.low:.3f}, {self.high:.3f}]" if self.low is not None else f"{self.value:.3f}"


@dataclass(frozen=True)
class ReliabilityBin:
    """Patients of similar confidence in their most probable class."""

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


def evaluate_split(
    labels: Ints, probabilities: Floats, classes: Sequence[str], centers: Sequence[str], seed: int = 0
) -> Evaluation:
    """Returns every figure of a split, overall and for each centre.

    `labels` [n] are indices into `classes`, rows of `probabilities` [n, c] sum to 1. An interval is from percentile 2.5 to 97.5
    of those of 1000 resamples of patients, with replacement, that have the figure. Raises ValueError if there is no patient or
    labels do not fit.
    """
    probabilities = np.asarray(probabilities, np.float64)
    if not len(labels) or probabilities.shape != (len(labels), len(classes)) or not 0 <= labels.min() <= labels.max():
        raise ValueError(f"{len(labels)} labels and probabilities {probabilities.shape} for {len(classes)} classes")
    of_center = {center: np.asarray(centers) == center for center in sorted(set(centers))}
    confusion = confusion_matrix(labels, probabilities.argmax(1), labels=range(len(classes)))
    return Evaluation(
        classes=tuple(classes),
        n=len(labels),
        n_by_class=dict(zip(classes, confusion.sum(1).tolist(), strict=True)),
        metrics=_intervals(labels, probabilities, seed),
        confusion=confusion.tolist(),
        reliability=_reliability(labels, probabilities),
        by_center={name: _intervals(labels[here], probabilities[here], seed) for name, here in of_center.items()},
        n_by_center={name: int(here.sum()) for name, here in of_center.items()},
    )


def _intervals(labels: Ints, probabilities: Floats, seed: int) -> dict[str, Interval]:
    n, rng = len(labels), np.random.default_rng(seed)
    resampled: dict[str, list[float]] = {name: [] for name in METRICS}
    at_once = max(1, min(_RESAMPLES, _NUMBERS_AT_ONCE // n))
    for start in range(0, _RESAMPLES, at_once):
        counts = rng.multinomial(n, np.full(n, 1 / n), min(at_once, _RESAMPLES - start)).astype(np.float64)
        for name, metric in METRICS.items():
            resampled[name] += metric(labels, probabilities, counts).tolist()
    intervals = {}
    for name, value in metric_values(labels, probabilities).items():
        values = [each for each in resampled[name] if np.isfinite([value, each]).all()]
        low, high = np.quantile(values, (_TAIL, 1 - _TAIL)).tolist() if values else (None, None)
        intervals[name] = Interval(value if np.isfinite(value) else None, low, high)
    return intervals


def _reliability(labels: Ints, probabilities: Floats) -> list[ReliabilityBin]:
    confidence, right = probabilities.max(1), probabilities.argmax(1) == labels
    return [
        ReliabilityBin(
            k / BINS, (k + 1) / BINS, int(here.sum()), confidence[here].mean().item(), right[here].mean().item()
        )
        for k, here in enumerate(_in_bin(confidence).T)
        if here.any()
    ]
