"""Fits a StainNet: the student learns, pixel by pixel, what a classical normaliser does to each slide."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from udfs.wsi.stain.reinhard import appearance, transfer
from udfs.wsi.stain.stain_network import StainNet
from udfs.wsi.tissue.method import TissueMethod

Tiles = NDArray[np.uint8]  # [n, h, w, 3]

_PIXELS_PER_TILE = 4096
_PIXELS_PER_STEP = 16_384
_LEARNING_RATE = 0.01
_HOLD_OUT_EVERY = 5


@dataclass(frozen=True)
class TeacherGap:
    """Mean absolute difference from the teacher over held-out tiles of one slide, in grey levels (0 to 255)."""

    image_id: str
    tiles: int
    untouched: float  # of the tiles as scanned
    student: float  # of the tiles by the fitted StainNet


class Teacher:
    """Reinhard's transfer from the appearance of the slides of a centre to that of the reference slide.

    Stains differ between laboratories. Slides of one laboratory differ by tissue as much as by stain, and a map of colours
    cannot tell slides apart.
    """

    def __init__(
        self, tiles: Mapping[str, Tiles], centers: Mapping[str, str], reference: str, method: TissueMethod
    ) -> None:
        """Measures appearances on the tissue of the tiles, which `method` finds.

        Tiles and center_ids are by image_id; the slide `reference` has the appearance that is the target.
        """
        tissue = {}
        for name, pixels in tiles.items():
            sparse = pixels[:, ::4, ::4]  # one pixel in sixteen is enough
            tissue[name] = np.concatenate([tile[~method.background(tile)] for tile in sparse])
        of_center = {
            center: appearance(np.concatenate([tissue[name] for name in sorted(tiles) if centers[name] == center]))
            for center in {centers[name] for name in tiles}
        }
        self._sources = {name: of_center[centers[name]] for name in tiles}
        self._target = appearance(tissue[reference])

    def normalise(self, image_id: str, pixels: NDArray[np.uint8]) -> NDArray[np.uint8]:
        """Returns pixels of that slide, uint8 [..., 3], as the reference would look."""
        return transfer(pixels, self._sources[image_id], self._target)


def split_tiles(tiles: Mapping[str, Tiles]) -> tuple[dict[str, Tiles], dict[str, Tiles]]:
    """Returns (to fit, held out): every fifth tile of a slide is held out, none if it has fewer than two."""
    fit, held = {}, {}
    for name, pixels in tiles.items():
        out = np.arange(len(pixels)) % _HOLD_OUT_EVERY == 1
        fit[name], held[name] = pixels[~out], pixels[out]
    return fit, held


def fit_stainnet(tiles: Mapping[str, Tiles], teacher: Teacher, steps: int, seed: int) -> StainNet:
    """Fits a StainNet to the teacher on random pixels of the tiles, by the mean absolute error.

    Adam takes so many steps, with a learning rate that falls to zero. The same seed, of the weights and of the pixels drawn,
    gives the same network on the same machine.
    """
    random = np.random.default_rng(seed)
    sources, targets = [], []
    for name in sorted(tiles):
        for tile in tiles[name]:
            flat = tile.reshape(-1, 3)
            drawn = flat[random.choice(len(flat), min(_PIXELS_PER_TILE, len(flat)), replace=False)]
            sources.append(drawn)
            targets.append(teacher.normalise(name, drawn))
    x, y = (torch.from_numpy(np.concatenate(parts)).float() / 127.5 - 1 for parts in (sources, targets))
    generator = torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)
    net = StainNet()
    optimiser = torch.optim.Adam(net.parameters(), _LEARNING_RATE)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, steps)
    for _ in range(steps):
        batch = torch.randint(len(x), (min(_PIXELS_PER_STEP, len(x)),), generator=generator)
        source, target = (pixels[batch].T[None, :, None, :] for pixels in (x, y))  # [1, 3, 1, n], for convolutions
        loss = (net(source) - target).abs().mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        schedule.step()
    return net.eval().requires_grad_(False)


def teacher_gaps(net: StainNet, tiles: Mapping[str, Tiles], teacher: Teacher) -> list[TeacherGap]:
    """Returns the differences between student and teacher on tiles that the student has not seen, slide by slide."""
    gaps = []
    for name, pixels in sorted(tiles.items()):
        if len(pixels):
            target = teacher.normalise(name, pixels).astype(np.int16)
            untouched, student = (float(np.abs(image - target).mean()) for image in (pixels, net.normalise(pixels)))
            gaps.append(TeacherGap(name, len(pixels), untouched, student))
    return gaps
