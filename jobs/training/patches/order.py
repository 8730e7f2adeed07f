"""The order of patches: units in random order through a shuffle buffer. Numbers only, so the order is known beforehand.

The order follows from the units, the size of the buffer, the seed and the epoch. It does not depend on the workers.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import comb
from typing import Any

import numpy as np
from numpy.typing import NDArray

Numbers = NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class EpochOrder:
    """The order of one epoch."""

    units: Numbers  # int64 [units], in the order in which they are read
    patches: Numbers  # int64 [n], in the order in which they come


def epoch_order(units: Sequence[Numbers], buffer_patches: int, seed: int, epoch: int) -> EpochOrder:
    """An epoch: each patch once.

    Args:
        units: the patches of each unit, int64 [m].
        buffer_patches: patches that are held at most. A patch is drawn at random whenever the next unit needs room. A unit
            that is larger than the buffer is held alone.
        seed: of all epochs.
        epoch: number of the epoch; each epoch has an order of its own.
    """
    random = np.random.default_rng([seed, epoch])
    sequence = random.permutation(len(units)).astype(np.int64)
    draws = random.random(sum(map(len, units))).tolist()
    buffer: list[int] = []
    patches: list[int] = []

    def draw() -> None:
        place = int(draws[len(patches)] * len(buffer))
        buffer[place], buffer[-1] = buffer[-1], buffer[place]
        patches.append(buffer.pop())

    for unit in sequence:
        while buffer and len(buffer) + len(units[unit]) > buffer_patches:
            draw()
        buffer.extend(units[unit].tolist())
    while buffer:
        draw()
    return EpochOrder(sequence, np.array(patches, np.int64))


def mixing(groups: NDArray[np.integer[Any]], batch_size: int) -> float:
    """How well an order mixes: the mean number of distinct groups per batch, divided by that of a perfect shuffle.

    Args:
        groups: int [n], the slide or unit of each patch, in the order in which the patches come.
        batch_size: patches per batch. The last batch is left out if it is smaller.

    Returns:
        0 to 1, where 1 is as good as a perfect shuffle of all n, and chance may give a little more; 1 if no batch is full.
    """
    n, full = len(groups), len(groups) // batch_size
    if not full:
        return 1.0
    batches = np.sort(groups[: full * batch_size].reshape(full, batch_size), axis=1)
    distinct = 1 + (np.diff(batches, axis=1) > 0).sum(axis=1)
    # in a perfect shuffle, a group of `size` patches misses a batch if all of the batch is drawn from the n - size others
    sizes = np.unique(np.unique(groups, return_counts=True)[1], return_counts=True)
    all_batches = comb(n, batch_size)
    perfect = sum(
        count * (1 - comb(n - size, batch_size) / all_batches) for size, count in np.transpose(sizes).tolist()
    )
    return float(distinct.mean() / perfect)
