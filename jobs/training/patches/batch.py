"""What the trainer gets: pixels with the keys of their patches."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from jobs.training.patches.selection import PatchSpec
from udfs.wording import named


@dataclass(frozen=True)
class PatchBatch:
    """A batch of b patches."""

    pixels: torch.Tensor  # uint8 [b, patch_px, patch_px, 3], RGB
    image_id: list[str]
    x_px: torch.Tensor  # int64 [b], left edge, level-0 pixels
    y_px: torch.Tensor  # int64 [b], top edge
    label: torch.Tensor  # int64 [b], index into the loader's classes; -1 where the slide has none
    patch: torch.Tensor  # int64 [b], number of the patch in the spec

    def __len__(self) -> int:
        return len(self.image_id)


class Batcher:
    """Makes batches of one spec's patches."""

    def __init__(self, spec: PatchSpec, classes: Sequence[str]) -> None:
        """`classes`: the labels in the order of the model's outputs.

        Raises:
            ValueError: a slide has another label.
        """
        codes = {label: code for code, label in enumerate(classes)}
        unknown = sorted({slide.label for slide in spec.slides if slide.label is not None} - codes.keys())
        if unknown:
            raise ValueError(
                f"label {named(unknown[0])} is none of the classes {', '.join(map(named, classes))}: add it, or leave its "
                "slides out"
            )
        self._spec = spec
        self._codes = np.array(
            [codes[slide.label] if slide.label is not None else -1 for slide in spec.slides], np.int64
        )

    def __call__(self, patches: NDArray[np.int64], pixels: NDArray[np.uint8]) -> PatchBatch:
        """`patches`: int64 [b], their numbers; `pixels`: uint8 [b, patch_px, patch_px, 3]."""
        spec = self._spec
        slides = spec.slide[patches]
        return PatchBatch(
            torch.from_numpy(pixels),
            [spec.slides[number].image_id for number in slides],
            torch.from_numpy(spec.x_px[patches].astype(np.int64)),
            torch.from_numpy(spec.y_px[patches].astype(np.int64)),
            torch.from_numpy(self._codes[slides]),
            torch.from_numpy(patches),
        )
