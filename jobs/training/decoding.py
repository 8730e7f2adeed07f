"""A row of table patients as a bag: bytes to a tensor, with all tiles or a sample of them."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from jobs.training.bags import Bag
from jobs.training.epochs import Patient
from jobs.training.errors import FeedError

HISTOGRAM, TILE_INDEX = "color_histogram", "tile_index"
EMBEDDINGS = ("embeddings_avg", "embeddings_max")
COLUMNS = (*EMBEDDINGS, HISTOGRAM, TILE_INDEX)
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

    def bag(self, patient: Patient, found_id: str | None, row: dict[str, Any]) -> Bag:
        """A patient's bag.

        Args:
            patient: whom the plan of the epoch has at this place.
            found_id: the patient_id that the row has.
            row: bytes of embeddings, floats of color_histogram, (image_id, x_px, y_px) of tile_index.

        Raises:
            FeedError: it is another patient's row, or its bytes are not what its numbers say.
        """
        if found_id != patient.patient_id:
            raise FeedError(
                f"patient {patient.patient_id}: the file has {found_id} in this row: it was replaced under the feed"
            )
        stored, n_tiles = np.dtype(patient.dtype).newbyteorder("<"), patient.n_tiles
        rows = self._sample(patient)
        width = patient.dim * len(self.embeddings)
        bag = np.empty((n_tiles if rows is None else len(rows), width), self.dtype)
        for i, name in enumerate(self.embeddings):
            data = row[name]
            size = 0 if data is None else memoryview(data).nbytes
            if size != n_tiles * patient.dim * stored.itemsize:
                raise FeedError(
                    f"patient {patient.patient_id}: {name} has {size:,} bytes, {n_tiles:,} tiles of {patient.dim} "
                    f"{patient.dtype} are {n_tiles * patient.dim * stored.itemsize:,}: run the patients job again"
                )
            matrix = np.frombuffer(data, stored).reshape(n_tiles, patient.dim)
            bag[:, i * patient.dim : (i + 1) * patient.dim] = matrix if rows is None else matrix[rows]
        histogram = index = None
        if HISTOGRAM in self.columns:
            histogram = torch.from_numpy(np.array(row[HISTOGRAM], np.float32))
        if TILE_INDEX in self.columns:
            index = row[TILE_INDEX] if rows is None else row[TILE_INDEX][rows]
        return Bag(torch.from_numpy(bag), histogram, index)

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
