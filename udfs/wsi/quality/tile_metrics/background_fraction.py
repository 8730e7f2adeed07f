"""The metric `background_fraction`, by which `tiling.max_background` keeps tiles."""

import numpy as np
from numpy.typing import NDArray

from udfs.wsi.quality.mask_metric import MaskedTiles, MaskMetric


class BackgroundFraction(MaskMetric):
    """The share of each tile that the tissue method calls background."""

    column = "background_fraction"
    comment = "share of the tile that the mask calls background, 0 to 1"
    type = "float32"
    version = 1

    def measure(self, tiles: MaskedTiles) -> NDArray[np.float64]:
        """Returns the share of each tile, 0 to 1."""
        return tiles.share_of(tiles.background)
