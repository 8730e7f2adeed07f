"""The slides that benchmarks read, made once from the real sample's pixels and kept in data/bench."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import tifffile
import torch
from numpy.typing import NDArray
from safetensors.torch import save_file

from benchmarks.random_weights import network_of
from benchmarks.random_weights import stainnet as tinting_stainnet
from tests.slides.atomic import whole_file
from tests.slides.huge import Layout, write_huge_svs
from tests.slides.make import write_mosaic
from tests.slides.sample import SAMPLE_FOLDER, fetch_sample, real_pixels
from tests.slides.weights import convert_lite0_weights
from udfs.wsi import open_slide
from udfs.wsi.encoder import EncoderSpec
from udfs.wsi.tissue.brightness import Brightness
from udfs.wsi.tissue.grid import mask_fractions, tile_grid

FOLDER = SAMPLE_FOLDER / "bench"
TILE_PX = 448
_WIDTH, _HEIGHT = 31_000, 33_000


def pyramid() -> Path:
    """JPEG tiles, 31,000 x 33,000 px, levels at 1/4 and 1/16."""
    return _made("pyramid.tif", lambda path, pixels: write_mosaic(path, pixels, width=_WIDTH, height=_HEIGHT))


def flat() -> Path:
    """The same level 0 and nothing else."""
    return _made(
        "flat.tif", lambda path, pixels: write_mosaic(path, pixels, width=_WIDTH, height=_HEIGHT, pyramid=False)
    )


def pyramid_240() -> Path:
    """The pyramid in blocks of 240 px, Aperio's size: few tiles begin where a block does."""
    return _made(
        "pyramid_240.tif", lambda path, pixels: write_mosaic(path, pixels, width=_WIDTH, height=_HEIGHT, tile_px=240)
    )


def tissue() -> Path:
    """The pyramid without glass, as of a resection: nearly all tiles are kept, where the sample's lie in islands."""

    def write(path: Path, pixels: NDArray[np.uint8]) -> None:
        write_mosaic(path, pixels[1408:2304, 768:1536], width=14_336, height=14_336)

    return _made("tissue.tif", write)


def section() -> Path:
    """The pyramid with more tissue: 1,321 tiles are kept."""

    def write(path: Path, pixels: NDArray[np.uint8]) -> None:
        write_mosaic(path, pixels[1024:2560, 512:2048], width=_WIDTH, height=_HEIGHT)

    return _made("section.tif", write)


def section_flat() -> Path:
    """The level 0 of that and nothing else."""

    def write(path: Path, pixels: NDArray[np.uint8]) -> None:
        write_mosaic(path, pixels[1024:2560, 512:2048], width=_WIDTH, height=_HEIGHT, pyramid=False)

    return _made("section_flat.tif", write)


def huge() -> Path:
    """46,177 x 77,440 px (3.6 gigapixels) and no lower level."""
    return _made(
        "huge.tif",
        lambda path, pixels: write_mosaic(path, pixels, width=46_177, height=77_440, pyramid=False, bigtiff=True),
    )


def svs(layout: Layout) -> Path:
    """The directories of a 2 GB scan without its pixels: see `tests.slides.huge`."""
    path = FOLDER / f"{layout}.svs"
    return path if path.exists() else write_huge_svs(path, layout)


def lite0_weights() -> Path:
    """ImageNet weights of tf_efficientnet_lite0."""
    path = FOLDER / "tf_efficientnet_lite0.safetensors"
    return path if path.exists() else convert_lite0_weights(path)


def b0_weights() -> Path:
    """Random weights of efficientnet_b0."""
    return random_weights("efficientnet_b0")


def random_weights(name: str) -> Path:
    """Random weights of a preset or a timm model, always the same: good for its speed alone."""
    path = FOLDER / f"{name}_random.safetensors"
    if not path.exists():
        with whole_file(path) as temporary:
            save_file(network_of(EncoderSpec(name, None)).model.state_dict(), temporary)
    return path


def stainnet() -> Path:
    """Weights of the StainNet that tints a little."""
    path = FOLDER / "stainnet.pth"
    if not path.exists():
        with whole_file(path) as temporary:
            torch.save(tinting_stainnet().state_dict(), temporary)
    return path


def kept_tiles(path: Path) -> NDArray[np.int64]:
    """Corners of the tiles with tissue, level-0 pixels: int [n, 2] of (x_px, y_px), row by row."""
    with open_slide(str(path)) as slide:
        mask = Brightness().background(slide.downsampled(16))
        grid = tile_grid(slide.width_px, slide.height_px, TILE_PX)
    return grid[mask_fractions(mask, grid, TILE_PX) <= 0.10].astype(np.int64)


def kept_pixels(path: Path, n: int) -> NDArray[np.uint8]:
    """Tiles with tissue from the middle of a slide: uint8 [n, TILE_PX, TILE_PX, 3]."""
    kept = kept_tiles(path)
    with open_slide(str(path)) as slide:
        return np.stack([tile for _, tile in slide.read_tiles(kept[len(kept) // 2 :][:n], TILE_PX)])


def blocks(path: Path, tiles: NDArray[np.int64] | None = None, level: int = 0) -> list[bytes]:
    """The compressed blocks of a level of a mosaic, each once: those under the tiles, None for all of them."""
    with tifffile.TiffFile(path) as tiff:
        page = tiff.pages[level].aspage()
        edge, columns = page.tilewidth, -(-page.imagewidth // page.tilewidth)
        places = list(zip(page.dataoffsets, page.databytecounts, strict=True))
    needed = set(range(len(places)))
    if tiles is not None:
        first, last = tiles // edge, (tiles + TILE_PX - 1) // edge
        needed = {
            y * columns + x
            for (x0, y0), (x1, y1) in zip(first.tolist(), last.tolist(), strict=True)
            for y in range(y0, y1 + 1)
            for x in range(x0, x1 + 1)
        }
    content = path.read_bytes()
    return [content[start : start + count] for start, count in (places[i] for i in sorted(needed))]


def _made(name: str, write: Callable[[Path, NDArray[np.uint8]], object]) -> Path:
    path = FOLDER / name
    if not path.exists():
        pixels = real_pixels(fetch_sample(SAMPLE_FOLDER))
        with whole_file(path) as temporary:
            write(temporary, pixels)
    return path
