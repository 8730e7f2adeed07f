"""patches: a shuffled epoch of patches on the fly, beside PyTorch's DataLoader over tiffslide with as many workers, on two cores.

Both give the same patches of a large slide: some hundred units of neighbours, drawn at random, as the start of an epoch over
many slides would. The DataLoader's dataset keeps its slide open in each worker, which is warm; over the network it has the
better of fsspec's caches (see read_remote). The last lines are those of the meter
beside a trainer whose step is a sleep: whether t_step > n_batch * t_load / n_parallel, and how long it waited.
"""

import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import torch
from numpy.typing import NDArray
from tiffslide import TiffSlide
from torch.utils.data import DataLoader, Dataset

from benchmarks import inputs
from benchmarks.inputs import TILE_PX
from benchmarks.machine import on_cores
from benchmarks.measure import Line, median_seconds
from benchmarks.remote import LATENCY_S, served
from jobs.training.patches.loader import PatchLoader
from jobs.training.patches.meter import MeterReading
from jobs.training.patches.spec import PatchSpec, SlideSource
from jobs.training.patches.tables import grid_on_tissue
from udfs.wsi import open_slide
from udfs.wsi.plan import work_units

_BATCH, _UNIT = 32, 16
_LOCAL_UNITS, _REMOTE_UNITS, _METER_UNITS = 96, 16, 96
_BUFFER = 512  # patches, so that an epoch here is several of them, as epochs are
_CORES, _WORKERS, _ROUNDS = 2, (1, 2), 3
_CACHE = {"cache_type": "blockcache", "block_size": 4 << 20}
_METER_WORKERS = (1, 2, 4, 8)


def run() -> Iterator[Line]:
    """A line for each size of patches on a local disk and over a slow network; then the meter's."""
    torch.set_num_threads(1)
    path = inputs.huge()
    with on_cores(_CORES):
        for patch_px in (224, 256, 448):
            yield {"place": "local", **_compared(str(path), {}, _spec(path, str(path), patch_px, _LOCAL_UNITS))}
        with served(inputs.FOLDER) as server, on_cores(_CORES):  # `served` leaves it on one
            url = f"{server.url}/{path.name}"
            place = f"latency_{1000 * LATENCY_S:.0f}ms"
            yield {"place": place, **_compared(url, _CACHE, _spec(path, url, 256, _REMOTE_UNITS))}
            yield from ({"place": place, **line} for line in _meter(_spec(path, url, 256, _METER_UNITS)))


def _spec(path: Path, uri: str, patch_px: int, units: int) -> PatchSpec:
    """Patches of so many units, drawn from all over the tissue; with the index, as tables have it."""
    tiles = inputs.kept_tiles(path)
    with open_slide(str(path)) as slide:
        grid = grid_on_tissue(tiles, TILE_PX, slide.width_px, slide.height_px, patch_px)
        of_units = work_units(slide.levels[0], 1.0, grid, patch_px, _UNIT)
        source = SlideSource(path.stem, uri)  # its index is read once, before the first epoch
    whole = [unit for unit in of_units if len(unit) >= _UNIT // 2]
    drawn = np.random.default_rng(0).choice(len(whole), units, replace=False)
    xy_px = grid[np.concatenate([whole[number] for number in drawn])]
    return PatchSpec((source,), np.zeros(len(xy_px), np.int32), xy_px[:, 0], xy_px[:, 1], patch_px)


def _compared(uri: str, cache: dict[str, Any], spec: PatchSpec) -> Line:
    ways: dict[str, Callable[[], object]] = {}
    for workers in _WORKERS:
        loader = PatchLoader(
            spec, _BATCH, n_parallel=workers, unit_patches=_UNIT, buffer_patches=_BUFFER, say=lambda _: None
        )
        ways[f"ours_{workers}"] = partial(_drain, loader)
        theirs = _dataloader(uri, cache, spec, workers)
        ways[f"dataloader_{workers}"] = partial(_consume, theirs, len(spec))
    taken = median_seconds(ways, _ROUNDS)
    rates = {way: len(spec) / spent for way, spent in taken.items()}
    most = _WORKERS[-1]
    return {
        "patch_px": spec.patch_px,
        "patches": len(spec),
        "workers": most,
        "patches_per_s": rates[f"ours_{most}"],
        "dataloader_patches_per_s": rates[f"dataloader_{most}"],
        "vs_dataloader": rates[f"ours_{most}"] / rates[f"dataloader_{most}"],
        "vs_dataloader_1_worker": rates["ours_1"] / rates["dataloader_1"],
        "scaling_1_to_2": rates["ours_2"] / rates["ours_1"],
        "dataloader_scaling_1_to_2": rates["dataloader_2"] / rates["dataloader_1"],
    }


def _meter(spec: PatchSpec) -> Iterator[Line]:
    """Lines of more and more workers beside one trainer, whose step is too short for one of them and long enough for some."""
    alone = _measured(spec, 1, 0.0)
    step_s = alone.n_batch * alone.t_load / 3
    for workers in _METER_WORKERS:
        reading = _measured(spec, workers, step_s)
        yield {
            "n_batch": reading.n_batch,
            "n_parallel": workers,
            "t_step_ms": 1000 * reading.t_step,
            "t_load_ms": 1000 * reading.t_load,
            "t_batch_ms": 1000 * reading.t_batch,
            "holds": str(reading.holds).lower(),
            "enough_parallel": reading.enough_parallel or 0,
            "waited_share": reading.waited_s / (reading.seconds - reading.first_batch_s),
            "first_batch_s": reading.first_batch_s,
        }


def _measured(spec: PatchSpec, workers: int, step_s: float) -> MeterReading:
    loader = PatchLoader(
        spec, _BATCH, n_parallel=workers, unit_patches=_UNIT, buffer_patches=_BUFFER, say=lambda _: None
    )
    for _ in loader.epoch(0):
        time.sleep(step_s)
    return loader.readings[0]


def _drain(loader: PatchLoader) -> None:
    for _ in loader.epoch(0):
        pass


def _consume(batches: "DataLoader[Any]", patches: int) -> None:
    came = sum(len(pixels) for pixels in batches)
    if came != patches:
        raise AssertionError(f"{came} patches instead of {patches}")


def _dataloader(uri: str, cache: dict[str, Any], spec: PatchSpec, workers: int) -> "DataLoader[Any]":
    corners = np.stack([spec.x_px, spec.y_px], axis=1)
    dataset = _TiffSlidePatches(uri, cache, corners, spec.patch_px)
    return DataLoader(
        dataset,
        _BATCH,
        shuffle=True,
        num_workers=workers,
        persistent_workers=True,
        multiprocessing_context="spawn",  # where threads of fsspec and of ours are about, a fork would hang
    )


class _TiffSlidePatches(Dataset[NDArray[np.uint8]]):
    """What people write: a patch an item, the slide kept open."""

    def __init__(self, uri: str, cache: dict[str, Any], corners: NDArray[np.int32], patch_px: int) -> None:
        self._uri, self._cache, self._corners, self._size = uri, cache, corners.tolist(), (patch_px, patch_px)
        self._slide: TiffSlide | None = None

    def __len__(self) -> int:
        return len(self._corners)

    def __getitem__(self, i: int) -> NDArray[np.uint8]:
        if self._slide is None:
            self._slide = TiffSlide(fsspec.open(self._uri, **self._cache) if self._cache else self._uri)
        x, y = self._corners[i]
        return np.asarray(self._slide.read_region((x, y), 0, self._size, as_array=True))
