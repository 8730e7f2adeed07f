"""Probabilities of patients who have no label yet, a bag at a time; and the CSV that tells them."""

import csv
import io
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from jobs.training.feed import Feed
from jobs.training.feed.bags import tile_index
from jobs.training.model.mil import BagModel
from udfs.schemas import PREDICTIONS

_NO_CORNERS = np.zeros(0, np.int32), np.zeros(0, np.int32)
# Columns of CSVs that have one column per class too: of the job predict, and of train for validation and test.
SUBMISSION_COLUMNS = ("patient_id", "from_prior")
HELD_OUT_COLUMNS = ("patient_id", "split", "center_id", "label")
VERSION = 2  # raise it when the same model and bag begin to give other rows


@dataclass(frozen=True)
class Prediction:
    """A patient; n tiles, c classes."""

    patient_id: str
    probabilities: NDArray[np.float64]  # [c], in the order of the model's classes; they sum to 1
    attention: NDArray[np.float32]  # [n], sums to 1
    tiles: NDArray[Any]  # structured (image_id, x_px, y_px) [n]: whose attention that is; level-0 pixels


def predict_each(model: BagModel, feed: Feed) -> Iterator[Prediction]:
    """The patients of a feed of batches of 1 with column tile_index; one bag is in memory beside those that the feed holds."""
    for bags in feed.epoch(0):
        probabilities, attention = model.predict(bags)
        [patient_id], tiles = bags.patient_id, bags.tile_index
        if tiles is None:
            raise ValueError("attention belongs to tiles: ask the feed for column tile_index")
        exact = probabilities[0].double().numpy()  # of float32, which sum to 1 but for the 7th digit
        yield Prediction(patient_id, exact / exact.sum(), attention.numpy(), tiles[0])


def prior_prediction(patient_id: str, prior: Sequence[float]) -> Prediction:
    """Of a patient without a bag: the classes' shares among the patients trained on."""
    shares = np.array(prior, np.float64)
    return Prediction(patient_id, shares / shares.sum(), np.zeros(0, np.float32), tile_index([], *_NO_CORNERS))


@dataclass(frozen=True)
class Basis:
    """What a prediction rests on."""

    params_hash: str  # of all of it
    n_tiles: int  # of the patient's bag; 0: there is none
    n_images_failed: int  # slides of the patient that the bag lacks because they failed
    n_images_without_tiles: int  # slides of the patient that were read and have no tile


def as_table(
    predictions: Sequence[Prediction], bases: Mapping[str, Basis], classes: Sequence[str], model_id: str, run_id: str
) -> pa.Table:
    """Rows of table predictions; a patient without tiles has the prior and no predicted class. `bases`: by patient_id."""
    sizes = [len(prediction.attention) for prediction in predictions]
    tiles = np.concatenate([prediction.tiles for prediction in predictions])
    weights = np.concatenate([prediction.attention for prediction in predictions])
    kind = PREDICTIONS.field("attention").type
    columns = [tiles["image_id"], tiles["x_px"], tiles["y_px"], weights]
    fields = list(kind.value_type)
    cells = [pa.array(column, field.type) for column, field in zip(columns, fields, strict=True)]
    offsets = pa.array(np.cumsum([0, *sizes]), pa.int32())
    attention = pa.ListArray.from_arrays(offsets, pa.StructArray.from_arrays(cells, fields=fields)).cast(kind)
    rows: dict[str, Any] = {
        "patient_id": [prediction.patient_id for prediction in predictions],
        "model_id": [model_id] * len(predictions),
        "probabilities": [list(zip(classes, each.probabilities.tolist(), strict=True)) for each in predictions],
        "predicted_class": [
            classes[int(each.probabilities.argmax())] if size else None
            for each, size in zip(predictions, sizes, strict=True)
        ],
        "from_prior": [size == 0 for size in sizes],
        "n_tiles": sizes,
        "n_images_failed": [bases[prediction.patient_id].n_images_failed for prediction in predictions],
        "n_images_without_tiles": [bases[prediction.patient_id].n_images_without_tiles for prediction in predictions],
        "params_hash": [bases[prediction.patient_id].params_hash for prediction in predictions],
        "run_id": [run_id] * len(predictions),
    }
    arrays = [attention if f.name == "attention" else pa.array(rows[f.name], f.type) for f in PREDICTIONS]
    return pa.Table.from_arrays(arrays, schema=PREDICTIONS)


def submission_csv(
    probabilities: Mapping[str, Mapping[str, float]], classes: Sequence[str], from_prior: Collection[str]
) -> bytes:
    """``patient_id,CE,LAA,from_prior``: one row per patient, sorted; each row's numbers sum to 1 within 1e-12.

    `from_prior`: the patients without a bag. The model did not see them; they have true in that column, others false.
    """
    text = io.StringIO(newline="")
    writer = csv.writer(text, lineterminator="\n")
    first, last = SUBMISSION_COLUMNS
    writer.writerow([first, *classes, last])
    for patient_id in sorted(probabilities):
        numbers = (repr(float(probabilities[patient_id][name])) for name in classes)
        writer.writerow([patient_id, *numbers, "true" if patient_id in from_prior else "false"])
    return text.getvalue().encode()
