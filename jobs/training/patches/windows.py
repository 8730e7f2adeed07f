"""Windows: files of patches that executors read ahead of the trainer, and the folder through which the two tell each other.

A folder on a disk that all see (``file://``: NFS, Lustre, EFS, DBFS's mount):

    patches.parquet                          the spec: what patch number 7 is
    windows.json                             the plan, written last; producer and trainer go by it
    epoch-00000/window-00003-UUID.parquet    patch int64, pixels binary (uint8 [patch_px, patch_px, 3]); uncompressed
    epoch-00000/window-00003.json            its manifest: this window is whole and unread, and this file is it
    epoch-00000/window-00003.done            the manifest, once the trainer is done with the window; its file is gone
    failed.json                              the producer gave up, and why

A file gets its name when it is whole, by a rename, and counts when a manifest names it: what a dead or doubled attempt of a
task leaves is never read. Only the trainer makes a `.json` a `.done`, only the producer makes a `.json`. An object store would
do for the files (a PUT is atomic there) but has no rename for the `.done`, and petastorm reads none of them on pyarrow 14
unaided: mount it, or take a shared disk.
"""

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Self
from urllib.parse import unquote
from uuid import uuid4

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from jobs.training.patches.patch_units import OnBadSlide, Unit
from jobs.training.patches.selection import PatchSpec
from jobs.training.patches.unit_pixels import read_unit
from udfs.wsi.store import StorageOptions

_ROW_GROUP_BYTES = 16 << 20  # what petastorm reads at once

WINDOW = pa.schema([pa.field("patch", pa.int64(), nullable=False), pa.field("pixels", pa.binary(), nullable=False)])


@dataclass(frozen=True)
class WindowPlan:
    """What producer and trainer agree on."""

    fingerprint: str  # of the spec
    n_patches: int  # an epoch, those of slides that can't be opened left out
    n_windows: tuple[int, ...]  # of each epoch
    window_patches: int
    unit_patches: int
    most_unread: int  # windows that are unread or being read ahead, at most
    n_parallel: int  # windows that are read ahead at once
    seed: int
    skipped: Mapping[str, tuple[int, str]] = field(default_factory=dict)  # by image_id: patches, and why


@dataclass(frozen=True)
class Manifest:
    """A window that is whole."""

    file: str  # its name, in the epoch's folder
    n_patches: int
    seconds: float  # that one worker took to read them
    skipped: Mapping[str, tuple[int, str]] = field(default_factory=dict)  # by image_id: patches, and why

    @classmethod
    def read(cls, path: Path) -> Self:
        """From its file."""
        return cls(**json.loads(path.read_text()))


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

    @property
    def plan(self) -> Path:
        """Of the plan."""
        return self.root / "windows.json"

    @property
    def spec(self) -> Path:
        """Of the spec's rows."""
        return self.root / "patches.parquet"

    @property
    def failed(self) -> Path:
        """Of the producer's last words."""
        return self.root / "failed.json"

    def epoch(self, epoch: int) -> Path:
        """The folder of an epoch."""
        return self.root / f"epoch-{epoch:05}"

    def manifest(self, epoch: int, window: int) -> Path:
        """Of a window that is unread."""
        return self.epoch(epoch) / f"window-{window:05}.json"

    def done(self, epoch: int, window: int) -> Path:
        """Of a window that was read."""
        return self.manifest(epoch, window).with_suffix(".done")

    def read_plan(self) -> WindowPlan:
        """Raises FileNotFoundError where it is not there yet."""
        told = json.loads(self.plan.read_text())
        return WindowPlan(**told | {"n_windows": tuple(told["n_windows"])})

    def unread(self, epochs: Iterable[int]) -> int:
        """Windows of these epochs that are whole and unread."""
        return sum(1 for epoch in epochs for _ in self.epoch(epoch).glob("window-*.json"))

    def sweep(self) -> None:
        """Remove what dead attempts left. Only where no task is at work."""
        for epoch in self.root.glob("epoch-*"):
            kept = {Manifest.read(path).file for path in epoch.glob("window-*.json")}
            for path in (*epoch.glob("window-*.parquet"), *epoch.glob("*.unfinished")):
                if path.name not in kept:
                    path.unlink(missing_ok=True)


def put_json(path: Path, content: Any) -> None:
    """Write a small file whole or not at all."""
    unfinished = path.with_name(f".{path.name}-{uuid4().hex}.unfinished")
    unfinished.write_text(json.dumps(content if isinstance(content, dict) else asdict(content)))
    unfinished.replace(path)


def write_spec(folder: WindowFolder, spec: PatchSpec) -> None:
    """The rows that trainers look patches up in."""
    unfinished = folder.spec.with_name(f".{folder.spec.name}-{uuid4().hex}.unfinished")
    pq.write_table(spec.to_table(), unfinished)
    unfinished.replace(folder.spec)


def windows_of_epoch(units: Sequence[Unit], window_patches: int, seed: int, epoch: int) -> list[list[Unit]]:
    """The windows of an epoch: units in random order, as many to a window as fit (one at least). The same for the same seed."""
    windows: list[list[Unit]] = []
    filled = 0
    for number in np.random.default_rng([seed, epoch]).permutation(len(units)).tolist():
        unit = units[number]
        if not windows or filled + len(unit.patches) > window_patches:
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
    """On an executor: read a window's units, mix their patches, write the file. Holds the pixels of one window.

    Raises:
        SlideError: a slide that can't be read, by name, with on_bad_slide="raise".
    """
    patches = np.concatenate([unit.patches for unit in units])
    edge = units[0].patch_px
    # where in the window each patch goes: the mix is settled before the first is read
    places = np.random.default_rng([seed, epoch, window]).permutation(len(patches))
    pixels = np.empty((len(patches), edge, edge, 3), np.uint8)
    numbers = np.full(len(patches), -1, np.int64)
    skipped: dict[str, tuple[int, str]] = {}
    seconds, at = 0.0, 0
    for unit in units:
        here = places[at : at + len(unit.patches)]
        at += len(unit.patches)
        result = read_unit(unit, storage_options, pixels, here)
        if not result.error:
            numbers[here] = unit.patches
            seconds += result.seconds
        elif on_bad_slide == "raise":
            raise result.error
        else:
            skipped[unit.image_id] = skipped.get(unit.image_id, (0, ""))[0] + len(unit.patches), str(result.error)
    there = np.flatnonzero(numbers >= 0)
    path = folder.epoch(epoch) / f"window-{window:05}-{uuid4().hex}.parquet"
    unfinished = path.with_suffix(".unfinished")
    _write(unfinished, numbers, pixels, there)
    unfinished.replace(path)
    return Manifest(path.name, len(there), seconds, skipped)


def _write(path: Path, numbers: NDArray[np.int64], pixels: NDArray[np.uint8], there: NDArray[np.int64]) -> None:
    size = pixels[0].nbytes
    rows = max(1, _ROW_GROUP_BYTES // size)
    with path.open("wb") as file:
        with pq.ParquetWriter(file, WINDOW, compression="none", use_dictionary=False, write_statistics=False) as writer:
            for start in range(0, len(there), rows):
                part = there[start : start + rows]
                content = pixels[part]
                offsets = pa.py_buffer(np.arange(0, content.nbytes + 1, size, dtype=np.int32))
                column = pa.Array.from_buffers(pa.binary(), len(part), [None, offsets, pa.py_buffer(content)])
                writer.write_table(pa.Table.from_arrays([pa.array(numbers[part]), column], schema=WINDOW))
        file.flush()
        os.fsync(file.fileno())
