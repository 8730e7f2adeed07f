"""Slidelake, the other readers, each in the fastest way that we know for a task, and decoding with nothing else done."""

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import pyvips
import simplejpeg
from fsspec.core import OpenFile
from numpy.typing import NDArray
from openslide import OpenSlide
from tiffslide import TiffSlide

from benchmarks import inputs
from benchmarks.inputs import TILE_PX
from benchmarks.measure import Line, median_seconds
from udfs.wsi import open_slide

Tiles = NDArray[np.int64]
"""[n, 2], top-left corners in level-0 pixels."""

_SIZE = (TILE_PX, TILE_PX)

pyvips.cache_set_max(0)  # a second round is to do the work again


def slidelake_tiles(uri: str, tiles: Tiles) -> None:
    """Read tiles."""
    with open_slide(uri) as slide:
        for _ in slide.read_tiles(tiles, TILE_PX):
            pass


def tiffslide_tiles(file: Path | OpenFile, tiles: Tiles) -> None:
    """Read tiles."""
    with TiffSlide(file) as slide:
        for x, y in tiles.tolist():
            slide.read_region((x, y), 0, _SIZE, as_array=True)


def openslide_tiles(path: Path, tiles: Tiles) -> None:
    """Read tiles."""
    with OpenSlide(path) as slide:
        for x, y in tiles.tolist():
            np.asarray(slide.read_region((x, y), 0, _SIZE))


def pyvips_tiles(path: Path, tiles: Tiles) -> None:
    """Read tiles: nearly twice as fast as `crop`, and much faster than a row of tiles at once."""
    region = pyvips.Region.new(pyvips.Image.new_from_file(str(path)))
    for x, y in tiles.tolist():
        np.frombuffer(region.fetch(x, y, *_SIZE), np.uint8).reshape(*_SIZE, 3)


def decode(blocks: Sequence[bytes]) -> None:
    """Decode JPEG blocks of one size, all into the same memory: the fastest that we know."""
    height, width, _, _ = simplejpeg.decode_jpeg_header(blocks[0])
    pixels = np.empty((height, width, 3), np.uint8)
    for block in blocks:
        simplejpeg.decode_jpeg(block, strict=True, buffer=pixels)


def compared(path: Path, tiles: Tiles) -> Line:
    """All of them at the same tiles of a local mosaic; `decode` decodes every block that a tile needs, once."""
    readers: dict[str, Callable[[], None]] = {
        "tiffslide": partial(tiffslide_tiles, path, tiles),
        "openslide": partial(openslide_tiles, path, tiles),
        "pyvips": partial(pyvips_tiles, path, tiles),
    }
    ours, limit = partial(slidelake_tiles, str(path), tiles), partial(decode, inputs.blocks(path, tiles))
    taken = median_seconds(readers | {"decode": limit, "ours": ours})
    return {
        "tiles": len(tiles),
        "tiles_per_s": len(tiles) / taken["ours"],
        **{f"{name}_tiles_per_s": len(tiles) / taken[name] for name in (*readers, "decode")},
        **{f"vs_{name}": taken[name] / taken["ours"] for name in readers},
        "of_decode": taken["decode"] / taken["ours"],
    }
