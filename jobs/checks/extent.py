"""What a cohort takes, estimated from a sample of its slides: bounds that follow the sizes of all files."""

import math
from bisect import bisect_left
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

_NEIGHBOURS = 3  # sampled slides below, and as many above in size, that a slide is compared with
_BEYOND = 1.5  # bounds lie so many times as far from the mean as the furthest sampled slides: samples miss extremes
FEWEST_SLIDES = 3  # fewer sampled slides do not show the spread
UNKNOWN_SPREAD = 3  # bounds then reach from the mean divided by this to the mean times this, or further


class Bounds(NamedTuple):
    """An estimate between two bounds."""

    low: float
    likely: float
    high: float

    def at_most(self, most: float) -> "Bounds":
        """Returns the bounds, each cut to `most`."""
        return Bounds(*(min(value, most) for value in self))


def total(bounds: Iterable[Bounds]) -> Bounds:
    """Returns the sum of bounds."""
    parts = list(bounds)
    return Bounds(*(math.fsum(part[i] for part in parts) for i in range(3)))


class PerSlide:
    """A number per slide (tiles, seconds) for slides of any size, from a sample of slides."""

    def __init__(self, sampled: Sequence[tuple[int, float]], sizes: Iterable[int]) -> None:
        """Takes size of the file in bytes and number for each slide of the sample, and the sizes of all slides."""
        self._sampled = sorted(sampled)
        n_all, n_sampled = Counter(sizes), Counter(size for size, _ in sampled)
        # all slides of these sizes are sampled
        self._known = {size for size, n in n_sampled.items() if n == n_all[size]}

    def of(self, size_bytes: int) -> Bounds:
        """Returns the bounds for a slide: its size times the numbers per byte of the sampled slides nearest in size.

        If fewer than FEWEST_SLIDES are near, the bounds are at least as wide as UNKNOWN_SPREAD says.
        """
        first, end = (bisect_left(self._sampled, (size, -math.inf)) for size in (size_bytes, size_bytes + 1))
        if size_bytes in self._known:
            return Bounds(*[math.fsum(value for _, value in self._sampled[first:end]) / (end - first)] * 3)
        near = self._sampled[max(0, first - _NEIGHBOURS) : end + _NEIGHBOURS]
        rates = [value / size for size, value in near]
        mean = math.fsum(rates) / len(rates)
        low, high = (max(0.0, mean + _BEYOND * (end - mean)) for end in (min(rates), max(rates)))
        if len(near) < FEWEST_SLIDES:
            low, high = min(low, mean / UNKNOWN_SPREAD), max(high, mean * UNKNOWN_SPREAD)
        return Bounds(*(size_bytes * rate for rate in (low, mean, high)))


def spread_over(sizes: Sequence[int], n: int) -> list[int]:
    """Returns the indices of n slides to sample, the largest first: half evenly by rank in size, half evenly by bytes.

    The sample so has some of the few slides with most of the bytes, and some of the many small ones.
    """
    order = sorted(range(len(sizes)), key=lambda i: (-sizes[i], i))
    ends, end = [], 0
    for i in order:
        end += sizes[i]
        ends.append(end)
    steps = max(1, n - 1)
    by_bytes = [min(bisect_left(ends, end * step / steps), len(order) - 1) for step in range(n)]
    by_rank = [round((len(order) - 1) * step / steps) for step in range(n)]
    wanted = [place for pair in zip(by_bytes, by_rank, strict=True) for place in pair]
    chosen = list(dict.fromkeys([*wanted[::4], *wanted[1::4], *wanted[2::4], *wanted[3::4], *range(len(order))]))[:n]
    return [order[place] for place in sorted(chosen)]


@dataclass(frozen=True)
class CohortSize:
    """The slides of a run, by patient."""

    patients: Mapping[str, Sequence[int]]  # sizes of the files of a patient's slides, bytes
    most_tiles: int | None  # per patient, tiling.max_tiles_per_patient

    @property
    def sizes(self) -> list[int]:
        """Sizes of the files of all slides, in bytes."""
        return [size for sizes in self.patients.values() for size in sizes]

    def bags(self, tiles: PerSlide) -> list[Bounds]:
        """Returns the bounds on the number of tiles of each patient, in the order of `patients`."""
        most = self.most_tiles or math.inf
        return [total(map(tiles.of, sizes)).at_most(most) for sizes in self.patients.values()]
