"""The tissue method `brightness`: glass is bright in all three colours."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from udfs.wsi.tissue.method import TissueMethod, method_setting

_ROWS = 64  # of a strip whose arrays stay in the processor's cache


@dataclass(frozen=True)
class Brightness(TissueMethod):
    """A mask pixel is background if R, G and B are all above `background_brightness`."""

    name = "brightness"
    version = 1
    background_brightness: int = method_setting(
        190, "a mask pixel is background if R, G and B are all above this", ge=0, le=255
    )

    def background(self, pixels: NDArray[np.uint8]) -> NDArray[np.bool_]:
        """Returns the mask of an image: see `TissueMethod.background`."""
        mask = np.empty(pixels.shape[:2], np.bool_)
        for top in range(0, len(pixels), _ROWS):
            red, green, blue = np.moveaxis(pixels[top : top + _ROWS], -1, 0)
            darkest = np.minimum(np.minimum(red, green), blue)
            np.greater(darkest, self.background_brightness, out=mask[top : top + _ROWS])
        return mask
