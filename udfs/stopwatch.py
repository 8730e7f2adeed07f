"""How long a UDF spends on what, by the clock of its thread."""

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
        """The items; runs while each of them, or the error in its place, is made, and stands while it is worked on."""
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
