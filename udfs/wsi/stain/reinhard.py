"""Reinhard's colour transfer, the classical stain normaliser that teaches StainNet.

Reinhard et al., Color Transfer between Images, IEEE Computer Graphics and Applications 21(5), 2001,
doi:10.1109/38.946629; in CIELAB (D65), as is usual for histology. sRGB and CIELAB after IEC 61966-2-1 and CIE 15.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]

_RGB_TO_XYZ = np.array([[0.412453, 0.357580, 0.180423], [0.212671, 0.715160, 0.072169], [0.019334, 0.119193, 0.950227]])
_XYZ_TO_RGB = np.linalg.inv(_RGB_TO_XYZ)
_WHITE = np.array([0.95047, 1.0, 1.08883])  # D65, 2 degrees
_LINEAR_BELOW = 0.008856


@dataclass(frozen=True)
class Appearance:
    """How a stain looks: mean and standard deviation of its pixels in CIELAB, each float [3]."""

    mean: Floats
    std: Floats


def appearance(pixels: NDArray[np.uint8]) -> Appearance:
    """The appearance of some pixels; give tissue only, for glass would drown it.

    Args:
        pixels: uint8 [n, 3], RGB, at least two that differ.

    Raises:
        ValueError: there is nothing to measure.
    """
    lab = rgb_to_lab(pixels.reshape(-1, 3))
    if len(lab) < 2 or not lab.std(axis=0).all():
        raise ValueError("the pixels are too few or all alike: no appearance to measure")
    return Appearance(lab.mean(axis=0), lab.std(axis=0))


def transfer(pixels: NDArray[np.uint8], source: Appearance, target: Appearance) -> NDArray[np.uint8]:
    """Give pixels of one appearance another.

    Args:
        pixels: uint8 [..., 3].
        source: of the slide that they are from.
        target: the one wanted.

    Returns:
        uint8, same shape.
    """
    lab = rgb_to_lab(pixels.reshape(-1, 3))
    moved = (lab - source.mean) * (target.std / source.std) + target.mean
    return lab_to_rgb(moved).reshape(pixels.shape)


def rgb_to_lab(rgb: NDArray[np.uint8]) -> Floats:
    """From sRGB uint8 [n, 3] to CIELAB float [n, 3] (L 0..100)."""
    scaled = rgb.astype(np.float64) / 255
    linear = np.where(scaled > 0.04045, ((scaled + 0.055) / 1.055) ** 2.4, scaled / 12.92)
    xyz = linear @ _RGB_TO_XYZ.T / _WHITE
    f = np.where(xyz > _LINEAR_BELOW, np.cbrt(xyz), 7.787 * xyz + 16 / 116)
    return np.stack([116 * f[:, 1] - 16, 500 * (f[:, 0] - f[:, 1]), 200 * (f[:, 1] - f[:, 2])], axis=1)


def lab_to_rgb(lab: Floats) -> NDArray[np.uint8]:
    """From CIELAB float [n, 3] to sRGB uint8 [n, 3]; colours that sRGB does not have are cut."""
    fy = (lab[:, 0] + 16) / 116
    f = np.stack([fy + lab[:, 1] / 500, fy, fy - lab[:, 2] / 200], axis=1)
    xyz = np.where(f > np.cbrt(_LINEAR_BELOW), f**3, (f - 16 / 116) / 7.787) * _WHITE
    linear = np.clip(xyz @ _XYZ_TO_RGB.T, 0, 1)
    scaled = np.where(linear > 0.0031308, 1.055 * linear ** (1 / 2.4) - 0.055, linear * 12.92)
    rgb: NDArray[np.uint8] = np.rint(scaled * 255).astype(np.uint8)
    return rgb
