"""Forked workers of a torch DataLoader, which read units into memory that they share with the trainer."""

import mmap
import os
import warnings
from collections import deque
from collections.abc import Generator, Iterator, Sequence
from functools import partial
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
    """Workers, and slots in shared memory, one per patch, for what they read.

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
        self.pixels = np.frombuffer(mmap.mmap(-1, int(np.prod(shape))), np.uint8).reshape(shape)
        self.free: list[int] = []  # slots that a unit may take; whoever is done with a patch appends its slot
        self._tasks = _Tasks()
        self._pid = os.getpid()
        self._processes: set[BaseProcess] = set()
        n_workers = 0 if current_process().daemon else n_parallel
        self._loader: DataLoader[UnitRead] | None = None
        self._new_loader = partial(
            DataLoader[UnitRead],
            _UnitDataset(self.pixels, storage_options),
            batch_size=None,
            sampler=self._tasks,
            num_workers=n_workers,
            prefetch_factor=prefetch_factor if n_workers else None,
            persistent_workers=n_workers > 0,
            multiprocessing_context="fork" if n_workers else None,
            generator=torch.Generator(),  # torch draws a seed per epoch: not from the trainer's random numbers
        )

    @property
    def usable(self) -> bool:
        """Whether this process made the workers, and all of them are alive."""
        return self._pid == os.getpid() and all(process.is_alive() for process in self._processes)

    @property
    def under_way(self) -> str:
        """The image_ids of units that are being read."""
        return some(list(dict.fromkeys(unit.image_id for unit, _ in self._tasks.sent)), 3)

    def read(self, units: Sequence[Unit]) -> Generator[tuple[Unit, NDArray[np.int64], UnitRead]]:
        """Read the units of an epoch; yields each in order, with the slots of its patches, and how reading it went.

        Raises:
            RuntimeError: a worker died.
        """
        self.free = list(range(len(self.pixels)))
        self._tasks.begin(units, self.free)
        before = set(active_children())
        with warnings.catch_warnings():  # workers that wait for a store may outnumber the cores
            warnings.filterwarnings("ignore", "This DataLoader will create", UserWarning)
            if self._loader is None:
                self._loader = self._new_loader()
            results = iter(self._loader)
        self._processes = self._processes or set(active_children()) - before
        for result in results:
            yield *self._tasks.sent.popleft(), result

    def end(self) -> None:
        """End the workers; in a forked child, leave them to the parent."""
        if self._pid != os.getpid():
            _inherited.append(self._loader)  # torch ends the workers of a DataLoader that any process forgets
        self._loader = None


class _Tasks:
    """The sampler of the DataLoader, which takes one more task whenever it hands out a result."""

    def begin(self, units: Sequence[Unit], free: list[int]) -> None:
        self._units, self._free, self.sent = units, free, deque[Task]()

    def __iter__(self) -> Iterator[Task]:
        for unit in self._units:
            self.sent.append((unit, np.array([self._free.pop() for _ in unit.patches], np.int64)))
            yield self.sent[-1]


class _UnitDataset(Dataset[UnitRead]):
    def __init__(self, pixels: NDArray[np.uint8], storage_options: StorageOptions | None) -> None:
        self._pixels, self._options = pixels, storage_options

    def __getitem__(self, task: Task) -> UnitRead:
        unit, slots = task
        return read_unit(unit, self._options, self._pixels, slots)
