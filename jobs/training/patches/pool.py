"""petastorm's pool of worker processes, with units for its work: results in the order of the units, a bounded number ahead.

Processes, for threads would take turns with the interpreter, the trainer's among them. They are kept from epoch to epoch, and
write pixels into memory that they share with the trainer: what goes through petastorm's sockets is what to read and that
it was read.
"""

import itertools
import os
import pickle
import sys
import tempfile
import weakref
from collections import deque
from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager, suppress
from threading import Thread
from typing import Any

import numpy as np
import zmq
from numpy.typing import NDArray
from petastorm.workers_pool.process_pool import ProcessPool
from petastorm.workers_pool.worker_base import WorkerBase

from jobs.training.patches.buffer import PixelBuffer
from jobs.training.patches.reading import UnitRead, read_unit
from jobs.training.patches.units import Unit
from udfs.wsi.store import StorageOptions


class UnitPool:
    """Workers that read units into a buffer. One epoch reads at a time."""

    def __init__(
        self, n_parallel: int, ahead: int, storage_options: StorageOptions | None, buffer: PixelBuffer
    ) -> None:
        """Start the workers.

        Args:
            n_parallel: processes that read and decode, some 150 MB each.
            ahead: units that are read, or being read, and not yet taken, at most.
            storage_options: of the slides, for fsspec.
            buffer: takes the pixels, with room for `ahead` units beside what the consumer keeps in it.

        Raises:
            RuntimeError: they do not start.
        """
        self.buffer = buffer
        self._ahead = ahead
        self._pool = _Processes(n_parallel)
        self._stop = weakref.finalize(self, _stopped, self._pool)  # also when Python ends, or the loader is forgotten
        try:
            with _same_modules():
                self._pool.start(_UnitWorker, (storage_options, buffer.shared))
        finally:
            buffer.shared.forget_path()

    def read(self, units: Sequence[Unit]) -> Generator[tuple[Unit, NDArray[np.int64], UnitRead], None, None]:
        """Read units; closed before its end, it stops the workers for good.

        Yields:
            Each unit in the order of `units`, the places of its patches in the buffer, and how it went.

        Raises:
            RuntimeError: a worker died.
        """
        places: deque[NDArray[np.int64]] = deque()
        early: dict[int, UnitRead] = {}
        sent = came = 0
        try:
            for number, unit in enumerate(units):
                for later in units[sent : number + self._ahead]:
                    places.append(self.buffer.reserve(len(later.patches)))
                    self._pool.ventilate(sent, later, places[-1])
                    sent += 1
                while number not in early:
                    other, early[other] = self._pool.get_results()
                    came += 1
                yield unit, places.popleft(), early.pop(number)
        finally:
            if came < len(units):
                self.close()

    @property
    def is_open(self) -> bool:
        """Whether it can read."""
        return self._stop.alive

    def close(self) -> None:
        """Stop the workers; when it returns, nobody writes to the buffer any more."""
        self._stop()


class _UnitWorker(WorkerBase):  # type: ignore[misc]
    """Reads units, right into the buffer."""

    def process(self, number: int, unit: Unit, places: NDArray[np.int64]) -> None:
        """Publish the unit's number with how it went."""
        storage_options, shared = self.args
        self.publish_func((number, read_unit(unit, storage_options, shared.pixels, places)))


class _Processes(ProcessPool):  # type: ignore[misc]
    """petastorm's, which by itself waits for ever for a worker that died, and listens on TCP, where any user of the machine
    could send it a pickle.
    """

    def __init__(self, n_parallel: int) -> None:
        super().__init__(n_parallel)
        self._folder = tempfile.TemporaryDirectory(prefix="slidelake-")  # of this user alone
        self._numbers = itertools.count()
        self._is_stopping = False

    def start(self, *arguments: Any) -> None:
        """Start the workers, and watch them."""
        super().start(*arguments)
        for worker in self._workers:
            Thread(target=self._watch, args=(worker,), name="slidelake-watch", daemon=True).start()

    def stop(self) -> None:
        """From now on, a worker that ends is as it should be."""
        self._is_stopping = True
        super().stop()

    def join(self) -> None:
        """Wait until all are gone."""
        super().join()
        self._folder.cleanup()

    def _create_local_socket_on_random_port(self, context: Any, socket_type: int) -> tuple[Any, str]:
        socket = context.socket(socket_type)
        socket.linger = 1000  # ms, as petastorm's
        address = f"ipc://{self._folder.name}/{next(self._numbers)}"
        socket.bind(address)
        return socket, address

    def _watch(self, worker: Any) -> None:
        status = worker.wait()
        if self._is_stopping:
            return
        how = f"by signal {-status}" if status < 0 else f"with status {status}"
        died = RuntimeError(
            f"a worker that reads patches ended {how}: its last words are above; killed for memory, lower n_parallel"
        )
        results = self._context.socket(zmq.PUSH)
        results.connect(self._results_receiver.getsockopt_string(zmq.LAST_ENDPOINT))
        results.send_multipart([b"", pickle.dumps(died)])  # what a worker says before it ends by itself
        results.close()


def _stopped(pool: _Processes) -> None:
    with suppress(AttributeError):  # it did not start
        pool.stop()
        pool.join()


@contextmanager
def _same_modules() -> Iterator[None]:
    """Processes started in it find modules where this one does."""
    before = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = os.pathsep.join(sys.path)
    try:
        yield
    finally:
        if before is None:
            del os.environ["PYTHONPATH"]
        else:
            os.environ["PYTHONPATH"] = before
