"""The loader on one machine: petastorm's workers read units, a shuffle buffer mixes them, every patch comes once an epoch."""

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from jobs.training.patches.batch import Batcher, PatchBatch
from jobs.training.patches.meter import Meter, MeterReading, store_reading
from jobs.training.patches.order import EpochOrder, epoch_order, mixing
from jobs.training.patches.patch_units import OnBadSlide, Unit, plan_units, tell_skipped
from jobs.training.patches.selection import PatchSpec
from jobs.training.patches.unit_pixels import UnitRead
from jobs.training.patches.unit_workers import UnitWorkers
from jobs.training.workers import refuse_workers
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
        # two units per worker, and two batches while the trainer is at its step; as many per worker
        self._n_ahead = n_parallel * (2 + -(-2 * -(-batch_size // self._largest) // n_parallel))
        self._n_slots = max(self.buffer_patches, self._largest) + self._n_ahead * self._largest
        self._spare: UnitWorkers | None = None

    @property
    def n_steps(self) -> int:
        """Batches an epoch."""
        return -(-self.n_patches // self.batch_size)

    @property
    def most_bytes(self) -> int:
        """Of pixels that the loader holds at most."""
        return self._n_slots * self.spec.patch_bytes

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
        """The batches of an epoch. A resumed trainer passes `first_step` and gets the batches from that step on.

        Raises:
            FeedError: in one of several workers of a DataLoader, because the loader has workers of its own.
            SlideError: a slide can't be read and on_bad_slide is "raise"; names the slide.
            RuntimeError: a worker died; or a patch is missing or comes twice, which is a fault of slidelake.
        """
        refuse_workers("PatchLoader", "iterate over it in the trainer's own process, with num_workers=0")
        if not 0 <= first_step <= self.n_steps:
            raise ValueError(f"first_step = {first_step}: an epoch has {self.n_steps} steps")
        meter = Meter()
        order = self.order(number)
        wanted = order.patches[first_step * self.batch_size :]
        is_wanted = np.zeros(len(self.spec), bool)
        is_wanted[wanted] = True
        masks = ((self._units[i], is_wanted[self._units[i].patches]) for i in order.units)
        units = [unit.only(mask) for unit, mask in masks if mask.any()]
        self.skipped = dict(self._unopened)
        meter.skipped(sum(patches for patches, _ in self._unopened.values()))
        with self._workers() as workers, closing(workers.read(units)) as results:
            for start in range(0, len(wanted), self.batch_size):
                patches = wanted[start : start + self.batch_size]
                pixels = np.empty((len(patches), self.spec.patch_px, self.spec.patch_px, 3), np.uint8)
                read: list[int] = []
                for patch in patches.tolist():
                    while patch not in workers:
                        result = next(results, None)
                        if result is None:
                            raise RuntimeError(
                                f"epoch {number}: all units came, and patch {patch} with none of them: report it"
                            )
                        self._count(*result, meter)
                    if workers.take(patch, pixels[len(read)]):
                        read.append(patch)
                if read:
                    batch = self._batch(np.array(read, np.int64), pixels[: len(read)])
                    meter.batch_is_there(len(read))
                    yield batch
                    meter.next_is_wanted()
            if next(results, None):
                raise RuntimeError(f"epoch {number}: more units came than the epoch has: report it")
        reading = meter.read(number, self.batch_size, self.n_parallel, *self._mixing(wanted))
        self.readings.append(reading)
        if self._meter_file:
            store_reading(self._meter_file, reading)
        self._say(str(reading))

    def close(self) -> None:
        """End the workers and free their memory; the next epoch starts others."""
        if self._spare:
            self._spare.end()
        self._spare = None

    @contextmanager
    def _workers(self) -> Iterator[UnitWorkers]:
        """Workers of this epoch alone. Those of a finished epoch are kept for the next one."""
        if self._spare and not self._spare.usable:
            self.close()
        workers, self._spare = self._spare, None
        if workers is None:
            ahead = self._n_ahead // self.n_parallel
            workers = UnitWorkers(self.n_parallel, ahead, self._n_slots, self.spec.patch_px, self._options)
        try:
            yield workers
        except RuntimeError as error:
            if workers.usable:
                raise
            raise RuntimeError(
                f"{error} at a unit of {workers.under_way}: if the process ran out of memory, lower n_parallel"
            ) from None
        else:
            self._spare, workers = workers, None
        finally:
            if workers:
                workers.end()

    def _count(self, unit: Unit, result: UnitRead, meter: Meter) -> None:
        if not result.error:
            if result.n_patches != len(unit.patches):
                raise RuntimeError(f"{result.n_patches} patches came instead of {len(unit.patches)}: report it")
            meter.loaded(result.n_patches, result.seconds)
            return
        if self._on_bad_slide == "raise":
            raise result.error
        meter.skipped(len(unit.patches))
        before = self.skipped.get(unit.image_id, (0, ""))[0]
        self.skipped[unit.image_id] = before + len(unit.patches), str(result.error)
        if not before:
            tell_skipped(unit.image_id, len(unit.patches), str(result.error))
