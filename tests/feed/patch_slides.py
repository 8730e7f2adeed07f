"""Small slides whose pixels say where they are, and a spec of patches on them."""

from pathlib import Path

import numpy as np

from jobs.training.patches.selection import PatchSpec, SlideSource
from tests.slides.make import Pixels, position_pixels, write_slide

EDGE_PX, PATCH_PX = 320, 64
IDS = ("s0", "s1", "s2", "s3")


def pixels_of(number: int) -> Pixels:
    """Level 0 of slide `number`: no two slides are alike anywhere."""
    return np.roll(position_pixels(EDGE_PX, EDGE_PX), 40 * number, axis=2) ^ np.uint8(number << 4)


def write_slides(folder: Path) -> Path:
    """Slides of several kinds, all without loss."""
    for number, image_id in enumerate(IDS):
        kind = {"compression": "deflate"} if number % 2 else {"compression": "lzw", "tile_px": 64}
        write_slide(folder / f"{image_id}.tif", pixels_of(number), pyramid=True, levels=(4,), mpp=0.5, **kind)
    return folder


def spec_of(folder: Path, patch_px: int = PATCH_PX, mpp: float | None = None, level: int = 0) -> PatchSpec:
    """A grid of 5 x 5 patches on each slide: 100 of them."""
    sources = tuple(
        SlideSource(image_id, str(folder / f"{image_id}.tif"), label="LAA" if number % 2 else "CE")
        for number, image_id in enumerate(IDS)
    )
    steps = np.arange(0, EDGE_PX, PATCH_PX)
    grid = np.stack(np.meshgrid(steps, steps), axis=2).reshape(-1, 2)
    slide = np.repeat(np.arange(len(IDS)), len(grid))
    xy_px = np.tile(grid, (len(IDS), 1))
    return PatchSpec(sources, slide, xy_px[:, 0], xy_px[:, 1], patch_px, mpp, level)
