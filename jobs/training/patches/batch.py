"""Batches: pixels with the keys of their patches; and what all feeds of such batches share."""

import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter

import numpy as np
import torch
from numpy.typing import NDArray

from jobs.training.patches.meter import MeterReading
from jobs.training.patches.order import Numbers, mixing
from jobs.training.patches.patch_units import PatchTally
from jobs.training.patches.selection import PatchSpec
from udfs.wording import named


@dataclass(frozen=True)
class PatchBatch:
    """A batch of b patches."""

    pixels: torch.Tensor  # uint8 [b, patch_px, patch_px, 3], RGB
    image_id: list[str]
    x_px: torch.Tensor  # int64 [b], left edge, level-0 pixels
    y_px: torch.Tensor  # int64 [b], top edge
    label: torch.Tensor  # int64 [b], index into the classes of the loader; -1 if the slide has no label
    patch: torch.Tensor  # int64 [b], number of the patch in the spec

    def __len__(self) -> int:
        return len(self.image_id)


class PatchFeed:
    """Batches of the patches of one spec, each patch once per epoch, with a meter reading per epoch."""

    def __init__(
        self,
        spec: PatchSpec,
        batch_size: int,
        n_parallel: int,
        classes: Sequence[str] | None,
        meter_file: Path | None,
        say: Callable[[str], None] | None,
    ) -> None:
        """Checks the labels; see `PatchLoader` for the arguments."""
        self.spec, self.batch_size, self.n_parallel = spec, batch_size, n_parallel
        self.classes = tuple(spec.classes if classes is None else classes)
        self.readings: list[MeterReading] = []
        self.skipped: dict[str, tuple[int, str]] = {}  # in the last epoch, by image_id: patches, and the reason
        self._unit_of: Numbers | None = None  # int64 [n], the unit of each patch, if it is known
        self._meter_file, self._say = meter_file, say or (lambda text: print(f"slidelake: {text}", file=sys.stderr))
        codes: dict[str | None, int] = {label: code for code, label in enumerate(self.classes)}
        if unknown := [label for label in spec.classes if label not in codes]:
            raise ValueError(
                f"label {named(unknown[0])} is none of the classes {', '.join(map(named, self.classes))}: add it, or "
                "leave its slides out"
            )
        self._codes = np.array([codes.get(slide.label, -1) for slide in spec.slides], np.int64)

    def _batch(self, patches: Numbers, pixels: NDArray[np.uint8]) -> PatchBatch:
        slides = self.spec.slide[patches]
        return PatchBatch(
            torch.from_numpy(pixels),
            [self.spec.slides[number].image_id for number in slides],
            torch.from_numpy(self.spec.x_px[patches].astype(np.int64)),
            torch.from_numpy(self.spec.y_px[patches].astype(np.int64)),
            torch.from_numpy(self._codes[slides]),
            torch.from_numpy(patches),
        )

    def _deliver(
        self, epoch: int, batches: Iterable[PatchBatch], n_due: int, loaded: PatchTally
    ) -> Iterator[PatchBatch]:
        """Yields the batches of an epoch, checks that each of `n_due` patches is in one or skipped, and keeps the reading."""
        begun = asked = perf_counter()
        waits_s, steps_s, patches = list[float](), list[float](), [np.zeros(0, np.int64)]
        for batch in batches:
            patches.append(batch.patch.numpy().copy())  # the batch belongs to the trainer, who may change it
            ready = perf_counter()
            waits_s.append(ready - asked)
            yield batch
            asked = perf_counter()
            steps_s.append(asked - ready)
        order, n_skipped = np.concatenate(patches), loaded.n_skipped
        n_distinct = len(np.unique(order))
        if n_distinct != len(order) or len(order) + n_skipped != n_due:
            raise RuntimeError(
                f"epoch {epoch}: {len(order):,} patches came, {n_distinct:,} of them distinct, and {n_skipped:,} were "
                f"skipped, of {n_due:,}: report it"
            )
        reading = MeterReading(
            epoch=epoch,
            n_batch=self.batch_size,
            n_parallel=self.n_parallel,
            n_steps=len(steps_s),
            n_patches=len(order),
            n_skipped=n_skipped,
            t_step=sum(steps_s) / max(len(steps_s), 1),
            t_load=loaded.seconds / max(loaded.n_patches, 1),
            waited_s=sum(waits_s[1:]),
            first_batch_s=sum(waits_s[:1]),
            seconds=perf_counter() - begun,
            mixing_slides=mixing(self.spec.slide[order], self.batch_size),
            mixing_units=None if self._unit_of is None else mixing(self._unit_of[order], self.batch_size),
        )
        self.readings.append(reading)
        if self._meter_file:
            with self._meter_file.open("a") as file:
                file.write(reading.to_json() + "\n")
        self._say(str(reading))
