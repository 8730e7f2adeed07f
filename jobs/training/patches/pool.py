"""petastorm's pool of workers, with units for its work: results in the order of the units, a bounded number of them ahead.

Each of its threads has a process that reads for it, for threads would take turns with the interpreter, the trainer's among
them. (petastorm's own pool of processes waits for ever for one that died, and listens on TCP, where any user of the
machine could send it a pickle.) Processes are kept from epoch to epoch.

petastorm's own ventilator feeds its pool from a thread that polls, and its pool takes an empty queue beside a ventilator that is
done for the end, between whose two checks rows were lost (0.13.1). The ventilator here has no thread: it sends a unit when one
was taken, so that all who count units do so in one thread, and what is ahead is bounded by a number of units whichever of
them come late.
"""

import os
import weakref
from collections.abc import Generator, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from petastorm.workers_pool.thread_pool import ThreadPool
from petastorm.workers_pool.ventilator import Ventilator
from petastorm.workers_pool.worker_base import WorkerBase

from jobs.training.patches.buffer import PixelBuffer
from jobs.training.patches.patch_units import Unit
from jobs.training.patches.reader_process import Reader
from jobs.training.patches.unit_pixels import UnitRead
from udfs.wsi.store import StorageOptions


class UnitPool:
    """Processes that read units into a buffer, for one epoch at a time."""

    def __init__(
        self, n_parallel: int, ahead: int, storage_options: StorageOptions | None, buffer: PixelBuffer
    ) -> None:
        """Start nothing yet.

        Args:
            n_parallel: processes that read and decode.
            ahead: units that are read, or being read, and not yet taken, at most.
            storage_options: of the slides, for fsspec.
            buffer: takes the pixels, with room for `ahead` units beside what the consumer keeps in it.
        """
        self.buffer = buffer
        self._home = os.getpid()
        self._ahead = ahead
        self._readers = [Reader(storage_options, buffer) for _ in range(n_parallel)]
        self._close = weakref.finalize(self, _close_all, self._readers)  # when it is forgotten, or Python ends

    @property
    def is_ours(self) -> bool:
        """Whether this process made it: a fork's copy has the buffer and the processes of its parent."""
        return self._home == os.getpid()

    def read(self, units: Sequence[Unit]) -> Generator[tuple[Unit, NDArray[np.int64], UnitRead], None, None]:
        """Read units. Closed before its end it ends the processes, for they may be at work; the next call starts others.

        Yields:
            Each unit in the order of `units`, the places of its patches in the buffer, and how it went.

        Raises:
            RuntimeError: a process died.
        """
        # room for all that can be out, each with the message that it is done: a worker never waits for the consumer
        pool = ThreadPool(len(self._readers), results_queue_size=2 * self._ahead + len(self._readers))
        ventilator = _Ahead(pool.ventilate, units, self._ahead, self.buffer)
        for reader in self._readers:
            reader.open()
        pool.start(_UnitWorker, self._readers, ventilator)
        early: dict[int, UnitRead] = {}
        came = 0
        try:
            for number, unit in enumerate(units):
                while number not in early:
                    other, read = pool.get_results()
                    if isinstance(read, Exception):
                        raise read
                    early[other] = read
                    came += 1
                yield unit, ventilator.take(), early.pop(number)
                ventilator.send_more()
        finally:
            pool.stop()
            if came < len(units):
                self.close()
            pool.join()  # from now on nobody writes to the buffer

    def close(self) -> None:
        """End the processes."""
        _close_all(self._readers)


class _UnitWorker(WorkerBase):  # type: ignore[misc]
    """Has its process read units."""

    def process(self, number: int, unit: Unit, places: NDArray[np.int64]) -> None:
        """Publish the unit's number with how it went, or what is raised: petastorm would print that first."""
        try:
            self.publish_func((number, self.args[self.worker_id].read(unit, places)))
        except RuntimeError as error:
            self.publish_func((number, error))


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


def _close_all(readers: Sequence[Reader]) -> None:
    for reader in readers:
        reader.close()
