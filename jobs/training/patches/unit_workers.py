"""Forked workers of a torch DataLoader, which read units into memory that they share with the trainer."""

import mmap
import os
import warnings
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from multiprocessing import active_children, current_process

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import DataLoader, Dataset

from jobs.training.patches.order import Numbers
from jobs.training.patches.patch_units import Loaded, Unit
from udfs.wording import some
from udfs.wsi import SlideError

Task = tuple[Unit, Numbers]  # a unit, and int64 [m], the slot in the shared memory of each of its patches
ReadUnit = Callable[[Unit, NDArray[np.uint8], Numbers], Loaded | SlideError]  # `read_unit` with its options

_inherited: list[object] = []  # DataLoaders of a parent process


class UnitWorkers:
    """Workers, and slots in shared memory, one per patch, for what they read.

    Workers are forked: they start at once, need no `if __name__ == "__main__"` in the trainer's script, and inherit anonymous
    memory, which the size of /dev/shm does not limit. They write each unit into slots of this memory, because new memory per
    unit costs more than reading the unit. A daemonic process, such as a worker of another DataLoader, must not start workers:
    it reads by itself.
    """

    def __init__(self, n_parallel: int, prefetch_factor: int, n_slots: int, patch_px: int, read_unit: ReadUnit) -> None:
        """Reserve memory for `n_slots` patches: those that wait for a batch, and `prefetch_factor` units per worker."""
        shape = (n_slots, patch_px, patch_px, 3)
        self._pixels = np.frombuffer(mmap.mmap(-1, int(np.prod(shape))), np.uint8).reshape(shape)
        self._sampler, self._sent = _Sampler(), deque[Task]()
        self._pid, before = os.getpid(), set(active_children())
        n_workers = 0 if current_process().daemon else n_parallel
        with warnings.catch_warnings():  # workers that wait for a store may outnumber the cores
            warnings.filterwarnings("ignore", "This DataLoader will create", UserWarning)
            self._loader = DataLoader(
                _UnitDataset(self._pixels, read_unit),
                batch_size=None,
                sampler=self._sampler,
                num_workers=n_workers,
                prefetch_factor=prefetch_factor if n_workers else None,
                persistent_workers=n_workers > 0,
                multiprocessing_context="fork" if n_workers else None,
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
        """The image_ids of units that are being read."""
        return some(list(dict.fromkeys(unit.image_id for unit, _ in self._sent)), 3)

    def draw(
        self, units: Sequence[Unit], wanted: Numbers, loaded: Loaded
    ) -> Generator[tuple[int, NDArray[np.uint8] | None]]:
        """Read the units of an epoch, and count what is loaded.

        Yields:
            The patches `wanted`, int64 [n], each as soon as its unit and those before it are read, with its pixels, uint8
            [patch_px, patch_px, 3], which are good until the next one, or None if it is skipped.

        Raises:
            SlideError: a slide cannot be read and on_bad_slide is "raise"; names the slide.
            RuntimeError: a worker died.
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
        """End the workers; in a forked child, leave them to the parent."""
        if self._pid != os.getpid():
            _inherited.append(self._loader)  # torch ends the workers of a DataLoader that any process forgets
        del self._loader


class _Sampler:
    """Tasks of an epoch. The DataLoader takes one more whenever it hands out a result."""

    tasks: Iterable[Task] = ()

    def __iter__(self) -> Iterator[Task]:
        return iter(self.tasks)


class _UnitDataset(Dataset[Loaded | SlideError]):
    def __init__(self, pixels: NDArray[np.uint8], read_unit: ReadUnit) -> None:
        self._pixels, self._read_unit = pixels, read_unit

    def __getitem__(self, task: Task) -> Loaded | SlideError:
        unit, slots = task
        return self._read_unit(unit, self._pixels, slots)
