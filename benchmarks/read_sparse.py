"""read_sparse: tiles at random places in the tissue, as a training feed asks for them, on one core.

They lie on no grid, so that few share a block.
"""

from collections.abc import Iterator

import numpy as np

from benchmarks import inputs, peers
from benchmarks.inputs import TILE_PX
from benchmarks.measure import Line

_TILES = 500


def run() -> Iterator[Line]:
    """One line."""
    path = inputs.pyramid()
    random = np.random.default_rng(0)
    kept = random.permutation(inputs.kept_tiles(path))[:_TILES]
    yield peers.compared(path, kept + random.integers(-TILE_PX // 2, TILE_PX // 2, kept.shape))
