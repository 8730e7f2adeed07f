"""The trainer's end of the windows: petastorm reads each window once, and the feed deletes it when the trainer is done.

Needs no Spark and no JVM: the job `patches` runs elsewhere, on the same folder.
"""

import time
import warnings
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
from numpy.typing import NDArray
from petastorm import make_batch_reader

from jobs.training.patches.batch import PatchBatch, PatchFeed
from jobs.training.patches.order import Numbers
from jobs.training.patches.patch_units import PatchTally
from jobs.training.patches.selection import PatchSpec
from jobs.training.patches.windows import WindowFolder, read_manifest
from jobs.training.refusals import refuse_workers

# petastorm calls deprecated functions of pyarrow, which exist in the version that it needs
warnings.filterwarnings("ignore", category=FutureWarning, module=r"petastorm\.")

_POLL_S = 0.05
_ROW_GROUPS_AHEAD = 2  # that petastorm reads while the trainer is at its step
_READINGS = 3  # of a window, at most: petastorm may take an empty queue for the end before it begins the last row group


class WindowFeed(PatchFeed):
    """Batches of patches that executors read ahead. A folder serves one trainer.

    The batches of an epoch follow from the settings of the job and `batch_size` alone. Memory is a batch and some row groups
    of 16 MiB. A trainer that is started again goes on with the first window that it was not done with.
    """

    def __init__(
        self,
        folder: str | Path,
        batch_size: int = 32,
        *,
        classes: Sequence[str] | None = None,
        patience_s: float = 3600.0,
        meter_file: Path | None = None,
        say: Callable[[str], None] | None = None,
    ) -> None:
        """Waits until the job has planned.

        `folder` is that of the windows, as `patches.folder`. The last batch of an epoch has fewer patches than `batch_size`. A
        window may take `patience_s` seconds to come. `classes`, `meter_file` and `say` are as in `PatchLoader`.

        Raises:
            TimeoutError: no plan came in time.
            ValueError: batch_size is out of range, a label is none of `classes`, or the folder belongs to another spec.
        """
        self._folder, self._patience_s = WindowFolder(folder), patience_s
        self._wait_for(self._folder.plan)
        plan = self.plan = self._folder.read_plan()
        # Windows are even, so at least half as large. A larger batch would need a window that is given up before it is full.
        most = (plan.most_unread - 1) * plan.window_patches // 2
        if not 1 <= batch_size <= most:
            raise ValueError(
                f"batch_size = {batch_size}: at least 1 and at most {most}, which is half of (patches.most_unread - 1) * "
                "patches.window_patches"
            )
        spec = PatchSpec.from_table(pq.read_table(self._folder.spec))
        super().__init__(spec, batch_size, plan.n_parallel, classes, meter_file, say)
        if spec.fingerprint != plan.fingerprint:
            raise ValueError(f"{self._folder.root} holds windows of other patches than patches.parquet has: empty it")

    def epoch(self, number: int) -> Iterator[PatchBatch]:
        """Yields the batches of an epoch, from the first window on that the trainer was not done with.

        Raises:
            FeedError: in one of several workers of a DataLoader, because a folder serves one trainer.
            RuntimeError: the job failed (with its reason), or a patch is missing or comes twice.
            TimeoutError: no window came in time.
        """
        refuse_workers("WindowFeed", "iterate over it in the trainer's own process, with num_workers=0")
        sizes, loaded = self.plan.window_sizes, PatchTally()
        if not 0 <= number < len(sizes):
            raise ValueError(
                f"epoch {number}: the job reads {len(sizes)} epochs ahead, from 0: run it with a larger patches.epochs"
            )
        todo = deque(w for w in range(len(sizes[number])) if not self._folder.done(number, w).exists())
        loaded.add(PatchTally(skipped=self.plan.skipped))
        self.skipped = loaded.skipped
        n_due = sum(sizes[number][window] for window in todo) + loaded.n_skipped
        yield from self._deliver(number, self._batches(number, todo, loaded), n_due, loaded)

    def _batches(self, epoch: int, todo: deque[int], loaded: PatchTally) -> Iterator[PatchBatch]:
        edge, size = self.spec.patch_px, self.batch_size
        # what waits for its batch: the window of each patch, the patches, their pixels
        windows, patches, pixels = np.zeros(0, int), np.zeros(0, np.int64), np.zeros((0, edge, edge, 3), np.uint8)
        for window, new_patches, new_pixels in self._row_groups(epoch, todo, loaded):
            windows = np.concatenate([windows, np.full(len(new_patches), window)])
            patches, pixels = np.concatenate([patches, new_patches]), np.concatenate([pixels, new_pixels])
            self._finish(epoch, todo, windows[0])
            n_full = len(patches) // size * size
            for start in range(0, n_full, size):
                yield self._batch(patches[start : start + size], pixels[start : start + size])
            windows, patches, pixels = windows[n_full:], patches[n_full:], pixels[n_full:]
        if len(patches):
            yield self._batch(patches, pixels)
        self._finish(epoch, todo, len(self.plan.window_sizes[epoch]))

    def _row_groups(
        self, epoch: int, todo: deque[int], loaded: PatchTally
    ) -> Iterator[tuple[int, Numbers, NDArray[np.uint8]]]:
        """Yields window, patches int64 [m] and pixels uint8 [m, patch_px, patch_px, 3] of each row group, in order."""
        for window in tuple(todo):
            # The job waits for the trainer. If skipped slides left windows small, the first window goes although its rows are
            # in no batch yet. (A trainer that is killed at this moment lacks these rows in this epoch.)
            self._finish(epoch, todo, window - self.plan.most_unread + 1)
            path = self._folder.window(epoch, window)
            self._wait_for(path)
            of_window = read_manifest(path)
            loaded.add(of_window, announce=True)
            for patches, pixels in self._read(path, of_window.n_patches):
                yield window, patches, pixels

    def _read(self, path: Path, n_patches: int) -> Iterator[tuple[Numbers, NDArray[np.uint8]]]:
        """Yields patches and pixels of each row group of a file. Reads on if petastorm ends before the last row group."""
        edge, n_rows = self.spec.patch_px, 0
        for _ in range(_READINGS):
            n_known = n_rows
            with make_batch_reader(
                f"file://{path}",  # petastorm does not unquote the path
                workers_count=1,  # more workers would change the order of row groups
                results_queue_size=_ROW_GROUPS_AHEAD,
                shuffle_row_groups=False,
                num_epochs=1,
            ) as reader:
                for group in reader:
                    if n_known:
                        n_known -= len(group.patch)
                        continue
                    n_rows += len(group.patch)
                    pixels = np.frombuffer(b"".join(group.pixels), np.uint8).reshape(-1, edge, edge, 3)
                    yield np.asarray(group.patch, np.int64), pixels
            if n_rows == n_patches:
                return
        raise RuntimeError(f"{path} gave {n_rows:,} patches of {n_patches:,}: report it")

    def _finish(self, epoch: int, todo: deque[int], before: int) -> None:
        """Removes the windows before this one: the trainer is done with them, and the job reads further ahead."""
        while todo and todo[0] < before:
            self._folder.finish(epoch, todo.popleft())

    def _wait_for(self, path: Path) -> None:
        end = time.monotonic() + self._patience_s
        while not path.exists():
            if self._folder.failed.exists():
                raise RuntimeError(f"the job patches gave up: {self._folder.failed.read_text()}")
            if time.monotonic() > end:
                raise TimeoutError(
                    f"{path} did not come in {self._patience_s:g} s: is the job patches running, and on this folder?"
                )
            time.sleep(_POLL_S)
