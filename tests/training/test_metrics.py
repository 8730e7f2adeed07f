"""The figures of a report, held against scikit-learn's and against formulas written out."""

from typing import Any

import numpy as np
import pytest
import sklearn.metrics as reference
from numpy.typing import NDArray

from jobs.training.model.metrics import BINS, METRICS, Evaluation, evaluate_split, metric_values

CLASSES = {2: ("CE", "LAA"), 3: ("CE", "LAA", "other")}


def sample(classes: int, n: int = 60, seed: int = 0) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """Labels and probabilities that know something of them; rounded, so that some scores are equal."""
    rng = np.random.default_rng(seed)
    labels = rng.choice(classes, n, p=np.arange(1, classes + 1)[::-1] / np.arange(1, classes + 1).sum())
    scores = np.round(np.exp(rng.normal(size=(n, classes)) + np.eye(classes)[labels]), 1) + 0.1
    return labels.astype(np.int64), scores / scores.sum(1, keepdims=True)


@pytest.mark.parametrize("classes", [2, 3])
@pytest.mark.parametrize("seed", range(3))
def test_figures_are_those_of_scikit_learn(classes: int, seed: int) -> None:
    labels, probabilities = sample(classes, seed=seed)
    measured = metric_values(labels, probabilities)
    of_roc = probabilities[:, 1] if classes == 2 else probabilities
    balanced = len(labels) / (classes * np.bincount(labels)[labels])
    wanted = {
        "auroc": reference.roc_auc_score(labels, of_roc, multi_class="ovr"),
        "log_loss": reference.log_loss(labels, probabilities),
        "weighted_log_loss": reference.log_loss(labels, probabilities, sample_weight=balanced),
        "accuracy": reference.accuracy_score(labels, probabilities.argmax(1)),
        "balanced_accuracy": reference.balanced_accuracy_score(labels, probabilities.argmax(1)),
    }
    assert {name: measured[name] for name in wanted} == pytest.approx(wanted, abs=1e-12)


@pytest.mark.parametrize("absent", [0, 1, 2])
def test_a_class_without_patients_is_left_out(absent: int) -> None:
    labels, probabilities = sample(3)
    there = labels != absent
    labels, probabilities = labels[there], probabilities[there]
    measured = metric_values(labels, probabilities)
    areas = [reference.roc_auc_score(labels == k, probabilities[:, k]) for k in {0, 1, 2} - {absent}]
    assert measured["auroc"] == pytest.approx(np.mean(areas), abs=1e-12)
    assert measured["balanced_accuracy"] == pytest.approx(
        reference.recall_score(
            labels, probabilities.argmax(1), labels=sorted({0, 1, 2} - {absent}), average="macro", zero_division=0
        )
    )
    assert all(np.isfinite(list(measured.values())))
    found = evaluate_split(labels, probabilities, CLASSES[3], ["a"] * len(labels))
    assert all(figure.value is not None and figure.low is not None for figure in found.metrics.values())


def test_the_weighted_log_loss_is_the_challenges_on_an_example_worked_by_hand() -> None:
    labels = np.array([0, 0, 0, 1])
    probabilities = np.array([[0.9, 0.1], [0.8, 0.2], [0.5, 0.5], [0.3, 0.7]], np.float64)
    by_hand = (-(np.log(0.9) + np.log(0.8) + np.log(0.5)) / 3 - np.log(0.7)) / 2
    assert metric_values(labels, probabilities)["weighted_log_loss"] == pytest.approx(by_hand)
    assert metric_values(labels, np.asarray(7 * probabilities))["weighted_log_loss"] == pytest.approx(
        by_hand
    )  # rows are divided by their sum
    certain = np.array([[1.0, 0.0]])
    assert metric_values(np.array([1]), certain)["log_loss"] == pytest.approx(-np.log(1e-15))


def test_calibration_is_the_weighted_gap_of_bins() -> None:
    labels, probabilities = sample(2, 200)
    top, right = probabilities.max(1), probabilities.argmax(1) == labels
    gap = 0.0
    for k in range(BINS):
        here = (top > k / BINS) & (top <= (k + 1) / BINS)
        if here.any():
            gap += here.mean() * abs(right[here].mean() - top[here].mean())
    assert metric_values(labels, probabilities)["calibration_error"] == pytest.approx(gap)


@pytest.mark.parametrize("classes", [2, 3])
@pytest.mark.parametrize("name", METRICS)
def test_a_resample_by_counts_is_the_resample_written_out(classes: int, name: str) -> None:
    labels, probabilities = sample(classes)
    rng = np.random.default_rng(1)
    counts = rng.multinomial(len(labels), np.full(len(labels), 1 / len(labels)), 5)
    by_counts = METRICS[name](labels, probabilities, counts.astype(float))
    written_out = [metric_values(np.repeat(labels, row), np.repeat(probabilities, row, axis=0))[name] for row in counts]
    assert by_counts == pytest.approx(written_out)


def test_intervals_hold_the_truth_as_often_as_they_say() -> None:
    def interval(seed: int) -> tuple[float, float]:
        rng = np.random.default_rng(seed)
        labels = rng.integers(0, 2, 80)
        right = rng.random(80) < 0.75
        p = np.where(right == (labels == 1), 0.9, 0.1)
        found = evaluate_split(labels, np.stack([1 - p, p], 1), CLASSES[2], ["a"] * 80, seed).metrics["accuracy"]
        assert found.low is not None
        assert found.high is not None
        return found.low, found.high

    held = sum(low <= 0.75 <= high for low, high in map(interval, range(100)))
    assert 88 <= held <= 100  # of 95 expected


def evaluation(**changes: Any) -> Evaluation:
    labels, probabilities = sample(3)
    centers = [f"centre {i % 2}" for i in range(len(labels))]
    arguments: dict[str, Any] = {
        "labels": labels,
        "probabilities": probabilities,
        "classes": CLASSES[3],
        "centers": centers,
    }
    return evaluate_split(**(arguments | changes))


def test_an_evaluation_counts_everybody_in_each_of_its_tables() -> None:
    found = evaluation()
    labels, probabilities = sample(3)
    assert found.n == sum(found.n_by_class.values()) == sum(found.n_by_center.values()) == len(labels)
    assert found.confusion == reference.confusion_matrix(labels, probabilities.argmax(1)).tolist()
    assert sum(each.n for each in found.reliability) == len(labels)
    for center, figures in found.by_center.items():
        here = np.array([center == f"centre {i % 2}" for i in range(len(labels))])
        assert figures["log_loss"].value == pytest.approx(reference.log_loss(labels[here], probabilities[here]))
    for figure in (*found.metrics.values(), *(f for figures in found.by_center.values() for f in figures.values())):
        assert figure.low is not None
        assert figure.value is not None
        assert figure.high is not None
        assert figure.low < figure.high
    assert evaluation() == found  # resamples are seeded


def test_what_a_sample_can_not_tell_is_left_open() -> None:
    found = evaluation(labels=np.zeros(60, np.int64))
    assert found.metrics["auroc"].value is None
    assert str(found.metrics["auroc"]) == "-"
    assert found.metrics["log_loss"].value is not None


def test_labels_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match="60 labels"):
        evaluation(labels=np.full(60, -1))
    with pytest.raises(ValueError, match="0 labels"):
        evaluation(labels=np.zeros(0, np.int64), probabilities=np.zeros((0, 3)), centers=[])
