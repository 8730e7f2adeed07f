"""read_local: tiles of 448 px from a local JPEG pyramid on one core, beside tiffslide, OpenSlide and decoding alone."""

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import simplejpeg
import tifffile
from numpy.typing import NDArray
from openslide import OpenSlide
from tiffslide import TiffSlide

from benchmarks import inputs
from benchmarks.inputs import TILE_PX
from benchmarks.measure import Line, best_seconds
from udfs.wsi import open_slide

_SAMPLE = 200  # tiles, whole rows of the slide, for peers that would take minutes over all of them
_SIZE = (TILE_PX, TILE_PX)


def run() -> Iterator[Line]:
    """One line: all kept tiles for the rate and the limit, a sample of neighbours for the peers."""
    path = inputs.pyramid()
    tiles = inputs.kept_tiles(path)
    sample = tiles[len(tiles) // 2 :][:_SAMPLE]
    blocks = _needed_blocks(path, tiles)
    taken = best_seconds(
        {
            "all": _read(path, tiles),
            "decode": lambda: [simplejpeg.decode_jpeg(block) for block in blocks],
            "sample": _read(path, sample),
            "tiffslide": _tiffslide(path, sample),
            "openslide": _openslide(path, sample),
        }
    )
    yield {
        "tiles": len(tiles),
        "tile_px": TILE_PX,
        "tiles_per_s": len(tiles) / taken["all"],
        "decode_tiles_per_s": len(tiles) / taken["decode"],
        "tiffslide_tiles_per_s": len(sample) / taken["tiffslide"],
        "openslide_tiles_per_s": len(sample) / taken["openslide"],
        "vs_tiffslide": taken["tiffslide"] / taken["sample"],
        "vs_openslide": taken["openslide"] / taken["sample"],
        "of_decode": taken["decode"] / taken["all"],
    }


def _read(path: Path, tiles: NDArray[np.int64]) -> Callable[[], None]:
    def read() -> None:
        with open_slide(str(path)) as slide:
            for _ in slide.read_tiles(tiles, TILE_PX):
                pass

    return read


def _tiffslide(path: Path, tiles: NDArray[np.int64]) -> Callable[[], None]:
    def read() -> None:
        with TiffSlide(path) as slide:
            for x, y in tiles.tolist():
                slide.read_region((x, y), 0, _SIZE, as_array=True)

    return read


def _openslide(path: Path, tiles: NDArray[np.int64]) -> Callable[[], None]:
    def read() -> None:
        with OpenSlide(path) as slide:
            for x, y in tiles.tolist():
                np.asarray(slide.read_region((x, y), 0, _SIZE))

    return read


def _needed_blocks(path: Path, tiles: NDArray[np.int64]) -> list[bytes]:
    """The compressed blocks under the tiles, each once."""
    with tifffile.TiffFile(path) as tiff:
        page = tiff.pages.first
        columns = -(-page.imagewidth // page.tilewidth)
        first, last = tiles // page.tilewidth, (tiles + TILE_PX - 1) // page.tilewidth
        needed = {
            y * columns + x
            for (x0, y0), (x1, y1) in zip(first.tolist(), last.tolist(), strict=True)
            for y in range(y0, y1 + 1)
            for x in range(x0, x1 + 1)
        }
        content = path.read_bytes()
        places = [(page.dataoffsets[i], page.databytecounts[i]) for i in sorted(needed)]
        return [content[start : start + count] for start, count in places]
