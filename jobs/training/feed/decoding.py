"""A row of table patients as a bag: bytes to a tensor, with all tiles or a sample of them."""

import hashlib
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from jobs.training.feed.bags import Bag
from jobs.training.feed.epochs import Patient
from jobs.training.training_errors import FeedError

HISTOGRAM, TILE_INDEX = "color_histogram", "tile_index"
EMBEDDINGS = ("embeddings_avg", "embeddings_max")
COLUMNS = (*EMBEDDINGS, HISTOGRAM, TILE_INDEX)
# torch warns of memory that is not to be written. What is viewed here is nobody else's.
warnings.filterwarnings("ignore", "The given NumPy array is not writable", UserWarning, __name__)
_TILE = np.dtype([("image_id", object), ("x_px", np.int32), ("y_px", np.int32)])


@dataclass(frozen=True)
class Decoder:
    """How rows become bags in one epoch."""

    columns: tuple[str, ...]  # of `COLUMNS`, in their order
    dtype: str  # of what is fed, float32 or float16
    bag_size: int | None  # tiles sampled of each patient; None: all as they are
    seed: int
    epoch: int

    @property
    def embeddings(self) -> tuple[str, ...]:
        """Those of the columns that are bags, in their order."""
        return tuple(name for name in self.columns if name in EMBEDDINGS)

    def bag(self, patient: Patient, found_id: str | None, row: dict[str, Any], *, view: bool) -> Bag:
        """A patient's bag.

        Args:
            patient: whom the plan of the epoch has at this place.
            found_id: the patient_id that the row has.
            row: bytes of embeddings, floats of color_histogram, (image_id, x_px, y_px) of tile_index.
            view: whether the bag may share the memory of `row`, where that is the bag as it is fed.

        Raises:
            FeedError: it is another patient's row, or its bytes are not what its numbers say.
        """
        if found_id != patient.patient_id:
            raise FeedError(
                f"patient {patient.patient_id}: the file has {found_id} in this row: it was replaced under the feed"
            )
        n_tiles = patient.n_tiles
        rows = self._sample(patient)
        matrices = [self._matrix(patient, name, row[name]) for name in self.embeddings]
        bag = matrices[0]
        is_fed_as_stored = rows is None and len(matrices) == 1 and bag.dtype == self.dtype and bag.flags.aligned
        if not (view and is_fed_as_stored):
            bag = np.empty((n_tiles if rows is None else len(rows), patient.dim * len(matrices)), self.dtype)
            for i, matrix in enumerate(matrices):
                bag[:, i * patient.dim : (i + 1) * patient.dim] = matrix if rows is None else matrix[rows]
        histogram = index = None
        if HISTOGRAM in self.columns:
            histogram = torch.from_numpy(np.array(row[HISTOGRAM], np.float32))
        if TILE_INDEX in self.columns:
            index = row[TILE_INDEX] if rows is None else row[TILE_INDEX][rows]
        return Bag(torch.from_numpy(bag), histogram, index)

    @staticmethod
    def _matrix(patient: Patient, name: str, data: Any) -> NDArray[Any]:
        """The bag of a column as it is stored, [n_tiles, dim]; shares memory."""
        if data is None:
            raise FeedError(
                f"patient {patient.patient_id}: {name} is null, since the encoder gives one vector per tile: ask for "
                "embeddings_avg alone (job train: training.columns=avg)"
            )
        stored = np.dtype(patient.dtype).newbyteorder("<")
        size, expected = memoryview(data).nbytes, patient.n_tiles * patient.dim * stored.itemsize
        if size != expected:
            raise FeedError(
                f"patient {patient.patient_id}: {name} has {size:,} bytes, {patient.n_tiles:,} tiles of {patient.dim} "
                f"{patient.dtype} are {expected:,}: run the patients job again"
            )
        return np.frombuffer(data, stored).reshape(patient.n_tiles, patient.dim)

    def _sample(self, patient: Patient) -> NDArray[np.int64] | None:
        """Rows of the bag that are fed, ascending: a function of seed, epoch and patient_id, whatever else is fed."""
        if self.bag_size is None:
            return None
        digest = hashlib.sha256(f"{self.seed} {self.epoch} {patient.patient_id}".encode()).digest()
        random = np.random.RandomState(np.frombuffer(digest, np.uint32))
        n_tiles, size = patient.n_tiles, self.bag_size
        if n_tiles >= size:
            rows = random.permutation(n_tiles)[:size]
        else:  # each at least once
            rows = np.concatenate([np.arange(n_tiles), random.randint(0, n_tiles, size - n_tiles)])
        return np.sort(rows).astype(np.int64)


def tile_index(image_id: Sequence[str], x_px: NDArray[np.int32], y_px: NDArray[np.int32]) -> NDArray[Any]:
    """Structured (image_id, x_px, y_px) [n]."""
    index = np.empty(len(x_px), _TILE)
    index["image_id"], index["x_px"], index["y_px"] = image_id, x_px, y_px
    return index
