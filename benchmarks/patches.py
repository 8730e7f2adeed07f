"""patches: a shuffled epoch of patches, against a plain PyTorch DataLoader over tiffslide with as many workers, on two cores.

Both read the start of an epoch over the tissue of a large slide, each in its own order: slidelake reads units of neighbours
drawn at random, the plain DataLoader patches drawn at random. Its patches differ in each round, so no cache serves a second
round from the first. The plain DataLoader is what people write: shuffled, one patch per item, the slide kept open in each
worker, and over the network fsspec's blockcache of 4 MiB. Patches of 256 px lie on one block of 256 px each, where reading a
block once gains nothing; on blocks of 240 px, Aperio's, they lie on four. The plain DataLoader shuffles perfectly;
`mixing_units` says how well slidelake mixes, 1 as a perfect shuffle, which depends on the buffer and the length of the
epoch. The last lines are those of the meter beside a trainer whose step is a sleep: whether t_step > n_batch * t_load /
n_parallel, and how long the trainer waited.

`python -m benchmarks.patches local` (or remote, meter) runs one part.
"""

import sys
import time
from collections.abc import Callable, Collection, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from tiffslide import TiffSlide
from torch.utils.data import DataLoader, Dataset, Sampler

from benchmarks import inputs
from benchmarks.inputs import TILE_PX
from benchmarks.machine import on_cores, take_one_core
from benchmarks.measure import Line, median_seconds, show
from benchmarks.remote import LATENCY_S, served
from jobs.training.patches.from_tables import grid_on_tissue
from jobs.training.patches.loader import PatchLoader
from jobs.training.patches.meter import MeterReading
from jobs.training.patches.selection import PatchSpec, SlideSource
from udfs.wsi import open_slide
from udfs.wsi.reading.blocks_of_tiles import work_units
from udfs.wsi.reading.spacing import plan_reading

_BATCH, _UNIT = 32, 16
_LOCAL: tuple[tuple[Callable[[], Path], int, float | None, int], ...] = (  # slide, patch_px, mpp, unit_patches
    (inputs.huge, 256, None, _UNIT),
    (inputs.huge, 224, None, _UNIT),
    (inputs.huge, 224, None, 4 * _UNIT),
    (inputs.huge, 448, None, _UNIT),
    (inputs.huge, 448, None, 4 * _UNIT),
    (inputs.huge, 256, 0.7, _UNIT),
    (inputs.pyramid_240, 256, None, _UNIT),
    (inputs.pyramid_240, 224, None, _UNIT),
)
_LOCAL_UNITS, _REMOTE_UNITS, _METER_UNITS = 48, 12, 64
_BUFFER = 192  # patches, so that an epoch here is several of them, as epochs are
_CORES, _WORKERS, _ROUNDS = 2, 2, 3
_CACHE = {"cache_type": "blockcache", "block_size": 4 << 20}
_METER_WORKERS = (1, 2, 4, 8)
_MPP = 0.5  # of the slide
_PARTS = ("local", "remote", "meter")


def run(parts: Collection[str] = _PARTS) -> Iterator[Line]:
    """A line for each size of patches on a local disk, one over a slow network; then the meter's."""
    torch.set_num_threads(1)
    kept = {make: (make(), inputs.kept_tiles(make())) for make in (inputs.huge, inputs.pyramid_240)}
    path, tiles = kept[inputs.huge]
    with on_cores(_CORES):
        for make, patch_px, mpp, unit in _LOCAL if "local" in parts else ():
            slide, of_slide = kept[make]
            drawn = _spec(slide, str(slide), of_slide, patch_px, mpp, _LOCAL_UNITS * _UNIT // unit, unit)
            yield {"place": "local", "slide": slide.stem, **_compared(str(slide), {}, *drawn, unit)}
        with served(inputs.FOLDER) as server, on_cores(_CORES):  # `served` leaves it on one
            url = f"{server.url}/{path.name}"
            place = f"latency_{1000 * LATENCY_S:.0f}ms"
            if "remote" in parts:
                yield {"place": place, **_compared(url, _CACHE, *_spec(path, url, tiles, 224, None, _REMOTE_UNITS))}
            if "meter" in parts:
                spec, _ = _spec(path, url, tiles, 224, None, _METER_UNITS)
                yield from ({"place": place, **line} for line in _meter(spec))


def _spec(
    path: Path,
    uri: str,
    tiles: NDArray[np.int64],
    patch_px: int,
    mpp: float | None,
    units: int,
    unit_patches: int = _UNIT,
) -> tuple[PatchSpec, NDArray[np.int32]]:
    """Patches of so many units, drawn from all over the tissue; and the corners of all patches on it, int32 [n, 2]."""
    with open_slide(str(path)) as slide:
        assert slide.index
        level, width_px, height_px = slide.index.levels[0], slide.width_px, slide.height_px
    region_px = plan_reading((1.0,), patch_px, _MPP, mpp).region_px if mpp else patch_px
    grid = grid_on_tissue(tiles, TILE_PX, width_px, height_px, region_px)
    whole = [unit for unit in work_units(level, 1.0, grid, region_px, unit_patches) if len(unit) >= unit_patches // 2]
    drawn = np.random.default_rng(0).choice(len(whole), units, replace=False)
    xy_px = grid[np.concatenate([whole[number] for number in drawn])]
    source = SlideSource(path.stem, uri, mpp=_MPP)  # its index is read once, before the first epoch
    spec = PatchSpec((source,), np.zeros(len(xy_px), np.int32), xy_px[:, 0], xy_px[:, 1], patch_px, mpp)
    return spec, grid


def _compared(uri: str, cache: dict[str, Any], spec: PatchSpec, corners: NDArray[np.int32], unit: int = _UNIT) -> Line:
    region_px = plan_reading((1.0,), spec.patch_px, _MPP, spec.mpp).region_px if spec.mpp else spec.patch_px
    theirs = _dataloader(uri, cache, corners, len(spec), region_px, spec.patch_px)
    ways: dict[str, Callable[[], object]] = {
        f"ours_{n}": partial(_drain, _loader(spec, n, unit)) for n in (1, _WORKERS)
    }
    taken = median_seconds(ways | {"dataloader": partial(_consume, theirs)}, _ROUNDS)
    rates = {way: len(spec) / spent for way, spent in taken.items()}
    return {
        "patch_px": spec.patch_px,
        "region_px": region_px,
        "unit_patches": unit,
        "patches": len(spec),
        "workers": _WORKERS,
        "patches_per_s": rates[f"ours_{_WORKERS}"],
        "dataloader_patches_per_s": rates["dataloader"],
        "vs_dataloader": rates[f"ours_{_WORKERS}"] / rates["dataloader"],
        "scaling_1_to_2": rates[f"ours_{_WORKERS}"] / rates["ours_1"],
        "mixing_units": _loader(spec, _WORKERS, unit).mixing(0)[1] or 0.0,
    }


def _loader(spec: PatchSpec, workers: int, unit: int = _UNIT) -> PatchLoader:
    return PatchLoader(spec, _BATCH, n_parallel=workers, unit_patches=unit, buffer_patches=_BUFFER, say=lambda _: None)


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
    loader = _loader(spec, workers)
    _drain(loader)  # workers start, and connect
    for _ in loader.epoch(1):
        time.sleep(step_s)
    return loader.readings[1]


def _drain(loader: PatchLoader) -> None:
    for _ in loader.epoch(0):
        pass


def _consume(batches: "DataLoader[Any]") -> None:
    wanted = len(batches.sampler)  # type: ignore[arg-type]
    came = sum(len(pixels) for pixels in batches)
    if came != wanted:
        raise AssertionError(f"{came} patches instead of {wanted}")


def _dataloader(
    uri: str, cache: dict[str, Any], corners: NDArray[np.int32], patches: int, region_px: int, patch_px: int
) -> "DataLoader[Any]":
    return DataLoader(
        _TiffSlidePatches(uri, cache, corners, region_px, patch_px),
        _BATCH,
        sampler=_Shuffled(len(corners), _WORKERS * _BATCH, patches),
        num_workers=_WORKERS,
        persistent_workers=True,
        multiprocessing_context="spawn",  # where threads of fsspec and of ours are about, a fork would hang
    )


class _Shuffled(Sampler[int]):
    """The start of an epoch of shuffle=True; a shorter one first, which does not count: workers start and open the slide."""

    def __init__(self, of: int, first: int, then: int) -> None:
        self._of, self._size, self._then = of, first, then

    def __len__(self) -> int:
        return self._size

    def __iter__(self) -> Iterator[int]:
        yield from torch.randperm(self._of)[: self._size].tolist()
        self._size = self._then


class _TiffSlidePatches(Dataset[NDArray[np.uint8]]):
    """What people write: a patch an item, the slide kept open."""

    def __init__(
        self, uri: str, cache: dict[str, Any], corners: NDArray[np.int32], region_px: int, patch_px: int
    ) -> None:
        self._uri, self._cache, self._corners = uri, cache, corners.tolist()
        self._region_px, self._patch_px = region_px, patch_px
        self._slide: TiffSlide | None = None

    def __len__(self) -> int:
        return len(self._corners)

    def __getitem__(self, i: int) -> NDArray[np.uint8]:
        if self._slide is None:
            self._slide = TiffSlide(fsspec.open(self._uri, **self._cache) if self._cache else self._uri)
        x, y = self._corners[i]
        region = self._slide.read_region((x, y), 0, (self._region_px, self._region_px), as_array=True)
        if self._region_px == self._patch_px:
            return np.asarray(region)
        return np.array(Image.fromarray(region).resize((self._patch_px, self._patch_px), Image.Resampling.BILINEAR))


if __name__ == "__main__":
    take_one_core()
    for measured in run(sys.argv[1:] or _PARTS):
        print(show("patches", measured), flush=True)
