"""Measures, where tasks run, which runtime and precision of the encoder is fastest on tiles of the cohort (mapInArrow)."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict
from itertools import islice

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray

from udfs.encode_tiles import FeatureSpec, device_of_this_task
from udfs.schemas import MEASURED_ENCODERS
from udfs.spark_task import slot_cpus
from udfs.wsi import open_slide
from udfs.wsi.encoder.encoder_spec import Precision
from udfs.wsi.encoder.fastest import measure
from udfs.wsi.store import StorageOptions
from udfs.wsi.tissue.brightness import Brightness
from udfs.wsi.tissue.grid import mask_fractions, tile_grid

_TILES = 32


def measure_encoders(
    spec: FeatureSpec, tile_px: int, precision: Precision | None
) -> Callable[[Iterable[pa.RecordBatch]], Iterable[pa.RecordBatch]]:
    """The mapInArrow function; give it one partition.

    Input column: uri, of slides to take tiles from, the first that has some. Output: `udfs.schemas.MEASURED_ENCODERS`, none
    where no slide has tissue. `precision`: measure this alone.
    """

    def run(batches: Iterable[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        uris = [uri for batch in batches for uri in batch["uri"].to_pylist()]
        tiles = _first_tiles(uris, tile_px, spec.storage_options)
        if tiles is None:
            return
        torch.set_num_threads(slot_cpus())
        device = device_of_this_task(spec.encoder)
        measured = measure(
            spec.encoder, tiles, spec.storage_options, precision=precision, device=device, threads=slot_cpus()
        )
        yield pa.RecordBatch.from_pylist([asdict(one) for one in measured], MEASURED_ENCODERS)

    return run


def _first_tiles(uris: Iterable[str], tile_px: int, storage_options: StorageOptions) -> NDArray[np.uint8] | None:
    """Up to 32 tiles with tissue of level 0, the same ones over and over where there are fewer."""
    for uri in uris:
        try:
            with open_slide(uri, storage_options) as slide:
                mask = Brightness().background(slide.downsampled(16))
                grid = tile_grid(slide.width_px, slide.height_px, tile_px)
                kept = grid[mask_fractions(mask, grid, tile_px) <= 0.5]
                tiles = [tile.copy() for _, tile in islice(slide.read_tiles(kept[:_TILES], tile_px), _TILES)]
        except Exception:  # told when the slides are read in earnest
            continue
        if tiles:
            return np.stack([tiles[i % len(tiles)] for i in range(_TILES)])
    return None
