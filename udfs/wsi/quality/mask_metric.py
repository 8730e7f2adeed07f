"""What a metric of tiles at the resolution of the tissue mask is. Each metric is a file of the folder `tile_metrics`."""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np
from numpy.typing import NDArray

from udfs.wsi.registry import import_modules
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
        """The share of a mask, bool [h, w], under each tile: float64 [n], see `mask_fractions`."""
        return mask_fractions(mask, self.xy_px, self.span_px, self.downsample)


class MaskMetric(ABC):
    """A number per tile, measured in the slides pass. A subclass is a column of table tiles."""

    column: ClassVar[str]
    comment: ClassVar[str]  # of the column: meaning, unit and range
    type: ClassVar[Literal["bool", "int32", "int64", "float32", "float64"]]
    version: ClassVar[int]  # raise it when the metric begins to give other values

    @abstractmethod
    def measure(self, tiles: MaskedTiles) -> NDArray[Any]:
        """The metric of each tile, [n]."""


def mask_metrics() -> list[MaskMetric]:
    """All metrics, in the order of their columns."""
    import_modules("udfs.wsi.quality.tile_metrics")
    return sorted((metric() for metric in MaskMetric.__subclasses__()), key=lambda metric: metric.column)
