"""The loader on one machine: workers read units, a shuffle buffer mixes them, every patch comes once per epoch."""

import mmap
import os
import warnings
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import closing, contextmanager
from itertools import islice
from multiprocessing import active_children, current_process
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import DataLoader, Dataset

from jobs.training.patches.batch import PatchBatch, PatchFeed
from jobs.training.patches.order import EpochOrder, Numbers, epoch_order, mixing
from jobs.training.patches.patch_units import OnBadSlide, PatchTally, Unit, cut_units, read_unit
from jobs.training.patches.selection import PatchSpec
from jobs.training.refusals import refuse_workers
from udfs.wording import some
from udfs.wsi import SlideError
from udfs.wsi.store import StorageOptions

_BUFFER_BYTES = 512 << 20

Task = tuple[Unit, Numbers]  # a unit, and int64 [m], the slot in the shared memory of each of its patches

_inherited: list[object] = []  # DataLoaders of a parent process


class UnitWorkers:
    """Workers, and slots in shared memory, one per patch, for what they read.

    Workers are forked: they start at once, need no `if __name__ == "__main__"` in the trainer's script, and inherit anonymous
    memory, which the size of /dev/shm does not limit. They write each unit into slots of this memory, because new memory per
    unit costs more than reading the unit. A daemonic process, such as a worker of another DataLoader, must not start workers:
    it reads by itself.
    """

    def __init__(
        self,
        n_parallel: int,
        prefetch_factor: int,
        n_slots: int,
        patch_px: int,
        storage_options: StorageOptions | None,
        on_bad_slide: OnBadSlide,
    ) -> None:
        """Reserves memory for `n_slots` patches: those that wait for a batch, and `prefetch_factor` units per worker."""
        shape = (n_slots, patch_px, patch_px, 3)
        self._pixels = np.frombuffer(mmap.mmap(-1, int(np.prod(shape))), np.uint8).reshape(shape)
        self._sampler, self._sent = _Sampler(), deque[Task]()
        self._pid, before = os.getpid(), set(active_children())
        n_workers = 0 if current_process().daemon else n_parallel
        with warnings.catch_warnings():  # workers that wait for a store may outnumber the cores
            warnings.filterwarnings("ignore", "This DataLoader will create", UserWarning)
            self._loader = DataLoader(
                _UnitDataset(self._pixels, storage_options, on_bad_slide),
                batch_size=None,
                sampler=self._sampler,
                num_workers=n_workers,
                prefetch_factor=prefetch_factor if n_workers else None,
                persistent_workers=n_workers > 0,
                multiprocessing_context="fork" if n_workers else None,
                # in a session of their own: Linux shares the cores between sessions, and Ctrl-C reaches the trainer alone
                worker_init_fn=lambda _: os.setsid(),
                generator=torch.Generator(),  # torch draws a seed per epoch: not from the trainer's random numbers
            )
            iter(self._loader)  # forks
        self._processes = set(active_children()) - before

    @property
    def usable(self) -> bool:
        """Whether this process made the workers, and all of them are alive."""
        return self._pid == os.getpid() and all(process.is_alive() for process in self._processes)

    @property
    def under_way(self) -> str:
        """Names of the slides of units that are being read."""
        return some(list(dict.fromkeys(unit.image_id for unit, _ in self._sent)), 3)

    def draw(
        self, units: Sequence[Unit], wanted: Numbers, loaded: PatchTally
    ) -> Generator[tuple[int, NDArray[np.uint8] | None]]:
        """Reads the units of an epoch, and counts what is loaded.

        Yields the patches `wanted`, int64 [n], each as soon as its unit and those before it are read, with its pixels, uint8
        [patch_px, patch_px, 3], which are good until the next one, or None if it is skipped. Raises a SlideError that names the
        slide if one cannot be read and on_bad_slide is "raise", RuntimeError if a worker died.
        """
        free, sent = list(range(len(self._pixels))), deque[Task]()
        slot_of, skipped, rest = dict[int, int](), set[int](), deque(wanted.tolist())  # of patches

        def tasks() -> Iterator[Task]:
            for unit in units:
                sent.append((unit, np.array([free.pop() for _ in unit.patches], np.int64)))
                yield sent[-1]

        self._sampler.tasks, self._sent = tasks(), sent
        for result in self._loader:
            if isinstance(result, SlideError):
                raise result
            loaded.add(result, announce=True)
            unit, slots = sent.popleft()
            patches = unit.patches.tolist()
            slot_of.update(zip(patches, slots.tolist(), strict=True))
            skipped.update(patches if result.n_skipped else ())
            while rest and rest[0] in slot_of:
                patch = rest.popleft()
                slot = slot_of.pop(patch)
                yield patch, None if patch in skipped else self._pixels[slot]
                free.append(slot)

    def end(self) -> None:
        """Ends the workers; in a forked child, leaves them to the parent."""
        if self._pid != os.getpid():
            _inherited.append(self._loader)  # torch ends the workers of a DataLoader that any process forgets
        del self._loader


class _Sampler:
    """Tasks of an epoch. The DataLoader takes one more whenever it hands out a result."""

    tasks: Iterable[Task] = ()

    def __iter__(self) -> Iterator[Task]:
        return iter(self.tasks)


class _UnitDataset(Dataset[PatchTally | SlideError]):
    def __init__(
        self, pixels: NDArray[np.uint8], storage_options: StorageOptions | None, on_bad_slide: OnBadSlide
    ) -> None:
        self._pixels, self._options, self._on_bad_slide = pixels, storage_options, on_bad_slide

    def __getitem__(self, task: Task) -> PatchTally | SlideError:
        return read_unit(*task, self._pixels, self._options, self._on_bad_slide)


class PatchLoader(PatchFeed):
    """Batches of patches, read where the slides are.

    Memory, beside the batches that the trainer holds, is bounded by `most_bytes` for the shuffle buffer and the units being
    read. Workers and buffer stay for the next epoch, until `close`, or until the loader is forgotten.

    The batches of an epoch follow from the spec, `unit_patches`, `buffer_patches`, `batch_size`, the seed and the number of
    the epoch. They do not depend on `n_parallel`.
    """

    _unit_of: Numbers

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
        """Plans the units. Only slides whose levels or index the spec does not hold are opened.

        Args:
            spec: the patches.
            batch_size: patches per batch; the last batch of an epoch has the rest.
            n_parallel: workers that read.
            unit_patches: neighbouring patches that are read together: larger units read faster, smaller ones mix better.
            buffer_patches: patches from which each next one is drawn; None: as many as 512 MiB hold. A buffer for all patches
                shuffles perfectly.
            seed: of the order of all epochs.
            classes: the labels in the order of the outputs of the model; None: `spec.classes`.
            on_bad_slide: what happens at a slide that cannot be read. "raise" ends the epoch with its name; "skip" goes on
                without the unit, says so, and counts its patches in `skipped` and in the meter. Batches are then smaller.
            storage_options: of the slides, for fsspec.
            meter_file: takes a line of JSON per epoch.
            say: takes the meter's line of text per epoch; None: to stderr.

        Raises:
            ValueError: a number below 1, or a label that is none of `classes`.
            SlideError: a slide cannot be opened and on_bad_slide is "raise".
        """
        if buffer_patches is None:
            buffer_patches = max(1, _BUFFER_BYTES // spec.patch_bytes)
        numbers = {"batch_size": batch_size, "n_parallel": n_parallel, "unit_patches": unit_patches}
        for name, number in (numbers | {"buffer_patches": buffer_patches}).items():
            if number < 1:
                raise ValueError(f"{name} = {number}: must be at least 1")
        super().__init__(spec, batch_size, n_parallel, classes, meter_file, say)
        self.seed = seed
        self._units, self._unopened = cut_units(spec, unit_patches, storage_options, on_bad_slide)
        self.skipped = self._unopened.skipped
        self.n_patches = sum(len(unit.patches) for unit in self._units)
        self.buffer_patches = min(buffer_patches, max(self.n_patches, 1))
        self._unit_of = np.zeros(len(spec), np.int64)
        for i, unit in enumerate(self._units):
            self._unit_of[unit.patches] = i
        largest = max((len(unit.patches) for unit in self._units), default=1)
        # two units per worker, and units for two batches while the trainer is at its step; as many for each worker
        self._prefetch = 2 + -(-2 * -(-batch_size // largest) // n_parallel)
        self._n_slots = max(self.buffer_patches, largest) + self._prefetch * n_parallel * largest
        self._how = storage_options, on_bad_slide
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
        """Returns the order of units and patches in an epoch."""
        return epoch_order([unit.patches for unit in self._units], self.buffer_patches, self.seed, epoch)

    def mixing(self, epoch: int) -> tuple[float, float]:
        """Returns how well an epoch is mixed by slide and by unit, 1 as a perfect shuffle: see `order.mixing`."""
        patches = self.order(epoch).patches
        return mixing(self.spec.slide[patches], self.batch_size), mixing(self._unit_of[patches], self.batch_size)

    def epoch(self, number: int, first_step: int = 0) -> Iterator[PatchBatch]:
        """Yields the batches of an epoch. A resumed trainer passes `first_step` and gets the batches from that step on.

        Raises:
            FeedError: in one of several workers of a DataLoader, because the loader has workers of its own.
            SlideError: a slide cannot be read and on_bad_slide is "raise"; names the slide.
            RuntimeError: a worker died; or a patch is missing or comes twice, which is a fault of slidelake.
        """
        refuse_workers("PatchLoader", "iterate over it in the trainer's own process, with num_workers=0")
        if not 0 <= first_step <= self.n_steps:
            raise ValueError(f"first_step = {first_step}: an epoch has {self.n_steps} steps")
        loaded = PatchTally()
        loaded.add(self._unopened)
        self.skipped = loaded.skipped
        n_due = max(self.n_patches - first_step * self.batch_size, 0) + loaded.n_skipped
        yield from self._deliver(number, self._batches(number, first_step, loaded), n_due, loaded)

    def close(self) -> None:
        """Ends the workers and frees their memory; the next epoch starts others."""
        if self._spare:
            self._spare.end()
        self._spare = None

    def _batches(self, epoch: int, first_step: int, loaded: PatchTally) -> Iterator[PatchBatch]:
        order, size, edge = self.order(epoch), self.batch_size, self.spec.patch_px
        wanted = order.patches[first_step * size :]
        is_wanted = np.zeros(len(self.spec), bool)
        is_wanted[wanted] = True
        masks = ((self._units[i], is_wanted[self._units[i].patches]) for i in order.units)
        units = [unit.only(mask) for unit, mask in masks if mask.any()]
        with self._workers() as workers, closing(workers.draw(units, wanted, loaded)) as drawn:
            for start in range(0, len(wanted), size):
                pixels, read = np.empty((min(size, len(wanted) - start), edge, edge, 3), np.uint8), list[int]()
                for patch, of_patch in islice(drawn, len(pixels)):
                    if of_patch is not None:
                        pixels[len(read)] = of_patch
                        read.append(patch)
                if read:
                    yield self._batch(np.array(read, np.int64), pixels[: len(read)])

    @contextmanager
    def _workers(self) -> Iterator[UnitWorkers]:
        """Yields workers of this epoch alone. Those of a finished epoch are kept for the next one."""
        if self._spare and not self._spare.usable:
            self.close()
        workers, self._spare = self._spare, None
        if workers is None:
            workers = UnitWorkers(self.n_parallel, self._prefetch, self._n_slots, self.spec.patch_px, *self._how)
        try:
            yield workers
        except BaseException as error:
            text = "" if workers.usable else f"{error} at a unit of {workers.under_way}"
            workers.end()
            if text and isinstance(error, RuntimeError):
                raise RuntimeError(f"{text}: if the process ran out of memory, lower n_parallel") from None
            raise
        self._spare = workers
