"""Logistic regression on patient vectors by scikit-learn: the floor that a model of bags has to beat."""

from collections.abc import Iterable
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler

from jobs.training.feed.bags import Bags
from jobs.training.model.metrics import log_loss, weighted_log_loss
from jobs.training.model.mil import LogisticModel

STRENGTHS = (1e-4, 1e-3, 1e-2, 0.1, 1.0)  # scikit-learn's C, inverse of the penalty: low for more columns than patients

Vectors = tuple[NDArray[np.float64], NDArray[np.int64]]  # [n, width], labels [n]


def collect(model: LogisticModel, batches: Iterable[Bags]) -> Vectors:
    """Returns patient vectors and labels, ordered by patient_id, whatever the order of the batches."""
    rows = {}
    for bags in batches:
        for patient, label, vector in zip(bags.patient_id, bags.label.tolist(), model.vectors(bags).cpu(), strict=True):
            rows[patient] = (label, vector.numpy())
    names = sorted(rows)
    return np.stack([rows[name][1] for name in names]), np.array([rows[name][0] for name in names], np.int64)


def fit_logistic(
    model: LogisticModel, train: Vectors, validation: Vectors | None, class_weights: Literal["balanced", "none"]
) -> tuple[float, float]:
    """Fits the model in place, the strength of its penalty chosen by the loss on validation.

    Returns:
        The strength (scikit-learn's C), and the mean loss of a patient of train.
    """
    scaler = StandardScaler().fit(train[0])
    watched = log_loss if class_weights == "none" else weighted_log_loss
    best: tuple[float, float, LogisticRegression] | None = None
    for strength in STRENGTHS if validation else (STRENGTHS[len(STRENGTHS) // 2],):
        fitted = LogisticRegression(
            C=strength, class_weight=None if class_weights == "none" else "balanced", max_iter=2000, tol=1e-6
        ).fit(scaler.transform(train[0]), train[1])
        x, y = validation or train
        probabilities = _all_classes(fitted, scaler.transform(x), len(model.spec.classes))
        loss = float(watched(y, probabilities, np.ones((1, len(y))))[0])
        if loss < (best[0] if best else np.inf):
            best = loss, strength, fitted
    if best is None:
        raise FloatingPointError(
            "no strength of the penalty has a finite loss: look for numbers in the bags that are not finite"
        )
    _, strength, fitted = best
    _take(model, scaler, fitted)
    own = _all_classes(fitted, scaler.transform(train[0]), len(model.spec.classes))
    return strength, float(watched(train[1], own, np.ones((1, len(own))))[0])


def _all_classes(fitted: LogisticRegression, x: NDArray[np.float64], classes: int) -> NDArray[np.float64]:
    """Returns probabilities with a column for all classes, also for those without a patient in train."""
    probabilities = np.zeros((len(x), classes))
    probabilities[:, fitted.classes_] = fitted.predict_proba(x)
    return probabilities


def _take(model: LogisticModel, scaler: StandardScaler, fitted: LogisticRegression) -> None:
    """Copies the numbers. Two classes have one row of coefficients, the logit of the second; the first has logit 0."""
    weight = torch.zeros_like(model.weight)
    bias = torch.full_like(model.bias, -1e9)  # a class never seen has no chance
    rows, offsets = fitted.coef_, fitted.intercept_
    if len(rows) == 1:
        rows, offsets = np.concatenate([0 * rows, rows]), np.concatenate([0 * offsets, offsets])
    for k, row, offset in zip(fitted.classes_, rows, offsets, strict=True):
        weight[k], bias[k] = torch.from_numpy(row), float(offset)
    mean, scale = torch.from_numpy(scaler.mean_), torch.from_numpy(scaler.scale_)
    model.load_state_dict({"mean": mean, "scale": scale, "weight": weight, "bias": bias})
