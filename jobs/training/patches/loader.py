"""The loader on one machine: workers read units, a shuffle buffer mixes them, every patch comes once per epoch."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path

import numpy as np

from jobs.training.patches.batch import PatchBatch, PatchFeed
from jobs.training.patches.meter import Meter
from jobs.training.patches.order import EpochOrder, Numbers, epoch_order
from jobs.training.patches.patch_units import OnBadSlide, Skipped, Unit, UnitRead, cut_units
from jobs.training.patches.selection import PatchSpec
from jobs.training.patches.unit_workers import UnitWorkers
from jobs.training.refusals import refuse_workers
from udfs.wsi.store import StorageOptions

_BUFFER_BYTES = 512 << 20


class PatchLoader(PatchFeed):
    """Batches of patches, read where the slides are.

    Memory, beside the batches that the trainer holds, is bounded by `most_bytes` for the shuffle buffer and the units being
    read. Workers and buffer stay for the next epoch, until `close`, or until the loader is forgotten.

    The batches of an epoch follow from the spec, `unit_patches`, `buffer_patches`, `batch_size`, the seed and the number of
    the epoch. They do not depend on `n_parallel`.
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
        """Plan the units. Only slides whose levels or index the spec does not hold are opened.

        Args:
            spec: the patches.
            batch_size: patches per batch; the last batch of an epoch has the rest.
            n_parallel: workers that read.
            unit_patches: neighbouring patches that are read together: larger units read faster, smaller ones mix better.
            buffer_patches: patches from which each next one is drawn; None: as many as 512 MiB hold. A buffer for all patches
                shuffles perfectly.
            seed: of the order of all epochs.
            classes: the labels in the order of the outputs of the model; None: `spec.classes`.
            on_bad_slide: what happens at a slide that can't be read. "raise" ends the epoch with its name; "skip" goes on without
                the unit, says so, and counts its patches in `skipped` and in the meter. Its batches are then smaller.
            storage_options: of the slides, for fsspec.
            meter_file: takes a line of JSON per epoch.
            say: takes the meter's line of text per epoch; None: to stderr.

        Raises:
            ValueError: a number below 1, or a label that is none of `classes`.
            SlideError: a slide can't be opened and on_bad_slide is "raise".
        """
        if buffer_patches is None:
            buffer_patches = max(1, _BUFFER_BYTES // spec.patch_bytes)
        numbers = {"batch_size": batch_size, "n_parallel": n_parallel, "unit_patches": unit_patches}
        for name, number in (numbers | {"buffer_patches": buffer_patches}).items():
            if number < 1:
                raise ValueError(f"{name} = {number}: must be at least 1")
        super().__init__(spec, batch_size, n_parallel, classes, meter_file, say)
        self.seed = seed
        self._on_bad_slide, self._options = on_bad_slide, storage_options
        plan = cut_units(spec, unit_patches, storage_options, on_bad_slide)
        self._units, self._unopened, self.n_patches = plan.units, plan.skipped, plan.n_patches
        self.skipped = plan.skipped
        self.buffer_patches = min(buffer_patches, max(self.n_patches, 1))
        self._unit_of = np.zeros(len(spec), np.int64)
        for i, unit in enumerate(self._units):
            self._unit_of[unit.patches] = i
        largest = max((len(unit.patches) for unit in self._units), default=1)
        # two units per worker, and units for two batches while the trainer is at its step; as many for each worker
        self._prefetch = 2 + -(-2 * -(-batch_size // largest) // n_parallel)
        self._n_slots = max(self.buffer_patches, largest) + self._prefetch * n_parallel * largest
        self._spare: UnitWorkers | None = None

    @property
    def n_steps(self) -> int:
        """Batches per epoch."""
        return -(-self.n_patches // self.batch_size)

    @property
    def most_bytes(self) -> int:
        """Bytes of pixels that the loader holds at most."""
        return self._n_slots * self.spec.patch_bytes

    def order(self, epoch: int) -> EpochOrder:
        """The order of units and patches in an epoch."""
        return epoch_order([unit.patches for unit in self._units], self.buffer_patches, self.seed, epoch)

    def mixing(self, epoch: int) -> tuple[float, float]:
        """How well an epoch is mixed by slide and by unit, 1 as a perfect shuffle: see `order.mixing`."""
        by_slide, by_unit = self._mixing(self.order(epoch).patches)
        assert by_unit is not None  # the loader knows its units
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
        meter = Meter(number, self.batch_size, self.n_parallel)
        skipped = self.skipped = Skipped(self._unopened)
        order = self.order(number)
        wanted = order.patches[first_step * self.batch_size :]
        is_wanted = np.zeros(len(self.spec), bool)
        is_wanted[wanted] = True
        masks = ((self._units[i], is_wanted[self._units[i].patches]) for i in order.units)
        units = [unit.only(mask) for unit, mask in masks if mask.any()]
        n_due = len(wanted) + self._unopened.n_patches
        yield from self._deliver(self._batches(units, wanted, meter, skipped), n_due, meter, skipped)

    def close(self) -> None:
        """End the workers and free their memory; the next epoch starts others."""
        if self._spare:
            self._spare.end()
        self._spare = None

    def _batches(self, units: Sequence[Unit], wanted: Numbers, meter: Meter, skipped: Skipped) -> Iterator[PatchBatch]:
        with self._workers() as workers, closing(workers.read(units)) as results:
            for start in range(0, len(wanted), self.batch_size):
                patches = wanted[start : start + self.batch_size]
                pixels = np.empty((len(patches), self.spec.patch_px, self.spec.patch_px, 3), np.uint8)
                read: list[int] = []
                for patch in patches.tolist():
                    while patch not in workers:
                        result = next(results, None)
                        if result is None:
                            raise RuntimeError(f"all units came, and patch {patch} with none of them: report it")
                        self._count(*result, meter, skipped)
                    if workers.take(patch, pixels[len(read)]):
                        read.append(patch)
                if read:
                    yield self._batch(np.array(read, np.int64), pixels[: len(read)])
            if next(results, None):
                raise RuntimeError("more units came than the epoch has: report it")

    @contextmanager
    def _workers(self) -> Iterator[UnitWorkers]:
        """Workers of this epoch alone. Those of a finished epoch are kept for the next one."""
        if self._spare and not self._spare.usable:
            self.close()
        workers, self._spare = self._spare, None
        if workers is None:
            workers = UnitWorkers(self.n_parallel, self._prefetch, self._n_slots, self.spec.patch_px, self._options)
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

    def _count(self, unit: Unit, result: UnitRead, meter: Meter, skipped: Skipped) -> None:
        if result.error and self._on_bad_slide == "raise":
            raise result.error
        if result.error:
            skipped.add(unit.image_id, len(unit.patches), str(result.error), announce=True)
        elif result.n_patches != len(unit.patches):
            raise RuntimeError(f"{result.n_patches} patches came instead of {len(unit.patches)}: report it")
        else:
            meter.loaded(result.n_patches, result.seconds)
