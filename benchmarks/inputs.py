"""The slides that benchmarks read, made once from the real sample's pixels and kept in data/bench."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from tests.slides.atomic import whole_file
from tests.slides.make import write_mosaic, write_slide
from tests.slides.sample import SAMPLE_FOLDER, fetch_sample, real_pixels
from tests.slides.weights import convert_lite0_weights
from udfs.wsi import open_slide
from udfs.wsi.tissue import background_fractions, background_mask, tile_grid

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


def strips() -> Path:
    """Deflate strips of 16 rows, 8,192 x 8,192 px, no levels."""

    def write(path: Path, pixels: NDArray[np.uint8]) -> None:
        height, width, _ = pixels.shape
        tiled = np.tile(pixels, (-(-8192 // height), -(-8192 // width), 1))[:8192, :8192]
        write_slide(path, tiled, tile_px=None, compression="deflate", predictor=True)

    return _made("strips.tif", write)


def lite0_weights() -> Path:
    """ImageNet weights of tf_efficientnet_lite0."""
    path = FOLDER / "tf_efficientnet_lite0.safetensors"
    return path if path.exists() else convert_lite0_weights(path)


def kept_tiles(path: Path) -> NDArray[np.int64]:
    """Corners of the tiles with tissue, level-0 pixels: int [n, 2] of (x_px, y_px), row by row."""
    with open_slide(str(path)) as slide:
        mask = background_mask(slide.downsampled(16))
        grid = tile_grid(slide.width_px, slide.height_px, TILE_PX)
    return grid[background_fractions(mask, grid, TILE_PX) <= 0.10].astype(np.int64)


def _made(name: str, write: Callable[[Path, NDArray[np.uint8]], object]) -> Path:
    path = FOLDER / name
    if not path.exists():
        pixels = real_pixels(fetch_sample(SAMPLE_FOLDER))
        with whole_file(path) as temporary:
            write(temporary, pixels)
    return path
