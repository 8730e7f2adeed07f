"""What an aggregator is: it makes one vector of a bag. Each aggregator is a file of this folder; a new file is known at once."""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from inspect import isabstract
from typing import ClassVar, Self

import numpy as np
from numpy.typing import NDArray

from udfs.wsi.registry import import_modules
from udfs.wsi.store import StorageOptions


@dataclass(frozen=True)
class TileBag:
    """The tiles of one slide, or of all slides of one patient, from one encoder.

    Axes: n tiles in the order of image_id, y_px and x_px, d numbers of an embedding.
    """

    embeddings: NDArray[np.float32]  # [n, d]
    xy_px: NDArray[np.int32]  # [n, 2], top-left corners, level-0 pixels of the tile's slide
    slide: NDArray[np.int32]  # [n], which slide of the bag the tile lies on, from 0 in the order of image_id


class Aggregator(ABC):
    """A way to make one vector of a bag. Subclasses of this class get whole bags, with the places of the tiles.

    Attributes:
        name: as `aggregators.NAME.method` has it.
        version: raise it when the same bag begins to give another vector.
        has_weights: whether it is learned, and needs a checkpoint.
        weights: fingerprint of the weights; empty if it has none.
        input_dim: numbers of an embedding that it takes; None takes any.
    """

    name: ClassVar[str]
    version: ClassVar[int]
    has_weights: ClassVar[bool] = False
    weights: str = ""
    input_dim: int | None = None

    @classmethod
    def load(cls, weights: str | None, storage_options: StorageOptions | None = None) -> Self:
        """Returns the aggregator; with `has_weights`, of the checkpoint at a URI.

        Raises:
            CheckpointError: the weights cannot be read or do not fit.
        """
        return cls()

    @abstractmethod
    def pool(self, bag: TileBag) -> NDArray[np.float32]:
        """Returns the vector of a bag of at least one tile, float32 [k]."""

    @property
    def identity(self) -> tuple[str, ...]:
        """Everything that shapes the vector of a bag, each as ``name=value``: equal identities give equal vectors."""
        weights = (f"weights={self.weights[:16]}",) if self.has_weights else ()
        return (f"method={self.name}", f"version={self.version}", *weights)


class StreamingAggregator(Aggregator):
    """An aggregator that takes tiles in parts, in any order, and so never has a whole bag in memory."""

    @abstractmethod
    def partial(self, embeddings: NDArray[np.float32]) -> NDArray[np.float64]:
        """Returns the state of some tiles, float64 [k], from their embeddings [n, d]."""

    @abstractmethod
    def merge(self, one: NDArray[np.float64], other: NDArray[np.float64]) -> NDArray[np.float64]:
        """Returns the state of the tiles of two states."""

    @abstractmethod
    def finish(self, state: NDArray[np.float64], n_tiles: int) -> NDArray[np.float32]:
        """Returns the vector of all tiles from their state."""

    def pool(self, bag: TileBag) -> NDArray[np.float32]:
        """See `Aggregator`."""
        return self.finish(self.partial(bag.embeddings), len(bag.embeddings))


@dataclass(frozen=True)
class AggregatorSpec:
    """An aggregator of the settings, as the workers get it."""

    name: str  # in column aggregator of the tables
    method: str
    weights: str | None = None  # URI of its checkpoint
    encoder: str | None = None  # the encoder whose tiles it takes; None takes those of all


def aggregator_methods() -> dict[str, type[Aggregator]]:
    """Returns all aggregators by the name of their method."""
    import_modules(__package__)
    kinds = [*Aggregator.__subclasses__(), *StreamingAggregator.__subclasses__()]
    return {
        each.name: each for each in sorted((kind for kind in kinds if not isabstract(kind)), key=lambda each: each.name)
    }


def load_aggregator(spec: AggregatorSpec, storage_options: StorageOptions | None = None) -> Aggregator:
    """Returns the aggregator of a spec. See `Aggregator.load` for errors."""
    return aggregator_methods()[spec.method].load(spec.weights, storage_options)
