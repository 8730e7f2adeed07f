"""The features pass as a plain loop: the core's functions one after the other, no Spark, and no result is kept."""

from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor

import numpy as np
import torch
from numpy.typing import NDArray

from benchmarks.inputs import TILE_PX
from benchmarks.work import Unit, n_tiles
from tests.slides.weights import LITE0
from udfs.encode_tiles import FeatureSpec
from udfs.wsi import open_slide
from udfs.wsi.encoder import Encoder
from udfs.wsi.quality.histogram import color_histograms
from udfs.wsi.stain.colour_table import StainNormaliser
from udfs.wsi.stain.stain_network import load_stainnet
from udfs.wsi.tiff.index import SlideIndex

_TILES_A_CALL = 4  # or a batch of the encoder's, where that is larger

_prepared: list[tuple[Encoder, StainNormaliser, int]] = []  # of this process


def prepare(spec: FeatureSpec) -> None:
    """Load in this process what `encode` needs."""
    torch.set_num_threads(1)
    stain = StainNormaliser(load_stainnet(str(spec.stain_weights)), tiles_ahead=10**6)
    _prepared[:] = [(Encoder(spec.encoders[LITE0]), stain, spec.bins)]


def encode(unit: Unit) -> int:
    """Take a unit through all steps, in this process; how many tiles it has."""
    [(encoder, stain, bins)] = _prepared
    xy_px = np.stack([unit["x_px"], unit["y_px"]], axis=1)
    with open_slide(unit["uri"], index=SlideIndex.from_bytes(unit["index"])) as slide:
        left = len(xy_px)
        batch: list[NDArray[np.uint8]] = []
        for _, tile in slide.read_tiles(xy_px, TILE_PX):
            batch.append(tile)
            if len(batch) == min(max(encoder.batch_size, _TILES_A_CALL), left):
                normalised = stain.normalise(np.stack(batch))
                encoder.embed(normalised)
                color_histograms(normalised, bins)
                left -= len(batch)
                batch = []
    return len(xy_px)


def cut(unit: Unit, tiles: int) -> Unit:
    """Only its first tiles."""
    return unit | {"x_px": unit["x_px"][:tiles], "y_px": unit["y_px"][:tiles], "n_tiles": tiles}


def encode_all(pool: ProcessPoolExecutor, units: Sequence[Unit]) -> None:
    """Each unit to whichever process is free."""
    done = sum(pool.map(encode, units))
    if done != n_tiles(units):
        raise AssertionError(f"{done} of {n_tiles(units)} tiles")
