"""Fit a StainNet: the student learns, pixel by pixel, what a classical normaliser does to each slide."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from udfs.wsi.stain.reinhard import appearance, transfer
from udfs.wsi.stain.stainnet import StainNet
from udfs.wsi.tissue.method import TissueMethod

Tiles = NDArray[np.uint8]  # [n, h, w, 3]

_PIXELS_A_TILE = 4096
_PIXELS_A_STEP = 16_384
_LEARNING_RATE = 0.01
_HOLD_OUT_EVERY = 5


@dataclass(frozen=True)
class TeacherGap:
    """How far from the teacher, mean absolute difference in grey levels (0 to 255) over held-out tiles of one slide."""

    image_id: str
    tiles: int
    untouched: float  # the source itself
    student: float  # the fitted StainNet


class Teacher:
    """Reinhard's transfer from the appearance of each centre's slides to the reference slide's.

    Stains differ between laboratories; what differs between the slides of one is tissue as much as stain, and a map of
    colours can't tell slides apart anyway.
    """

    def __init__(
        self, tiles: Mapping[str, Tiles], centers: Mapping[str, str], reference: str, glass: TissueMethod
    ) -> None:
        """Measure appearances on the tissue of the tiles.

        Args:
            tiles: by image_id.
            centers: center_id by image_id.
            reference: the image_id whose appearance is the target.
            glass: tells tissue from background on the tiles.
        """
        tissue = {name: _tissue(pixels, glass) for name, pixels in tiles.items()}
        of_center = {
            center: appearance(np.concatenate([tissue[name] for name in sorted(tiles) if centers[name] == center]))
            for center in {centers[name] for name in tiles}
        }
        self._sources = {name: of_center[centers[name]] for name in tiles}
        self._target = appearance(tissue[reference])

    def normalise(self, image_id: str, pixels: NDArray[np.uint8]) -> NDArray[np.uint8]:
        """Uint8 [..., 3] of that slide as the reference would look."""
        return transfer(pixels, self._sources[image_id], self._target)


def split_tiles(tiles: Mapping[str, Tiles]) -> tuple[dict[str, Tiles], dict[str, Tiles]]:
    """(to fit, held out): every fifth tile of a slide is held out, none where it has fewer than two."""
    fit, held = {}, {}
    for name, pixels in tiles.items():
        out = np.arange(len(pixels)) % _HOLD_OUT_EVERY == 1
        fit[name], held[name] = pixels[~out], pixels[out]
    return fit, held


def fit_stainnet(tiles: Mapping[str, Tiles], teacher: Teacher, steps: int, seed: int) -> StainNet:
    """Fit on random pixels of the tiles, by the mean absolute error (Adam, learning rate falling to zero).

    Args:
        tiles: by image_id, uint8 [n, h, w, 3].
        teacher: what the student is to do.
        steps: gradient steps.
        seed: of the weights and of the pixels drawn; the same seed gives the same network on the same machine.
    """
    random = np.random.default_rng(seed)
    sources, targets = [], []
    for name in sorted(tiles):
        for tile in tiles[name]:
            flat = tile.reshape(-1, 3)
            drawn = flat[random.choice(len(flat), min(_PIXELS_A_TILE, len(flat)), replace=False)]
            sources.append(drawn)
            targets.append(teacher.normalise(name, drawn))
    x, y = (_scaled(np.concatenate(parts)) for parts in (sources, targets))
    generator = torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)
    net = StainNet()
    optimiser = torch.optim.Adam(net.parameters(), _LEARNING_RATE)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, steps)
    for _ in range(steps):
        batch = torch.randint(len(x), (min(_PIXELS_A_STEP, len(x)),), generator=generator)
        loss = (net(_as_image(x[batch])) - _as_image(y[batch])).abs().mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        schedule.step()
    return net.eval().requires_grad_(False)


def evaluate(net: StainNet, tiles: Mapping[str, Tiles], teacher: Teacher) -> list[TeacherGap]:
    """The student against the teacher on tiles that it has not seen, slide by slide."""
    errors = []
    for name, pixels in sorted(tiles.items()):
        if len(pixels):
            wanted = teacher.normalise(name, pixels).astype(np.int16)
            got = np.stack([net.normalise(tile) for tile in pixels]).astype(np.int16)
            untouched, student = (float(np.abs(image - wanted).mean()) for image in (pixels.astype(np.int16), got))
            errors.append(TeacherGap(name, len(pixels), untouched, student))
    return errors


def _tissue(tiles: Tiles, glass: TissueMethod) -> NDArray[np.uint8]:
    """uint8 [n, 3]: the pixels that are not glass, one in sixteen."""
    return np.concatenate([tile[~glass.background(tile)] for tile in tiles[:, ::4, ::4]])


def _scaled(pixels: NDArray[np.uint8]) -> torch.Tensor:
    return torch.from_numpy(pixels).float() / 127.5 - 1


def _as_image(pixels: torch.Tensor) -> torch.Tensor:
    """[n, 3] as [1, 3, 1, n], for the network's convolutions."""
    return pixels.T[None, :, None, :]
