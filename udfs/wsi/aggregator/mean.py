"""The aggregator `mean`: the mean of the embeddings."""

import numpy as np
from numpy.typing import NDArray

from udfs.wsi.aggregator.aggregator import StreamingAggregator


class Mean(StreamingAggregator):
    """Each tile weighs the same. The state is the sum of the embeddings."""

    name = "mean"
    version = 1

    def partial(self, embeddings: NDArray[np.float32]) -> NDArray[np.float64]:
        """See `StreamingAggregator`."""
        total: NDArray[np.float64] = embeddings.sum(0, dtype=np.float64)
        return total

    def merge(self, one: NDArray[np.float64], other: NDArray[np.float64]) -> NDArray[np.float64]:
        """See `StreamingAggregator`."""
        return one + other

    def finish(self, state: NDArray[np.float64], n_tiles: int) -> NDArray[np.float32]:
        """See `StreamingAggregator`."""
        return (state / n_tiles).astype(np.float32)
