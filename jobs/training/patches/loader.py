"""The loader on one machine: petastorm's workers read units, a shuffle buffer mixes them, every patch comes once an epoch."""

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from jobs.training.patches.batch import Batcher, PatchBatch
from jobs.training.patches.buffer import PixelBuffer
from jobs.training.patches.meter import Meter, MeterReading, store_reading
from jobs.training.patches.order import EpochOrder, epoch_order, mixing
from jobs.training.patches.patch_units import OnBadSlide, Unit, plan_units, tell_skipped
from jobs.training.patches.pool import UnitPool
from jobs.training.patches.selection import PatchSpec
from jobs.training.patches.unit_pixels import UnitRead
from jobs.training.refusals import refuse_workers
from udfs.wsi.store import StorageOptions

_BUFFER_BYTES = 512 << 20


class PatchLoader:
    """Batches of patches, read where the slides are.

    Memory, beside the batches that the trainer holds, is bounded by `most_bytes`, the shuffle buffer and units on their way, and
    some 100 MB a process that reads. Processes and buffer stay for the next epoch, until `close`, or nobody has the loader.

    The batches of an epoch follow from the spec, `unit_patches`, `buffer_patches`, `batch_size`, seed and the epoch's number
    alone, whatever `n_parallel`.
    """

    def __init__(
        self,
        spec: PatchSpec,
        batch_size: int = 32,
        *,
        n_parallel: int = 2,
        unit_patches: int = 16,
        buffer_patches: int | None = None,
        seed: int = 0,
        classes: Sequence[str] | None = None,
        on_bad_slide: OnBadSlide = "raise",
        storage_options: StorageOptions | None = None,
        meter_file: Path | None = None,
        say: Callable[[str], None] | None = None,
    ) -> None:
        """Plan the units; slides are opened here only for what the spec leaves out.

        Args:
            spec: the patches.
            batch_size: patches a batch; the last of an epoch has what is left.
            n_parallel: processes that read.
            unit_patches: neighbouring patches that are read together: more of them read faster, fewer mix better.
            buffer_patches: patches among which each next one is drawn; None: what 512 MiB hold. As many as there are shuffle
                perfectly.
            seed: of the order of all epochs.
            classes: the labels in the order of the model's outputs; None: `spec.classes`.
            on_bad_slide: "raise" ends an epoch at a slide that can't be read, with its name; "skip" goes on without the unit,
                says so, and counts its patches in `skipped` and in the meter. Its batches then are the smaller.
            storage_options: of the slides, for fsspec.
            meter_file: takes a line of JSON an epoch.
            say: takes the meter's line of an epoch; None: to stderr.

        Raises:
            ValueError: a number below 1, or a label that is none of `classes`.
            SlideError: a slide that can't be opened, with on_bad_slide="raise".
        """
        if buffer_patches is None:
            buffer_patches = max(1, _BUFFER_BYTES // spec.patch_bytes)
        numbers = {"batch_size": batch_size, "n_parallel": n_parallel, "unit_patches": unit_patches}
        for name, number in (numbers | {"buffer_patches": buffer_patches}).items():
            if number < 1:
                raise ValueError(f"{name} = {number}: must be at least 1")
        self.spec, self.batch_size, self.n_parallel, self.seed = spec, batch_size, n_parallel, seed
        self.classes = tuple(spec.classes if classes is None else classes)
        self.readings: list[MeterReading] = []
        self._batch = Batcher(spec, self.classes)
        self._on_bad_slide, self._options = on_bad_slide, storage_options
        self._meter_file, self._say = meter_file, say or (lambda text: print(f"slidelake: {text}", file=sys.stderr))
        plan = plan_units(spec, unit_patches, storage_options, on_bad_slide)
        self._units = plan.units
        self.skipped: dict[str, tuple[int, str]] = dict(plan.skipped)  # by image_id: patches of the last epoch, and why
        self._unopened = dict(plan.skipped)
        self.n_patches = sum(len(unit.patches) for unit in self._units)
        self.buffer_patches = min(buffer_patches, max(self.n_patches, 1))
        self._largest = max((len(unit.patches) for unit in self._units), default=1)
        self._unit_of = np.zeros(len(spec), np.int64)
        for number, unit in enumerate(self._units):
            self._unit_of[unit.patches] = number
        # enough for two batches while the trainer is at its step, and for workers that are not in step with each other
        self._ahead = 2 * n_parallel + 2 * -(-batch_size // self._largest)
        self._room = max(self.buffer_patches, self._largest) + self._ahead * self._largest  # in patches
        self._spare: UnitPool | None = None

    @property
    def n_steps(self) -> int:
        """Batches an epoch."""
        return -(-self.n_patches // self.batch_size)

    @property
    def most_bytes(self) -> int:
        """Of pixels that the loader holds at most."""
        return self._room * self.spec.patch_bytes

    def order(self, epoch: int) -> EpochOrder:
        """In which order the patches of an epoch come."""
        return epoch_order([unit.patches for unit in self._units], self.buffer_patches, self.seed, epoch)

    def mixing(self, epoch: int) -> tuple[float, float]:
        """How well an epoch is mixed by slide and by unit, 1 as a perfect shuffle: see `order.mixing`."""
        return self._mixing(self.order(epoch).patches)

    def _mixing(self, patches: NDArray[np.int64]) -> tuple[float, float]:
        groups = (self.spec.slide, self._unit_of)
        by_slide, by_unit = (mixing(group[patches].astype(np.int64), self.batch_size) for group in groups)
        return by_slide, by_unit

    def epoch(self, number: int, first_step: int = 0) -> Iterator[PatchBatch]:
        """The batches of an epoch, from `first_step` on just as if the ones before had been asked for; for resuming.

        Raises:
            FeedError: in a worker of a DataLoader: the loader has processes of its own.
            SlideError: a slide that can't be read, by name, with on_bad_slide="raise".
            RuntimeError: a patch did not come, or came twice: a fault of ours, never silent.
        """
        refuse_workers("PatchLoader", "iterate over it in the trainer's own process, with num_workers=0")
        if not 0 <= first_step <= self.n_steps:
            raise ValueError(f"first_step = {first_step}: an epoch has {self.n_steps} steps")
        meter = Meter()
        order = self.order(number)
        wanted = order.patches[first_step * self.batch_size :]
        is_wanted = np.zeros(len(self.spec), bool)
        is_wanted[wanted] = True
        of_unit = [(int(unit), is_wanted[self._units[unit].patches]) for unit in order.units]
        units = [self._units[unit].only(mask) for unit, mask in of_unit if mask.any()]
        self.skipped = dict(self._unopened)
        meter.skipped(sum(patches for patches, _ in self._unopened.values()))
        came = np.zeros(len(self.spec), np.int64)
        edge = self.spec.patch_px
        with self._pool() as pool, closing(pool.read(units)) as read:
            buffer = pool.buffer
            for start in range(0, len(wanted), self.batch_size):
                patches = wanted[start : start + self.batch_size]
                pixels = np.empty((len(patches), edge, edge, 3), np.uint8)
                there: list[int] = []
                for patch in patches.tolist():
                    while patch not in buffer:
                        came_next = next(read, None)
                        if came_next is None:
                            raise RuntimeError(
                                f"epoch {number}: all units came, and patch {patch} with none of them: report it"
                            )
                        self._take(*came_next, buffer, meter)
                    if buffer.move_to(patch, pixels[len(there)]):
                        there.append(patch)
                np.add.at(came, patches, 1)
                if there:
                    batch = self._batch(np.array(there, np.int64), pixels[: len(there)])
                    meter.batch_is_there(len(there))
                    yield batch
                    meter.next_is_wanted()
        due = max(self.n_patches - first_step * self.batch_size, 0)
        if came.max(initial=0) > 1 or came.sum() != due:
            raise RuntimeError(
                f"epoch {number}: {int(came.sum()):,} patches came of {due:,}, {int((came > 1).sum())} of them again: report it"
            )
        reading = meter.read(number, self.batch_size, self.n_parallel, *self._mixing(wanted))
        self.readings.append(reading)
        if self._meter_file:
            store_reading(self._meter_file, reading)
        self._say(str(reading))

    def close(self) -> None:
        """End the processes, as the end of Python does, and give back the memory; another epoch begins anew."""
        if self._spare:
            self._spare.close()
        self._spare = None

    @contextmanager
    def _pool(self) -> Iterator[UnitPool]:
        """That of the last epoch, for processes take a second to start; one that is in use is no other epoch's."""
        pool, self._spare = self._spare, None
        if pool is None or not pool.is_ours:
            buffer = PixelBuffer(self._room, self.spec.patch_px)
            pool = UnitPool(self.n_parallel, self._ahead, self._options, buffer)
        try:
            yield pool
        finally:
            pool.buffer.empty()
            self._spare = pool

    def _take(self, unit: Unit, places: NDArray[np.int64], read: UnitRead, buffer: PixelBuffer, meter: Meter) -> None:
        if read.error and self._on_bad_slide == "raise":
            raise read.error
        buffer.put(unit.patches, places, written=not read.error)
        if not read.error:
            if read.n_patches != len(unit.patches):
                raise RuntimeError(f"{read.n_patches} patches came instead of {len(unit.patches)}: report it")
            meter.loaded(read.n_patches, read.seconds)
            return
        meter.skipped(len(unit.patches))
        before = self.skipped.get(unit.image_id, (0, ""))[0]
        self.skipped[unit.image_id] = before + len(unit.patches), str(read.error)
        if not before:
            tell_skipped(unit.image_id, len(unit.patches), str(read.error))
