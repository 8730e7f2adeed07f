"""Probabilities of new patients, one bag at a time; their rows of table predictions and their CSV."""

import csv
import io
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from jobs.training.feed import Feed
from jobs.training.feed.bags import TILE
from jobs.training.model.files import ModelCard
from jobs.training.model.mil import BagModel
from udfs.schemas import PREDICTIONS

# Columns of CSVs that also have one column per class: of job predict, and of train for validation and test.
SUBMISSION_COLUMNS = ("patient_id", "from_prior")
HELD_OUT_COLUMNS = ("patient_id", "split", "center_id", "label")
VERSION = 2  # raise it when the same model and bag give other rows


@dataclass(frozen=True)
class Prediction:
    """The prediction of a patient; n tiles, c classes."""

    patient_id: str
    probabilities: NDArray[np.float64]  # [c], in the order of the model's classes; they sum to 1
    attention: NDArray[np.float32]  # [n], sums to 1
    tiles: NDArray[Any]  # structured (image_id, x_px, y_px) [n]: places of the attention, level-0 pixels


def predict_each(model: BagModel, feed: Feed) -> Iterator[Prediction]:
    """Yields the patients of a feed of batches of 1 with column tile_index; one bag is in memory beside the feed's own."""
    for bags in feed.epoch(0):
        probabilities, attention = model.predict(bags)
        [patient_id], tiles = bags.patient_id, bags.tile_index
        if tiles is None:
            raise ValueError("attention belongs to tiles: ask the feed for column tile_index")
        exact = probabilities[0].double().numpy()  # the sum of float32 is 1 to 7 digits
        yield Prediction(patient_id, exact / exact.sum(), attention.numpy(), tiles[0])


def prior_prediction(patient_id: str, prior: Sequence[float]) -> Prediction:
    """Returns the prediction of a patient without a bag: the classes' shares among the patients trained on."""
    shares = np.array(prior, np.float64)
    return Prediction(patient_id, shares / shares.sum(), np.zeros(0, np.float32), np.empty(0, TILE))


@dataclass(frozen=True)
class Basis:
    """The input of a prediction."""

    params_hash: str  # of all of it
    n_tiles: int  # of the patient's bag; 0: no bag
    n_images_failed: int  # slides of the patient that the bag lacks because they failed
    n_images_without_tiles: int  # slides of the patient that were read and have no tile


def as_table(predictions: Sequence[Prediction], bases: Mapping[str, Basis], card: ModelCard, run_id: str) -> pa.Table:
    """Returns rows of table predictions; a patient without tiles has the prior and no predicted class. `bases`: by patient_id."""
    classes = card.classes
    sizes = [len(each.attention) for each in predictions]
    tiles = np.concatenate([each.tiles for each in predictions])
    weights = np.concatenate([each.attention for each in predictions])
    kind = PREDICTIONS.field("attention").type
    fields = list(kind.value_type)
    columns = [tiles["image_id"], tiles["x_px"], tiles["y_px"], weights]
    cells = [pa.array(column, field.type) for column, field in zip(columns, fields, strict=True)]
    offsets = pa.array(np.cumsum([0, *sizes]), pa.int32())
    rows = [
        vars(bases[each.patient_id])
        | {
            "patient_id": each.patient_id,
            "model_id": card.model_id,
            "encoder": card.encoder,
            "probabilities": list(zip(classes, each.probabilities.tolist(), strict=True)),
            "predicted_class": classes[int(each.probabilities.argmax())] if size else None,
            "from_prior": size == 0,
            "n_tiles": size,
            "run_id": run_id,
        }
        for each, size in zip(predictions, sizes, strict=True)
    ]
    table = pa.Table.from_pylist(rows, PREDICTIONS)
    attention = pa.ListArray.from_arrays(offsets, pa.StructArray.from_arrays(cells, fields=fields)).cast(kind)
    return table.set_column(PREDICTIONS.get_field_index("attention"), PREDICTIONS.field("attention"), attention)


def submission_csv(
    probabilities: Mapping[str, Mapping[str, float]], classes: Sequence[str], from_prior: Collection[str]
) -> bytes:
    """Returns ``patient_id,CE,LAA,from_prior``: one row per patient, sorted; each row's numbers sum to 1 within 1e-12.

    `from_prior`: the patients without a bag. The model did not see them; they have true in that column, others false.
    """
    first, last = SUBMISSION_COLUMNS
    rows: list[list[str]] = [[first, *classes, last]]
    for patient_id in sorted(probabilities):
        numbers = (repr(float(probabilities[patient_id][name])) for name in classes)
        rows.append([patient_id, *numbers, "true" if patient_id in from_prior else "false"])
    return csv_of(rows)


def csv_of(rows: Iterable[Sequence[str]]) -> bytes:
    """Returns a CSV in UTF-8."""
    text = io.StringIO(newline="")
    csv.writer(text, lineterminator="\n").writerows(rows)
    return text.getvalue().encode()
