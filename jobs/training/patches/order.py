"""The order of patches: units in random order through a shuffle buffer. Numbers only, so the order is known beforehand."""

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
    """Returns the order of an epoch, which has each patch of `units`, int64 [m] each, once.

    A buffer holds at most `buffer_patches`, or one unit that is larger. A patch is drawn at random whenever the next unit needs
    room. The seed gives each epoch an order of its own.
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
    """Returns the mean number of distinct groups per full batch, divided by that of a perfect shuffle; 1 if no batch is full.

    `groups`: int [n], the slide or unit of each patch, in the order in which the patches come. Chance may give a little over 1.
    """
    n, full = len(groups), len(groups) // batch_size
    if not full:
        return 1.0
    batches = np.sort(groups[: full * batch_size].reshape(full, batch_size), axis=1)
    distinct = 1 + (np.diff(batches, axis=1) > 0).sum(axis=1)
    # in a perfect shuffle, a group of `size` patches misses a batch if all of the batch is drawn from the n - size others
    sizes = np.unique(np.unique(groups, return_counts=True)[1], return_counts=True)
    n_batches = comb(n, batch_size)
    perfect = sum(count * (1 - comb(n - size, batch_size) / n_batches) for size, count in np.transpose(sizes).tolist())
    return float(distinct.mean() / perfect)
