"""Windows: files of patches that executors read ahead of the trainer, and the folder that job and trainer share.

The folder is on a disk that all machines see (``file://``: NFS, Lustre, EFS, the mount of DBFS):

    patches.parquet                          the spec: what patch number 7 is
    windows.json                             the plan, written last; job and trainer follow it
    epoch-00000/window-00003-UUID.parquet    patch int64, pixels binary (uint8 [patch_px, patch_px, 3]); uncompressed
    epoch-00000/window-00003.json            its manifest: names the file of a window that is whole and unread
    epoch-00000/window-00003.done            the manifest, once the trainer is done with the window and its file is deleted
    failed.json                              why the job gave up

A file gets its name by a rename when it is whole, and counts when a manifest names it. So nobody reads what a dead or
repeated attempt of a task leaves. Only the trainer turns a `.json` into a `.done`; only the job writes a `.json`. An object
store has no rename for the `.done`, and petastorm reads from none on pyarrow 14: mount the store, or take a shared disk.
"""

import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Self
from urllib.parse import unquote
from uuid import uuid4

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from jobs.training.patches.patch_units import OnBadSlide, Skipped, Unit, read_unit
from jobs.training.patches.selection import PatchSpec
from udfs.wsi.store import StorageOptions

_ROW_GROUP_BYTES = 16 << 20  # petastorm reads one row group at once

WINDOW = pa.schema([pa.field("patch", pa.int64(), nullable=False), pa.field("pixels", pa.binary(), nullable=False)])


@dataclass(frozen=True)
class WindowPlan:
    """What job and trainer agree on."""

    fingerprint: str  # of the spec
    n_patches: int  # per epoch, without slides that can't be opened
    n_windows: tuple[int, ...]  # of each epoch
    window_patches: int
    unit_patches: int
    most_unread: int  # windows that are unread or being read, at most
    n_parallel: int  # windows that are read at once
    seed: int
    skipped: Mapping[str, tuple[int, str]] = field(default_factory=dict)  # patches per epoch and reason, by image_id


@dataclass(frozen=True)
class Manifest:
    """A window that is whole."""

    file: str  # its name, in the folder of the epoch
    n_patches: int
    seconds: float  # that one worker took to read them
    skipped: Mapping[str, tuple[int, str]] = field(default_factory=dict)  # patches and reason, by image_id

    @classmethod
    def read(cls, path: Path) -> Self:
        """The manifest in a file."""
        return cls(**json.loads(path.read_text()))

    @property
    def n_planned(self) -> int:
        """Patches of the window, the skipped ones included."""
        return self.n_patches + Skipped(self.skipped).n_patches


class WindowFolder:
    """The names in the folder."""

    def __init__(self, root: str | Path) -> None:
        """`root`: a path, or a file:// URI.

        Raises:
            ValueError: another store, or a name that petastorm can't read.
        """
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
        self.failed = self.root / "failed.json"

    def epoch(self, epoch: int) -> Path:
        """The folder of an epoch."""
        return self.root / f"epoch-{epoch:05}"

    def manifest(self, epoch: int, window: int) -> Path:
        """The manifest of an unread window."""
        return self.epoch(epoch) / f"window-{window:05}.json"

    def done(self, epoch: int, window: int) -> Path:
        """The manifest of a window that the trainer is done with."""
        return self.manifest(epoch, window).with_suffix(".done")

    def read_plan(self) -> WindowPlan:
        """The plan; raises FileNotFoundError if the job has written none yet."""
        fields = json.loads(self.plan.read_text())
        return WindowPlan(**fields | {"n_windows": tuple(fields["n_windows"])})

    def unread(self, epochs: Iterable[int]) -> int:
        """The number of windows of these epochs that are whole and unread."""
        return sum(1 for epoch in epochs for _ in self.epoch(epoch).glob("window-*.json"))

    def sweep(self) -> None:
        """Remove what dead attempts left. No task may be at work."""
        for epoch in self.root.glob("epoch-*"):
            kept = {Manifest.read(path).file for path in epoch.glob("window-*.json")}
            for path in (*epoch.glob("window-*.parquet"), *epoch.glob("*.unfinished")):
                if path.name not in kept:
                    path.unlink(missing_ok=True)


def put_json(path: Path, content: Any) -> None:
    """Write a dictionary or dataclass to a file, whole or not at all."""
    with _whole(path) as unfinished:
        unfinished.write_text(json.dumps(content if isinstance(content, dict) else asdict(content)))


def write_spec(folder: WindowFolder, spec: PatchSpec) -> None:
    """Write the rows in which trainers look patches up."""
    with _whole(folder.spec) as unfinished:
        pq.write_table(spec.to_table(), unfinished)


def windows_of_epoch(units: Sequence[Unit], window_patches: int, seed: int, epoch: int) -> list[list[Unit]]:
    """The windows of an epoch: units in an order that the seed gives, as many per window as fit, but at least one."""
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
    folder: WindowFolder,
    epoch: int,
    window: int,
    units: Sequence[Unit],
    seed: int,
    storage_options: StorageOptions | None,
    on_bad_slide: OnBadSlide,
) -> Manifest:
    """Read the units of a window, mix their patches, write the file. Holds the pixels of one window. Runs on an executor.

    Raises:
        SlideError: a slide can't be read and on_bad_slide is "raise"; names the slide.
    """
    sizes = [len(unit.patches) for unit in units]
    edge = units[0].patch_px
    # the place of each patch in the window: the mix is decided before the first patch is read
    slots = np.random.default_rng([seed, epoch, window]).permutation(sum(sizes))
    pixels = np.empty((len(slots), edge, edge, 3), np.uint8)
    numbers = np.full(len(slots), -1, np.int64)
    skipped, seconds = Skipped(), 0.0
    for unit, of_unit in zip(units, np.split(slots, np.cumsum(sizes)[:-1]), strict=True):
        result = read_unit(unit, storage_options, pixels, of_unit)
        if result.error and on_bad_slide == "raise":
            raise result.error
        if result.error:
            skipped.add(unit.image_id, len(unit.patches), str(result.error))
        else:
            numbers[of_unit] = unit.patches
            seconds += result.seconds
    kept = np.flatnonzero(numbers >= 0)
    size, rows = pixels[0].nbytes, max(1, _ROW_GROUP_BYTES // pixels[0].nbytes)
    path = folder.epoch(epoch) / f"window-{window:05}-{uuid4().hex}.parquet"
    with _whole(path) as unfinished, unfinished.open("wb") as file:
        with pq.ParquetWriter(file, WINDOW, compression="none", use_dictionary=False, write_statistics=False) as writer:
            for start in range(0, len(kept), rows):
                part = kept[start : start + rows]
                offsets = pa.py_buffer(np.arange(0, len(part) * size + 1, size, dtype=np.int32))
                column = pa.Array.from_buffers(pa.binary(), len(part), [None, offsets, pa.py_buffer(pixels[part])])
                writer.write_table(pa.Table.from_arrays([pa.array(numbers[part]), column], schema=WINDOW))
        file.flush()
        os.fsync(file.fileno())
    return Manifest(path.name, len(kept), seconds, skipped)


@contextmanager
def _whole(path: Path) -> Iterator[Path]:
    """A path to write to, which is renamed to `path` at the end."""
    unfinished = path.with_name(f".{path.name}-{uuid4().hex}.unfinished")
    yield unfinished
    unfinished.replace(path)
