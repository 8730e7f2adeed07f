"""What a metric of tiles at their full resolution is: a column of table features."""

from abc import abstractmethod
from typing import Any

import numpy as np
from numpy.typing import NDArray

from udfs.wsi.quality.metric import Metric


class PixelMetric(Metric):
    """A number per tile, measured on the pixels that the encoder gets, in the features pass.

    A new metric, and a new version of one, makes all tiles be encoded again: no other pass reads their pixels.
    """

    @abstractmethod
    def measure(self, tiles: NDArray[np.uint8]) -> NDArray[Any]:
        """Returns the metric of each tile, [n]; does not change `tiles`.

        `tiles` are uint8 [n, tile_px, tile_px, 3], RGB, stain-normalised if `stain.weights` is set.
        """
