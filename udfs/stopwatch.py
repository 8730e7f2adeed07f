"""How long a pass spends on what, by the clock of its thread."""

from collections.abc import Iterable, Iterator
from time import perf_counter
from typing import TypeVar

Item = TypeVar("Item")


class Stopwatch:
    """Sums seconds."""

    def __init__(self) -> None:
        """At zero."""
        self._seconds = 0.0

    def during(self, items: Iterable[Item]) -> Iterator[Item]:
        """Yields the items; the watch runs while an item is made, and stands while the caller uses it."""
        iterator = iter(items)
        while True:
            begun = perf_counter()
            try:
                item = next(iterator)
            except StopIteration:
                return
            finally:
                self._seconds += perf_counter() - begun
            yield item

    def take(self) -> float:
        """Returns the seconds since the last call."""
        seconds, self._seconds = self._seconds, 0.0
        return seconds
