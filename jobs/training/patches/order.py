"""In which order patches come: units in random order through a shuffle buffer. Numbers only, so it is known beforehand.

The order follows from the units, the buffer, the seed and the epoch alone: whatever the number of workers and whichever of
them is the faster, the same patches make the same batches.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import lgamma

import numpy as np
from numpy.typing import NDArray

Numbers = NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class EpochOrder:
    """One epoch."""

    units: Numbers  # int64 [units], in the order in which they are read
    patches: Numbers  # int64 [n], in the order in which they come


def epoch_order(units: Sequence[Numbers], buffer_patches: int, seed: int, epoch: int) -> EpochOrder:
    """An epoch: each patch once.

    Args:
        units: the patches of each unit, int64 [m].
        buffer_patches: so many patches are held at most, one of which is drawn at random whenever room is wanted; a
            unit that is larger is held all the same.
        seed: of all epochs.
        epoch: number of the epoch; each has an order of its own.
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


def mixing(groups: Numbers, batch_size: int) -> float:
    """How well an order mixes: mean number of distinct groups in a batch, of that of a perfect shuffle.

    Args:
        groups: int64 [n], for each patch in the order in which they come the slide (or unit) that it is of.
        batch_size: patches a batch; the rest that fills no batch is left out.

    Returns:
        1 for as good as a perfect shuffle of all n; 0 to 1, a little above by chance; 1 where there is no full batch.
    """
    full = len(groups) // batch_size
    if not full:
        return 1.0
    batches = np.sort(groups[: full * batch_size].reshape(full, batch_size), axis=1)
    distinct = 1 + (np.diff(batches, axis=1) > 0).sum(axis=1)
    return float(distinct.mean()) / _of_a_perfect_shuffle(np.unique(groups, return_counts=True)[1], batch_size)


def _of_a_perfect_shuffle(sizes: Numbers, batch_size: int) -> float:
    """Distinct groups that are expected among `batch_size` of all patches drawn without replacement."""
    n = int(sizes.sum())

    def log_choose(of: int) -> float:
        return lgamma(of + 1) - lgamma(batch_size + 1) - lgamma(of - batch_size + 1)

    expected = 0.0
    for size, groups in zip(*np.unique(sizes, return_counts=True), strict=True):
        others = n - int(size)
        missed = np.exp(log_choose(others) - log_choose(n)) if others >= batch_size else 0.0
        expected += int(groups) * (1.0 - float(missed))
    return expected
