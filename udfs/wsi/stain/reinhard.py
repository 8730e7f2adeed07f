"""Reinhard's colour transfer, the classical stain normaliser that teaches StainNet.

Reinhard et al., Color Transfer between Images, IEEE Computer Graphics and Applications 21(5), 2001,
doi:10.1109/38.946629; in CIELAB (D65), as is usual for histology.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from skimage.color import lab2rgb, rgb2lab


@dataclass(frozen=True)
class Appearance:
    """How a stain looks: mean and standard deviation of its pixels in CIELAB, each float [3]."""

    mean: NDArray[np.float64]
    std: NDArray[np.float64]


def appearance(pixels: NDArray[np.uint8]) -> Appearance:
    """Returns the appearance of tissue pixels, uint8 [n, 3], RGB; raises ValueError if all pixels are alike."""
    lab = rgb2lab(pixels)
    if len(lab) < 2 or not lab.std(axis=0).all():
        raise ValueError("the pixels are too few or all alike: no appearance to measure")
    return Appearance(lab.mean(axis=0), lab.std(axis=0))


def transfer(pixels: NDArray[np.uint8], source: Appearance, target: Appearance) -> NDArray[np.uint8]:
    """Gives pixels, uint8 [..., 3], RGB, of appearance `source` that of `target`; colours beyond sRGB are cut."""
    lab = (rgb2lab(pixels) - source.mean) * (target.std / source.std) + target.mean
    # lab2rgb cuts colours of negative Z in the same way, and warns
    lab[..., 2] = np.minimum(lab[..., 2], (lab[..., 0] + 16) / 116 * 200)
    rgb: NDArray[np.uint8] = np.rint(lab2rgb(lab) * 255).astype(np.uint8)
    return rgb
