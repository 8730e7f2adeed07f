"""Bags of patients as tensors: one patient's, as it is decoded from a row of table patients, and a batch of them."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from numpy.typing import NDArray


@dataclass(frozen=True)
class Bag:
    """One patient. n tiles, d columns."""

    embeddings: torch.Tensor  # float32 or float16 [n, d]
    color_histogram: torch.Tensor | None  # float32 [4096]
    tile_index: NDArray[Any] | None  # structured (image_id, x_px, y_px) [n]

    @property
    def n_bytes(self) -> int:
        """Of the embeddings."""
        return self.embeddings.numel() * self.embeddings.element_size()


@dataclass(frozen=True)
class Bags:
    """A batch of b patients, packed: their tiles one after another.

    With a fixed number k of tiles a patient, ``bags.embeddings.view(b, k, -1)`` is a tensor of three axes.
    """

    patient_id: list[str]
    center_id: list[str]  # "" where the table has none
    label: torch.Tensor  # int64 [b], index into Feed.classes; -1 where the table has none
    offsets: torch.Tensor  # int64 [b + 1]; patient i has rows offsets[i]:offsets[i + 1]
    embeddings: (
        torch.Tensor
    )  # float32 or float16 [offsets[-1], Feed.dim]; columns asked for, side by side (avg, then max)
    color_histogram: torch.Tensor | None  # float32 [b, 4096]
    tile_index: (
        list[NDArray[Any]] | None
    )  # where asked for: structured (image_id, x_px, y_px) a patient, rows as in the bag
    repeated: torch.Tensor  # bool [b]; true for patients that only fill a step of this shard: weigh them 0

    def __len__(self) -> int:
        """Patients."""
        return len(self.patient_id)

    def split(self) -> list[torch.Tensor]:
        """A tensor [n, dim] a patient; views, nothing is copied."""
        return list(torch.split(self.embeddings, self.offsets.diff().tolist()))


def pack(
    bags: Sequence[Bag],
    patient_id: Sequence[str],
    center_id: Sequence[str],
    label: Sequence[int],
    repeated: Sequence[bool],
) -> Bags:
    """The batch of some patients. A batch of one shares its patient's memory."""
    sizes = torch.tensor([0, *(len(bag.embeddings) for bag in bags)], dtype=torch.int64)
    histograms = [bag.color_histogram for bag in bags if bag.color_histogram is not None]
    indexes = [bag.tile_index for bag in bags if bag.tile_index is not None]
    return Bags(
        patient_id=list(patient_id),
        center_id=list(center_id),
        label=torch.tensor(label, dtype=torch.int64),
        offsets=sizes.cumsum(0),
        embeddings=bags[0].embeddings if len(bags) == 1 else torch.cat([bag.embeddings for bag in bags]),
        color_histogram=torch.stack(histograms) if histograms else None,
        tile_index=indexes or None,
        repeated=torch.tensor(repeated, dtype=torch.bool),
    )
