"""What a metric of tiles at the resolution of the tissue mask is: a column of table tiles."""

from abc import abstractmethod
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from udfs.wsi.quality.metric import Metric
from udfs.wsi.tissue.grid import mask_fractions


@dataclass(frozen=True)
class MaskedTiles:
    """The tiles of a slide and what a metric sees of them: the slide at 1/downsample and its tissue mask."""

    pixels: NDArray[np.uint8]  # [h, w, 3], RGB
    background: NDArray[np.bool_]  # [h, w], by the tissue method
    xy_px: NDArray[np.int32]  # [n, 2], top-left corners of the tiles, level-0 pixels
    span_px: float  # edge of a tile, level-0 pixels
    downsample: int  # level-0 pixels per pixel of `pixels`

    def share_of(self, mask: NDArray[np.bool_]) -> NDArray[np.float64]:
        """Returns the share of a mask, bool [h, w], under each tile: float64 [n], see `mask_fractions`."""
        return mask_fractions(mask, self.xy_px, self.span_px, self.downsample)


class MaskMetric(Metric):
    """A number per tile of the grid, measured in the slides pass. A new one makes the rows of table tiles again."""

    @abstractmethod
    def measure(self, tiles: MaskedTiles) -> NDArray[Any]:
        """Returns the metric of each tile, [n]."""
