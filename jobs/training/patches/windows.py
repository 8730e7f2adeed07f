"""Windows: files of patches that executors read ahead of the trainer, and the folder that job and trainer share.

The folder is on a disk that all machines see (``file://``: NFS, Lustre, EFS, the mount of DBFS):

    patches.parquet                     the spec: what patch number 7 is
    windows.json                        the plan, written last; job and trainer follow it
    epoch-00000/UUID.unfinished         what a task writes
    epoch-00000/window-00003.parquet    a whole and unread window: patch int64, pixels binary (uint8 [patch_px, patch_px, 3]);
                                        uncompressed, with its manifest, a `PatchTally`, in the metadata
    epoch-00000/window-00003.done       empty: the trainer is done with the window
    failed.txt                          why the job gave up

A window gets its name by a rename when the job knows that it is whole, so nobody reads what a dead or repeated attempt of a
task leaves. Only the job makes a `.parquet`; only the trainer makes a `.done` and then removes the `.parquet`. An object store
has no rename, and petastorm reads from none on pyarrow 14: mount the store, or take a shared disk.
"""

import json
import os
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from urllib.parse import unquote
from uuid import uuid4

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from jobs.training.patches.patch_units import OnBadSlide, PatchTally, Unit, read_unit
from jobs.training.patches.selection import PatchSpec
from udfs.wsi import SlideError
from udfs.wsi.store import StorageOptions

_ROW_GROUP_BYTES = 16 << 20  # petastorm reads one row group at once

WINDOW = pa.schema([pa.field("patch", pa.int64(), nullable=False), pa.field("pixels", pa.binary(), nullable=False)])


@dataclass(frozen=True)
class WindowPlan:
    """What job and trainer agree on."""

    fingerprint: str  # of the spec
    window_sizes: Sequence[Sequence[int]]  # patches of each window of each epoch, without slides that cannot be opened
    window_patches: int
    unit_patches: int
    most_unread: int  # windows that are unread or being read, at most
    n_parallel: int  # windows that are read at once
    seed: int
    skipped: dict[str, tuple[int, str]] = field(default_factory=dict)  # by image_id: patches per epoch, and the reason

    @property
    def n_patches(self) -> int:
        """Patches per epoch."""
        return sum(self.window_sizes[0])


class WindowFolder:
    """The names in the folder."""

    def __init__(self, root: str | Path) -> None:
        """Takes a path or a file:// URI; raises ValueError for another store, or a name that petastorm cannot read."""
        text = str(root)
        if text.startswith("file://"):
            text = unquote(text.removeprefix("file://"))
        elif "://" in text:
            raise ValueError(
                f"{text.partition('?')[0]}: windows go through a disk that all machines share: give a path"
            )
        self.root = Path(text).absolute()
        if bad := sorted({"#", "?"} & set(str(self.root))):
            raise ValueError(f"{self.root}: petastorm reads no path with {bad[0]}: name the folder otherwise")
        self.plan, self.spec = self.root / "windows.json", self.root / "patches.parquet"
        self.failed = self.root / "failed.txt"

    def epoch(self, epoch: int) -> Path:
        """Returns the folder of an epoch."""
        return self.root / f"epoch-{epoch:05}"

    def window(self, epoch: int, window: int) -> Path:
        """Returns the file of a window that is whole and unread."""
        return self.epoch(epoch) / f"window-{window:05}.parquet"

    def done(self, epoch: int, window: int) -> Path:
        """Returns the empty file of a window that the trainer is done with."""
        return self.window(epoch, window).with_suffix(".done")

    def read_plan(self) -> WindowPlan:
        """Returns the plan; raises FileNotFoundError if the job has written none, ValueError if an earlier version wrote it."""
        try:
            return WindowPlan(**json.loads(self.plan.read_text()))
        except TypeError:
            raise ValueError(f"{self.root} has windows of another version of slidelake: empty it") from None

    def write_plan(self, plan: WindowPlan, spec: PatchSpec) -> None:
        """Writes the plan and, before the first one, the rows in which trainers look patches up."""
        if not self.plan.exists():
            pq.write_table(spec.to_table(), self.spec)
        self.put(self.plan, json.dumps(asdict(plan)))

    def put(self, path: Path, text: str) -> None:
        """Writes a text to a file, whole or not at all."""
        unfinished = path.with_suffix(".unfinished")
        unfinished.write_text(text)
        unfinished.replace(path)

    def unread(self, epochs: Iterable[int]) -> int:
        """Returns the number of windows of these epochs that are whole and unread."""
        windows = (path for epoch in epochs for path in self.epoch(epoch).glob("window-*.parquet"))
        return sum(not path.with_suffix(".done").exists() for path in windows)

    def sweep(self) -> None:
        """Removes what dead attempts and trainers left. No task may be at work."""
        for path in self.root.glob("epoch-*/*.unfinished"):
            path.unlink(missing_ok=True)
        for path in self.root.glob("epoch-*/*.done"):
            path.with_suffix(".parquet").unlink(missing_ok=True)

    def finish(self, epoch: int, window: int) -> None:
        """Removes a window that the trainer is done with. Its file may be another user's: the folder's permission is enough."""
        self.put(self.done(epoch, window), "")
        self.window(epoch, window).unlink()


def windows_of_epoch(units: Sequence[Unit], window_patches: int, seed: int, epoch: int) -> list[list[Unit]]:
    """Returns the windows of an epoch: units in an order that the seed gives, as many per window as fit, at least one."""
    windows: list[list[Unit]] = []
    filled = window_patches
    for number in np.random.default_rng([seed, epoch]).permutation(len(units)).tolist():
        unit = units[number]
        if filled + len(unit.patches) > window_patches:
            windows.append([])
            filled = 0
        windows[-1].append(unit)
        filled += len(unit.patches)
    return windows


def write_window(
    folder: Path,
    units: Sequence[Unit],
    seed: Sequence[int],
    storage_options: StorageOptions | None,
    on_bad_slide: OnBadSlide,
) -> Path:
    """Reads the units of a window, mixes their patches by the seed, writes them. Holds their pixels. Runs on an executor.

    Returns the path of the file, in `folder`. It is no window until it is renamed. Raises a SlideError that names the slide if
    one cannot be read and on_bad_slide is "raise".
    """
    sizes = [len(unit.patches) for unit in units]
    edge = units[0].patch_px
    # the place of each patch in the window: the mix is decided before the first patch is read
    slots = np.random.default_rng(seed).permutation(sum(sizes))
    pixels = np.empty((len(slots), edge, edge, 3), np.uint8)
    numbers = np.full(len(slots), -1, np.int64)
    loaded = PatchTally()
    for unit, of_unit in zip(units, np.split(slots, np.cumsum(sizes)[:-1]), strict=True):
        result = read_unit(unit, of_unit, pixels, storage_options, on_bad_slide)
        if isinstance(result, SlideError):
            raise result
        loaded.add(result)
        if result.n_patches:
            numbers[of_unit] = unit.patches
    kept = np.flatnonzero(numbers >= 0)
    size, rows = pixels[0].nbytes, max(1, _ROW_GROUP_BYTES // pixels[0].nbytes)
    schema = WINDOW.with_metadata({"manifest": json.dumps(asdict(loaded))})
    path = folder / f"{uuid4().hex}.unfinished"
    with path.open("wb") as file:
        with pq.ParquetWriter(file, schema, compression="none", use_dictionary=False, write_statistics=False) as writer:
            for start in range(0, len(kept), rows):
                part = kept[start : start + rows]
                offsets = pa.py_buffer(np.arange(0, len(part) * size + 1, size, dtype=np.int32))
                column = pa.Array.from_buffers(pa.binary(), len(part), [None, offsets, pa.py_buffer(pixels[part])])
                writer.write_table(pa.Table.from_arrays([pa.array(numbers[part]), column], schema=schema))
        file.flush()
        os.fsync(file.fileno())
    return path


def read_manifest(window: Path) -> PatchTally:
    """Returns what was loaded into a window, from the metadata of its file."""
    return PatchTally(**json.loads(pq.read_schema(window).metadata[b"manifest"]))
