"""Bags of patients as tensors: one patient's, decoded from its row of table patients, and a batch of them."""

import hashlib
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from jobs.training.feed.epochs import FedPatient, Turn
from jobs.training.refusals import FeedError

HISTOGRAM, TILE_INDEX = "color_histogram", "tile_index"
EMBEDDINGS = ("embeddings", "embeddings_max")
COLUMNS = (*EMBEDDINGS, HISTOGRAM, TILE_INDEX)
# torch warns of read-only memory. The memory viewed here belongs to nobody else.
warnings.filterwarnings("ignore", "The given NumPy array is not writable", UserWarning, __name__)
TILE = np.dtype([("image_id", object), ("x_px", np.int32), ("y_px", np.int32)])


@dataclass(frozen=True)
class Bag:
    """One patient. n tiles, d columns."""

    embeddings: torch.Tensor  # float32 or float16 [n, d]
    color_histogram: torch.Tensor | None  # float32 [4096]
    tile_index: NDArray[Any] | None  # structured (image_id, x_px, y_px) [n]

    @property
    def n_bytes(self) -> int:
        """Size of the embeddings."""
        return self.embeddings.numel() * self.embeddings.element_size()


@dataclass(frozen=True)
class Bags:
    """A batch of b patients, packed: their tiles one after another.

    With a fixed number k of tiles per patient, ``bags.embeddings.view(b, k, -1)`` is a tensor of three axes.
    """

    patient_id: list[str]
    center_id: list[str]  # "" if the table has none
    label: torch.Tensor  # int64 [b], index into Feed.classes; -1 if the table has none
    offsets: torch.Tensor  # int64 [b + 1]; patient i has rows offsets[i]:offsets[i + 1]
    embeddings: torch.Tensor  # float32 or float16 [offsets[-1], Feed.dim]; requested columns side by side
    color_histogram: torch.Tensor | None  # float32 [b, 4096]
    tile_index: list[NDArray[Any]] | None  # structured (image_id, x_px, y_px) per patient, rows as in the bag
    repeated: torch.Tensor  # bool [b]; true for patients that only fill a step of this shard: weigh them 0

    def __len__(self) -> int:
        """Returns the number of patients."""
        return len(self.patient_id)

    def split(self) -> list[torch.Tensor]:
        """Returns one tensor [n, dim] per patient; views, nothing is copied."""
        return list(torch.split(self.embeddings, self.offsets.diff().tolist()))


def pack(bags: Sequence[Bag], step: Sequence[Turn]) -> Bags:
    """Returns the batch of a step. A batch of one shares its patient's memory."""
    patients = [turn.patient for turn in step]
    histograms = [bag.color_histogram for bag in bags if bag.color_histogram is not None]
    return Bags(
        patient_id=[patient.patient_id for patient in patients],
        center_id=[patient.center_id for patient in patients],
        label=torch.tensor([patient.label for patient in patients]),
        offsets=torch.tensor([0, *(len(bag.embeddings) for bag in bags)]).cumsum(0),
        embeddings=bags[0].embeddings if len(bags) == 1 else torch.cat([bag.embeddings for bag in bags]),
        color_histogram=torch.stack(histograms) if histograms else None,
        tile_index=[bag.tile_index for bag in bags if bag.tile_index is not None] or None,
        repeated=torch.tensor([turn.repeated for turn in step]),
    )


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
        """The columns that are bags, in their order."""
        return tuple(name for name in self.columns if name in EMBEDDINGS)

    def bag(self, patient: FedPatient, found_id: str | None, row: dict[str, Any], *, view: bool) -> Bag:
        """Returns the bag of the patient that is planned for a row; raises FeedError if it is another patient's row.

        Args:
            patient: as planned.
            found_id: the patient_id in the row.
            row: bytes of embeddings, floats of color_histogram, (image_id, x_px, y_px) of tile_index.
            view: whether a bag that is fed as it is stored may share the memory of `row`.
        """
        if found_id != patient.patient_id:
            raise FeedError(
                f"patient {patient.patient_id}: the file has {found_id} in this row: it was replaced under the feed"
            )
        rows = self._sample(patient)
        matrices = [_matrix(patient, name, row[name]) for name in self.embeddings]
        if rows is not None:
            matrices = [matrix[rows] for matrix in matrices]
        bag = matrices[0]
        is_whole = len(matrices) == 1 and bag.dtype == self.dtype and bag.flags.aligned
        if not is_whole or (rows is None and not view):
            bag = np.concatenate(matrices, 1, dtype=self.dtype)
        histogram = torch.from_numpy(np.array(row[HISTOGRAM], np.float32)) if HISTOGRAM in self.columns else None
        index = row[TILE_INDEX] if TILE_INDEX in self.columns else None
        return Bag(torch.from_numpy(bag), histogram, index if index is None or rows is None else index[rows])

    def _sample(self, patient: FedPatient) -> NDArray[np.int64] | None:
        """Returns the rows of the bag that are fed, ascending: a function of seed, epoch and patient_id alone."""
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


def _matrix(patient: FedPatient, name: str, data: Any) -> NDArray[Any]:
    """Returns the bag of a column as it is stored, [n_tiles, dim]; shares memory."""
    if data is None:
        raise FeedError(
            f"patient {patient.patient_id}: {name} is null, since the encoder gives one vector per tile: ask for "
            "embeddings alone (job train: training.columns=embedding)"
        )
    stored = np.dtype(patient.dtype).newbyteorder("<")
    size, expected = memoryview(data).nbytes, patient.n_tiles * patient.dim * stored.itemsize
    if size != expected:
        raise FeedError(
            f"patient {patient.patient_id}: {name} has {size:,} bytes, {patient.n_tiles:,} tiles of {patient.dim} "
            f"{patient.dtype} are {expected:,}: run the patients job again"
        )
    return np.frombuffer(data, stored).reshape(patient.n_tiles, patient.dim)


def tile_index(image_id: Sequence[str], x_px: NDArray[np.int32], y_px: NDArray[np.int32]) -> NDArray[Any]:
    """Returns structured (image_id, x_px, y_px) [n]."""
    index = np.empty(len(x_px), TILE)
    index["image_id"], index["x_px"], index["y_px"] = image_id, x_px, y_px
    return index
