"""The report on a model by held-out patients: text, a picture, and their probabilities as CSV."""

import io
from collections.abc import Mapping

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from sklearn.metrics import roc_curve

from jobs.training.model.fit import Predictions
from jobs.training.model.metrics import Evaluation
from jobs.training.model.predictions import HELD_OUT_COLUMNS, csv_of
from udfs.wording import named

_FEW = 100  # patients; with fewer, intervals are so wide that figures mean little
_VERY_FEW = 10  # patients of a class; with fewer, a bootstrap draws the same ones again and again
_BLUE, _GREY = "#2a6f97", "#8d99ae"


def report_text(name: str, evaluation: Evaluation) -> str:
    """Returns lines with every figure and its interval, overall and by centre, and the confusion."""
    classes = [named(label) for label in evaluation.classes]
    by_class = ", ".join(f"{count} {named(label)}" for label, count in evaluation.n_by_class.items())
    lines = [f"  {name}: {evaluation.n} patients ({by_class}); in brackets, 95 of 100 bootstrap resamples"]
    lines += [f"    {metric:<18} {interval}" for metric, interval in evaluation.metrics.items()]
    width = max(len(label) for label in classes) + 2
    head = "".join(f"{label:>{max(width, 7)}}" for label in classes)
    lines.append(f"    {'true / predicted':<18}{head}")
    for label, row in zip(classes, evaluation.confusion, strict=True):
        lines.append(f"    {label:<18}" + "".join(f"{count:>{max(width, 7)}}" for count in row))
    lines.append(f"    {'centre':<14}{'patients':>9}  {'auroc':<22}log_loss")
    for center, metrics in evaluation.by_center.items():
        figures = "".join(f"{metrics[metric]!s:<22}" for metric in ("auroc", "log_loss"))
        lines.append(f"    {named(center):<14}{evaluation.n_by_center[center]:>9}  {figures.rstrip()}")
    too_few = f"    {evaluation.n} patients are too few to tell models apart"
    if min(evaluation.n_by_class.values()) < _VERY_FEW:
        lines.append(f"{too_few}, and the intervals of so few are too narrow")
    elif evaluation.n < _FEW:
        lines.append(f"{too_few}: look at the intervals")
    return "\n".join(lines)


def predictions_csv(predictions: Mapping[str, Predictions], classes: tuple[str, ...]) -> bytes:
    """Returns a CSV of patient_id, split, center_id, label, and one probability per class."""
    rows: list[list[str]] = [[*HELD_OUT_COLUMNS, *classes]]
    for split, found in predictions.items():
        patients = zip(found.patient_id, found.center_id, found.labels, found.probabilities.tolist(), strict=True)
        rows += ([name, split, center, classes[label], *map(repr, values)] for name, center, label, values in patients)
    return csv_of(rows)


def draw_report(title: str, predictions: Predictions, evaluation: Evaluation) -> bytes:
    """Returns a PNG of three panels: ROC, reliability, confusion."""
    figure = Figure(figsize=(13.5, 4.6), layout="constrained")
    figure.suptitle(title)
    roc, reliability, confusion = figure.subplots(1, 3)
    _draw_roc(roc, predictions, evaluation)
    _draw_reliability(reliability, evaluation)
    _draw_confusion(confusion, evaluation)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    return buffer.getvalue()


def _draw_roc(axes: Axes, predictions: Predictions, evaluation: Evaluation) -> None:
    classes = evaluation.classes
    for k in [1] if len(classes) == 2 else range(len(classes)):
        positive = predictions.labels == k
        if positive.any() and not positive.all():
            false, true, _ = roc_curve(positive, predictions.probabilities[:, k])
            label = f"{classes[k]} against {'the rest' if len(classes) > 2 else classes[0]}"
            axes.plot(false, true, label=label, color=_BLUE if len(classes) == 2 else None)
    axes.plot([0, 1], [0, 1], color=_GREY, linestyle=":", linewidth=1)
    axes.set(xlabel="false positive rate", ylabel="true positive rate", xlim=(-0.01, 1.01), ylim=(-0.01, 1.01))
    axes.set_title(f"ROC, AUROC {evaluation.metrics['auroc']}", fontsize=10)
    axes.set_aspect("equal")
    if axes.get_legend_handles_labels()[0]:
        axes.legend(loc="lower right", fontsize=9, frameon=False)


def _draw_reliability(axes: Axes, evaluation: Evaluation) -> None:
    bins = evaluation.reliability
    axes.plot([0, 1], [0, 1], color=_GREY, linestyle=":", linewidth=1)
    axes.plot([each.confidence for each in bins], [each.accuracy for each in bins], "o-", color=_BLUE)
    for each in bins:
        axes.annotate(f"{each.n}", (each.confidence, each.accuracy), (5, -11), textcoords="offset points", fontsize=8)
    axes.set(xlabel="confidence (probability of the most probable class)", ylabel="share that is right")
    axes.set(xlim=(1 / len(evaluation.classes) - 0.03, 1.03), ylim=(-0.03, 1.03))
    axes.set_title(f"Reliability, error {evaluation.metrics['calibration_error']}; patients per bin", fontsize=10)


def _draw_confusion(axes: Axes, evaluation: Evaluation) -> None:
    counts = np.array(evaluation.confusion)
    shares = counts / np.maximum(counts.sum(1, keepdims=True), 1)
    axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    places = range(len(evaluation.classes))
    axes.set_xticks(places, evaluation.classes)
    axes.set_yticks(places, evaluation.classes)
    for (i, j), count in np.ndenumerate(counts):
        axes.text(j, i, str(count), ha="center", va="center", color="white" if shares[i, j] > 0.5 else "black")
    axes.set(xlabel="most probable", ylabel="true")
    axes.set_title(f"Confusion, balanced accuracy {evaluation.metrics['balanced_accuracy']}", fontsize=10)
