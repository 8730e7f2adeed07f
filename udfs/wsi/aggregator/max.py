"""The aggregator `max`: the maximum of each number of the embeddings."""

import numpy as np
from numpy.typing import NDArray

from udfs.wsi.aggregator.aggregator import StreamingAggregator


class Max(StreamingAggregator):
    """The state is the maximum so far."""

    name = "max"
    version = 1

    def partial(self, embeddings: NDArray[np.float32]) -> NDArray[np.float64]:
        """See `StreamingAggregator`."""
        largest: NDArray[np.float64] = embeddings.max(0).astype(np.float64)
        return largest

    def merge(self, one: NDArray[np.float64], other: NDArray[np.float64]) -> NDArray[np.float64]:
        """See `StreamingAggregator`."""
        larger: NDArray[np.float64] = np.maximum(one, other)
        return larger

    def finish(self, state: NDArray[np.float64], n_tiles: int) -> NDArray[np.float32]:
        """See `StreamingAggregator`."""
        return state.astype(np.float32)
