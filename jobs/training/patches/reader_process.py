"""A process that reads units into memory shared with the trainer. Here is the trainer's end of it, and what it runs.

    python -m jobs.training.patches.reader_process CONNECTION MEMORY

It ends by itself when the trainer does, whatever ends that.
"""

import os
import subprocess
import sys
from contextlib import suppress
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from threading import Lock

import numpy as np
from numpy.typing import NDArray

from jobs.training.patches.buffer import PixelBuffer, mapped
from jobs.training.patches.patch_units import Unit
from jobs.training.patches.unit_pixels import UnitRead, read_unit
from udfs.wsi.store import StorageOptions

_LAST_WORDS_S = 10.0  # from the end of its connection to that of a process


class Reader:
    """The trainer's end. One thread reads by it at a time; any may close it."""

    def __init__(self, storage_options: StorageOptions | None, buffer: PixelBuffer) -> None:
        """Start nothing yet: who first reads does, and who finds that the process has ended since."""
        self._options, self._buffer, self._home = storage_options, buffer, os.getpid()
        self._process: subprocess.Popen[bytes] | None = None
        self._lock, self._is_open = Lock(), False

    def open(self) -> None:
        """From now on it may read."""
        self._is_open = True

    def read(self, unit: Unit, places: NDArray[np.int64]) -> UnitRead:
        """As `read_unit`, in the process, into the buffer.

        Raises:
            RuntimeError: the process died on it, or was closed.
        """
        with self._lock:
            if not self._is_open:
                raise RuntimeError("closed")
            if self._process is None or self._process.poll() is not None:
                self._start()
        try:
            self._connection.send((unit, places))
            read: UnitRead = self._connection.recv()
        except (EOFError, OSError):
            raise RuntimeError(
                f"a process that reads patches ended {self._how()} at a unit of {unit.image_id}: what it said is above; where it "
                "was killed for memory (signal 9), lower n_parallel"
            ) from None
        return read

    def close(self) -> None:
        """End the process: it writes no more, a thread that waits for it is told, and none starts another.

        In a fork of the trainer, the process is the parent's and stays.
        """
        if self._home != os.getpid():
            return
        with self._lock:
            self._is_open = False
            if self._process:
                self._process.kill()
                self._process.wait()

    def _start(self) -> None:
        self._connection, theirs = Pipe()
        descriptors = theirs.fileno(), self._buffer.descriptor
        self._process = subprocess.Popen(
            # -P: modules are not looked for in the current folder first, where this process does not do so either
            [sys.executable, "-P", "-m", __name__, *map(str, descriptors)],
            env=os.environ | {"PYTHONPATH": os.pathsep.join(map(str, sys.path))},
            stdin=subprocess.DEVNULL,
            pass_fds=descriptors,
            start_new_session=True,  # Ctrl-C is the trainer's affair
        )
        theirs.close()
        self._connection.send((self._options, self._buffer.shape))  # not on the command line: they may hold secrets

    def _how(self) -> str:
        assert self._process
        try:
            status = self._process.wait(_LAST_WORDS_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            return "without a word"
        return f"by signal {-status}" if status < 0 else f"with status {status}"


def main(connection: Connection, memory: int) -> None:
    """Read what comes until nobody is there any more."""
    with suppress(EOFError, BrokenPipeError, ConnectionResetError):
        options, shape = connection.recv()
        pixels = mapped(memory, shape)
        while True:
            unit, places = connection.recv()
            connection.send(read_unit(unit, options, pixels, places))


if __name__ == "__main__":
    main(Connection(int(sys.argv[1])), int(sys.argv[2]))
