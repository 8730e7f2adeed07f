"""The trainer's end of the windows: petastorm reads each once, as it comes, and it is deleted when the trainer is done with it.

Needs no Spark and no JVM: the job `patches` runs elsewhere, on the same folder.
"""

import json
import sys
import time
import warnings
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
from numpy.typing import NDArray
from petastorm import make_batch_reader

from jobs.training.patches.batch import Batcher, PatchBatch
from jobs.training.patches.meter import Meter, MeterReading, store_reading
from jobs.training.patches.order import mixing
from jobs.training.patches.patch_units import tell_skipped
from jobs.training.patches.selection import PatchSpec
from jobs.training.patches.windows import Manifest, WindowFolder, WindowPlan
from jobs.training.refusals import refuse_workers

# petastorm asks for the old ways of pyarrow, which there still are in the version that it needs
warnings.filterwarnings("ignore", category=FutureWarning, module=r"petastorm\.")

_POLL_S = 0.05
_ROW_GROUPS_AHEAD = 2  # that petastorm reads while the trainer is at its step
_READINGS = 3  # of a window whose reader ended early: petastorm can take an empty queue for the end

Numbers = NDArray[np.int64]


class WindowFeed:
    """Batches of patches that executors read ahead. One trainer a folder.

    The batches of an epoch follow from the job's settings and `batch_size` alone. Memory is a batch and some row groups of
    16 MiB. A trainer that is started again goes on with the first window that it was not done with.
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
        """Wait until the job has planned.

        Args:
            folder: of the windows, as `patches.folder`.
            batch_size: patches a batch; the last of an epoch has what is left.
            classes: the labels in the order of the model's outputs; None: `spec.classes`.
            patience_s: so long a window may take to come.
            meter_file: takes a line of JSON an epoch.
            say: takes the meter's line of an epoch; None: to stderr.

        Raises:
            TimeoutError: nothing came in time.
            ValueError: batch_size below 1, a label that is none of `classes`, or a folder that is another spec's.
        """
        if batch_size < 1:
            raise ValueError(f"batch_size = {batch_size}: must be at least 1")
        self._folder, self.batch_size, self._patience_s = WindowFolder(folder), batch_size, patience_s
        self._wait_for(self._folder.plan)
        self.plan: WindowPlan = self._folder.read_plan()
        self.spec = PatchSpec.from_table(pq.read_table(self._folder.spec))
        if self.spec.fingerprint != self.plan.fingerprint:
            raise ValueError(f"{self._folder.root} holds the windows of other patches than patches.parquet's: empty it")
        most = (
            (self.plan.most_unread - 1) * self.plan.window_patches // 2
        )  # windows are even, so at least half as large
        if batch_size > most:  # else a window would be given up while rows of it wait for their batch
            raise ValueError(
                f"batch_size = {batch_size}: at most {most}, which is half of (patches.most_unread - 1) * patches.window_patches"
            )
        self.classes = tuple(self.spec.classes if classes is None else classes)
        self._batch = Batcher(self.spec, self.classes)
        self.readings: list[MeterReading] = []
        self.skipped: dict[str, tuple[int, str]] = {}  # by image_id: patches of the last epoch, and why
        self._meter_file, self._say = meter_file, say or (lambda text: print(f"slidelake: {text}", file=sys.stderr))

    def epoch(self, number: int) -> Iterator[PatchBatch]:
        """The batches of an epoch, from the first window on that the trainer was not done with.

        Raises:
            FeedError: in a worker of a DataLoader: a folder has one trainer.
            RuntimeError: the job failed (with its reason), or a patch did not come just once.
            TimeoutError: no window came in time.
        """
        refuse_workers("WindowFeed", "iterate over it in the trainer's own process, with num_workers=0")
        plan = self.plan
        if not 0 <= number < len(plan.n_windows):
            raise ValueError(
                f"epoch {number}: the job reads {len(plan.n_windows)} epochs ahead, from 0: run it with a larger patches.epochs"
            )
        meter = Meter()
        self.skipped = dict(plan.skipped)
        meter.skipped(sum(patches for patches, _ in plan.skipped.values()))
        windows = range(plan.n_windows[number])
        done = [window for window in windows if self._folder.done(number, window).exists()]
        counted = [_counted(Manifest.read(self._folder.done(number, window))) for window in done]
        todo = deque(sorted(set(windows) - set(done)))
        seen: list[Numbers] = []
        waiting: deque[_Rows] = deque()  # rows that came and are in no batch yet
        for rows in self._rows(number, todo, counted, meter):
            # The trainer asked for more than came, so it is done with the windows that no row is left of.
            self._finish(number, todo, waiting[0].window if waiting else rows.window)
            waiting.append(rows)
            while sum(len(part.patches) for part in waiting) >= self.batch_size:
                patches, pixels = _take(waiting, self.batch_size)
                seen.append(patches)
                meter.batch_is_there(len(patches))
                yield self._batch(patches, pixels)
                meter.next_is_wanted()
        if waiting:
            patches, pixels = _take(waiting, self.batch_size)
            seen.append(patches)
            meter.batch_is_there(len(patches))
            yield self._batch(patches, pixels)
            meter.next_is_wanted()
        self._finish(number, todo, len(windows))
        order = np.concatenate(seen) if seen else np.zeros(0, np.int64)
        if len(np.unique(order)) != len(order) or sum(counted) != plan.n_patches:
            raise RuntimeError(
                f"epoch {number}: {len(order):,} patches came, {len(np.unique(order)):,} of them once, and the windows count "
                f"{sum(counted):,} of {plan.n_patches:,}: report it"
            )
        by_slide = mixing(self.spec.slide[order].astype(np.int64), self.batch_size)
        reading = meter.read(number, self.batch_size, plan.n_parallel, by_slide, None)
        self.readings.append(reading)
        if self._meter_file:
            store_reading(self._meter_file, reading)
        self._say(str(reading))

    def _rows(self, epoch: int, todo: deque[int], counted: list[int], meter: Meter) -> Iterator["_Rows"]:
        """The rows of windows in their order, as these come; how many each has is added to `counted`."""
        for window in tuple(todo):
            # Windows that skipped slides left small: the job waits for us, so let the first go, though its rows are in no
            # batch yet. (A trainer that is killed just then lacks these in that epoch.)
            self._finish(epoch, todo, window - self.plan.most_unread + 1)
            path = self._folder.manifest(epoch, window)
            self._wait_for(path)
            manifest = Manifest.read(path)
            counted.append(_counted(manifest))
            meter.loaded(manifest.n_patches, manifest.seconds)
            for image_id, (patches, why) in manifest.skipped.items():
                meter.skipped(patches)
                had = self.skipped.get(image_id, (0, ""))[0]
                self.skipped[image_id] = had + patches, why
                if not had:
                    tell_skipped(image_id, patches, why)
            yield from self._read(self._folder.epoch(epoch) / manifest.file, window, manifest.n_patches)

    def _read(self, path: Path, window: int, n_patches: int) -> Iterator["_Rows"]:
        """The rows of one window by petastorm, in the order of the file."""
        edge, came = self.spec.patch_px, 0
        for _ in range(_READINGS):
            to_skip = came
            with make_batch_reader(
                f"file://{path}",  # petastorm takes what is after it as it is
                workers_count=1,  # more would mix up the order of row groups
                results_queue_size=_ROW_GROUPS_AHEAD,
                shuffle_row_groups=False,
                num_epochs=1,
            ) as reader:
                for group in reader:
                    if to_skip:
                        to_skip -= len(group.patch)
                        continue
                    pixels = np.frombuffer(b"".join(group.pixels), np.uint8).reshape(-1, edge, edge, 3)
                    came += len(pixels)
                    yield _Rows(window, np.asarray(group.patch, np.int64), pixels)
            if came == n_patches:
                return
        raise RuntimeError(f"{path} gave {came:,} patches of {n_patches:,}: report it")

    def _finish(self, epoch: int, todo: deque[int], before: int) -> None:
        """The trainer is done with the windows before this one: room for the job to read further ahead."""
        while todo and todo[0] < before:
            window = todo.popleft()
            manifest = self._folder.manifest(epoch, window)
            file = manifest.with_name(Manifest.read(manifest).file)
            manifest.rename(self._folder.done(epoch, window))  # first, for a manifest must have its file
            file.unlink()

    def _wait_for(self, path: Path) -> None:
        end = time.monotonic() + self._patience_s
        while not path.exists():
            if self._folder.failed.exists():
                why = json.loads(self._folder.failed.read_text())["why"]
                raise RuntimeError(f"the job patches gave up: {why}")
            if time.monotonic() > end:
                raise TimeoutError(
                    f"{path} did not come in {self._patience_s:g} s: is the job patches running, and on this folder?"
                )
            time.sleep(_POLL_S)


@dataclass(frozen=True, eq=False)
class _Rows:
    """Rows of a window, one row group or the rest of one."""

    window: int
    patches: Numbers  # int64 [m]
    pixels: NDArray[np.uint8]  # uint8 [m, patch_px, patch_px, 3]


def _take(waiting: deque[_Rows], most: int) -> tuple[Numbers, NDArray[np.uint8]]:
    """The first rows, as many as there are but no more than `most`, copied together."""
    parts: list[_Rows] = []
    wanted = most
    while waiting and wanted:
        rows = waiting.popleft()
        parts.append(_Rows(rows.window, rows.patches[:wanted], rows.pixels[:wanted]))
        if len(rows.patches) > wanted:
            waiting.appendleft(_Rows(rows.window, rows.patches[wanted:], rows.pixels[wanted:]))
        wanted -= len(parts[-1].patches)
    return np.concatenate([part.patches for part in parts]), np.concatenate([part.pixels for part in parts])


def _counted(manifest: Manifest) -> int:
    return manifest.n_patches + sum(patches for patches, _ in manifest.skipped.values())
