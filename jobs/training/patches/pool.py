"""petastorm's pool of workers, with units for its work: results in the order of the units, a bounded number of them ahead.

petastorm's own ventilator feeds its pool from a thread that polls, and its pool takes an empty queue beside a ventilator that is
done for the end, between whose two checks rows were lost (0.13.1). The ventilator here has no thread: it sends a unit when one
was taken, so that all who count units do so in one thread, and what is ahead is bounded by a number of units whichever of
them come late.
"""

from collections.abc import Generator, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from petastorm.workers_pool.thread_pool import ThreadPool
from petastorm.workers_pool.ventilator import Ventilator
from petastorm.workers_pool.worker_base import WorkerBase

from jobs.training.patches.buffer import PixelBuffer
from jobs.training.patches.reading import UnitRead, read_unit
from jobs.training.patches.units import Unit
from udfs.wsi.store import StorageOptions


class _UnitWorker(WorkerBase):  # type: ignore[misc]
    """Reads units in one of the pool's threads, right into the buffer."""

    def process(self, number: int, unit: Unit, places: NDArray[np.int64]) -> None:
        """Publish the unit's number with how it went."""
        storage_options, pixels = self.args
        self.publish_func((number, read_unit(unit, storage_options, pixels, places)))


class _Ahead(Ventilator):  # type: ignore[misc]
    """Sends units in order, and never has more than `ahead` of them out that were not taken yet."""

    def __init__(self, send: Any, units: Sequence[Unit], ahead: int, buffer: PixelBuffer) -> None:
        super().__init__(send)
        self._units, self._ahead, self._buffer = units, ahead, buffer
        self._sent = self._taken = 0
        self._places: dict[int, NDArray[np.int64]] = {}
        self._stopped = False

    def start(self) -> None:
        """Send the first ones."""
        self._send()

    def take(self) -> NDArray[np.int64]:
        """The next unit is with the consumer: the places of its patches."""
        places = self._places.pop(self._taken)
        self._taken += 1
        return places

    def send_more(self) -> None:
        """As many as were taken."""
        self._send()

    def processed_item(self) -> None:
        """The pool's word that one was read, in any order: it still takes memory, so it counts for nothing here."""

    def completed(self) -> bool:
        """Whether all were taken."""
        return self._stopped or self._taken == len(self._units)

    def stop(self) -> None:
        """Send no more."""
        self._stopped = True

    def _send(self) -> None:
        while not self._stopped and self._sent < min(len(self._units), self._taken + self._ahead):
            number, unit = self._sent, self._units[self._sent]
            self._places[number] = self._buffer.reserve(len(unit.patches))
            self._sent += 1
            self._ventilate_fn(number, unit, self._places[number])


def read_in_order(
    units: Sequence[Unit], n_parallel: int, ahead: int, storage_options: StorageOptions | None, buffer: PixelBuffer
) -> Generator[tuple[Unit, NDArray[np.int64], UnitRead], None, None]:
    """Read units by `n_parallel` workers of petastorm; close the iterator to stop them.

    Args:
        units: in the order in which they are wanted.
        n_parallel: threads that read and decode; decoders release the interpreter's lock.
        ahead: units that are read, or being read, and not yet taken, at most.
        storage_options: of the slides, for fsspec.
        buffer: takes the pixels, with room for `ahead` units beside what the consumer keeps in it.

    Yields:
        Each unit in the order of `units`, the places of its patches in the buffer, and how it went.
    """
    # room for all that can be out, each with the message that it is done: a worker never waits for the consumer
    pool = ThreadPool(n_parallel, results_queue_size=2 * ahead + n_parallel)
    ventilator = _Ahead(pool.ventilate, units, ahead, buffer)
    pool.start(_UnitWorker, (storage_options, buffer.pixels), ventilator)
    early: dict[int, UnitRead] = {}
    try:
        for number, unit in enumerate(units):
            while number not in early:
                other, came = pool.get_results()  # raises where a worker died of a fault of ours
                early[other] = came
            yield unit, ventilator.take(), early.pop(number)
            ventilator.send_more()
    finally:
        pool.stop()
        pool.join()  # from now on nobody writes to the buffer
