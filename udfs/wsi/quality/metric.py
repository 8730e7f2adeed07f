"""What all metrics of tiles declare. Each metric is a file of the folder `tile_metrics`; a new file is known at once."""

from abc import ABC
from typing import ClassVar, Literal, Self

from udfs.wsi.registry import import_modules


class Metric(ABC):
    """A number per tile. A subclass of `MaskMetric` is a column of table tiles, one of `PixelMetric` of table features."""

    column: ClassVar[str]
    comment: ClassVar[str]  # of the column: meaning, unit and range
    type: ClassVar[Literal["bool", "int32", "int64", "float32", "float64"]]
    version: ClassVar[int]  # raise it when the metric begins to give other values

    @classmethod
    def defined(cls) -> list[Self]:
        """Returns all metrics of this kind, in the order of their columns."""
        import_modules("udfs.wsi.quality.tile_metrics")
        return sorted((metric() for metric in cls.__subclasses__()), key=lambda metric: metric.column)
