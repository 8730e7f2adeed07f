"""Forked workers of a torch DataLoader, which read units into memory that they share with the trainer."""

import mmap
import os
import warnings
from collections import deque
from collections.abc import Generator, Iterator, Sequence
from multiprocessing import active_children, current_process
from multiprocessing.process import BaseProcess

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import DataLoader, Dataset

from jobs.training.patches.patch_units import Unit, UnitRead, read_unit
from udfs.wording import some
from udfs.wsi.store import StorageOptions

Task = tuple[Unit, NDArray[np.int64]]  # a unit, and int64 [m], the slot in the shared memory of each of its patches

_inherited: list[object] = []  # DataLoaders of a parent process


class UnitWorkers:
    """Workers, and the patches that they have read and that no batch has taken yet.

    Workers are forked: they start at once, need no `if __name__ == "__main__"` in the trainer's script, and inherit anonymous
    memory, which the size of /dev/shm does not limit. They write each unit into slots of this memory, because new memory per
    unit costs more than reading the unit. A daemonic process, such as a worker of another DataLoader, must not start workers:
    it reads by itself.
    """

    def __init__(
        self, n_parallel: int, prefetch_factor: int, n_slots: int, patch_px: int, storage_options: StorageOptions | None
    ) -> None:
        """Reserve memory for `n_slots` patches: those that wait for a batch, and `prefetch_factor` units per worker."""
        shape = (n_slots, patch_px, patch_px, 3)
        self._pixels = np.frombuffer(mmap.mmap(-1, int(np.prod(shape))), np.uint8).reshape(shape)
        self._pid = os.getpid()
        self._processes: set[BaseProcess] = set()
        self._begin(())
        self._sampler = _Sampler()
        self._loader: DataLoader[UnitRead] | None = None
        self._n_parallel, self._prefetch_factor, self._options = n_parallel, prefetch_factor, storage_options

    @property
    def usable(self) -> bool:
        """Whether this process made the workers, and all of them are alive."""
        return self._pid == os.getpid() and all(process.is_alive() for process in self._processes)

    @property
    def under_way(self) -> str:
        """The image_ids of units that are being read."""
        return some(list(dict.fromkeys(unit.image_id for unit, _ in self._sent)), 3)

    def read(self, units: Sequence[Unit]) -> Generator[tuple[Unit, UnitRead], None, None]:
        """Read the units of an epoch; yields each in order, with how reading it went.

        Raises:
            RuntimeError: a worker died.
        """
        self._begin(units)
        for result in self._results():
            unit, slots = self._sent.popleft()
            for patch, slot in zip(unit.patches.tolist(), slots.tolist(), strict=True):
                if patch in self._slot_of:
                    raise RuntimeError(f"patch {patch} came twice: report it")
                self._slot_of[patch] = None if result.error else slot
                if result.error:
                    self._free.append(slot)
            yield unit, result

    def __contains__(self, patch: int) -> bool:
        return patch in self._slot_of

    def take(self, patch: int, out: NDArray[np.uint8]) -> bool:
        """Move a patch to `out`, uint8 [patch_px, patch_px, 3]; returns False if the patch can't be read."""
        slot = self._slot_of.pop(patch)
        if slot is None:
            return False
        out[:] = self._pixels[slot]
        self._free.append(slot)
        return True

    def end(self) -> None:
        """End the workers; in a forked child, leave them to the parent."""
        if self._pid != os.getpid():
            _inherited.append(self._loader)  # torch ends the workers of a DataLoader that any process forgets
        self._loader = None

    def _begin(self, units: Sequence[Unit]) -> None:
        self._units = units
        self._free = list(range(len(self._pixels)))
        self._slot_of: dict[int, int | None] = {}  # by patch; None: the patch can't be read
        self._sent: deque[Task] = deque()

    def _results(self) -> Iterator[UnitRead]:
        self._sampler.tasks = self._tasks()
        before = set(active_children())
        with warnings.catch_warnings():  # workers that wait for a store may outnumber the cores
            warnings.filterwarnings("ignore", "This DataLoader will create", UserWarning)
            if self._loader is None:
                n_workers = 0 if current_process().daemon else self._n_parallel
                self._loader = DataLoader(
                    _UnitDataset(self._pixels, self._options),
                    batch_size=None,
                    sampler=self._sampler,
                    num_workers=n_workers,
                    prefetch_factor=self._prefetch_factor if n_workers else None,
                    persistent_workers=n_workers > 0,
                    multiprocessing_context="fork" if n_workers else None,
                    generator=torch.Generator(),  # torch draws a seed per epoch: not from the trainer's random numbers
                )
            results = iter(self._loader)
        self._processes = self._processes or set(active_children()) - before
        return results

    def _tasks(self) -> Iterator[Task]:
        for unit in self._units:
            task = unit, np.array([self._free.pop() for _ in unit.patches], np.int64)
            self._sent.append(task)
            yield task


class _Sampler:
    """Tasks of an epoch. The DataLoader takes one more whenever it hands out a result."""

    tasks: Iterator[Task] = iter(())

    def __iter__(self) -> Iterator[Task]:
        return self.tasks


class _UnitDataset(Dataset[UnitRead]):
    def __init__(self, pixels: NDArray[np.uint8], storage_options: StorageOptions | None) -> None:
        self._pixels, self._options = pixels, storage_options

    def __getitem__(self, task: Task) -> UnitRead:
        unit, slots = task
        return read_unit(unit, self._options, self._pixels, slots)
