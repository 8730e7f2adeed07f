"""What reads the row groups of an epoch: the order that is asked for, how far ahead of the trainer, and the plain pyarrow
reader. petastorm's is beside it.
"""

import threading
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from queue import SimpleQueue
from typing import Any, Protocol

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from jobs.training.feed.bags import Bag
from jobs.training.feed.decoding import HISTOGRAM, TILE_INDEX, Decoder, tile_index
from jobs.training.feed.epochs import Patient
from jobs.training.training_errors import FeedError

# Bags that wait for their turn, at most, unless one row group alone has more.
AHEAD_BYTES = 512 * 2**20
# A bag that is a view keeps its whole row group in memory: not for the sake of few.
_VIEW_SHARE = 0.75
_PETASTORM_FAILS_AT = 15  # pyarrow's major version


@dataclass(frozen=True)
class Wanted:
    """A row group, and those of its patients that are wanted."""

    position: int  # among those of the epoch, in the order that they are read in
    path: Path  # a local file
    index: int  # of the row group in the file
    patients: list[Patient]


Part = dict[str, Bag]
"""The bags of one row group, by patient_id."""


class Closed(Exception):
    """Nothing is wanted any more."""


class Gate:
    """Holds readers back where they are far enough ahead of the trainer."""

    def __init__(self, sizes: Sequence[int]) -> None:
        """Bytes that are fed of each row group, in the order that they are read in."""
        self._ends = np.cumsum(sizes)
        self._needed = self._used = 0
        self._is_closed = False
        self._changed = threading.Condition()

    def need(self, position: int) -> None:
        """The trainer waits for this row group."""
        with self._changed:
            self._needed = max(self._needed, position)
            self._changed.notify_all()

    def use(self, n_bytes: int) -> None:
        """The trainer got so many bytes, which wait no more."""
        with self._changed:
            self._used += n_bytes
            self._changed.notify_all()

    def wait(self, position: int) -> bool:
        """Wait until a row group may be read; false where it is wanted no more."""
        with self._changed:
            self._changed.wait_for(
                lambda: self._is_closed or position <= self._needed or self._ends[position] - self._used <= AHEAD_BYTES
            )
            return not self._is_closed

    def close(self) -> None:
        """Nothing is wanted any more."""
        with self._changed:
            self._is_closed = True
            self._changed.notify_all()


class Reader(Protocol):
    """Reads row groups in threads."""

    def __call__(self, wanted: Sequence[Wanted], decoder: Decoder, gate: Gate, threads: int) -> Generator[Part]:
        """A part for each row group, in any order; closing it ends the threads. Raises what reading raises."""


def read_by_pyarrow(wanted: Sequence[Wanted], decoder: Decoder, gate: Gate, threads: int) -> Generator[Part]:
    """Row groups by pyarrow alone."""
    done: SimpleQueue[Part | BaseException] = SimpleQueue()
    turns = iter(wanted)
    turn = threading.Lock()

    def work() -> None:
        while True:
            with turn:
                group = next(turns, None)
            if group is None:
                return
            if not gate.wait(group.position):
                done.put(Closed())
                return
            try:
                done.put(_read(group, decoder))
            except BaseException as error:
                done.put(error)
                return

    workers = [threading.Thread(target=work, name="feed", daemon=True) for _ in range(threads)]
    for worker in workers:
        worker.start()
    try:
        yield from received(done, len(wanted))
    except BaseException:
        gate.close()
        raise
    finally:
        for worker in workers:
            worker.join()


def received(done: "SimpleQueue[Part | BaseException]", count: int) -> Iterator[Part]:
    """So many parts as they come; raises the error that came instead of one."""
    for _ in range(count):
        part = done.get()
        if isinstance(part, BaseException):
            raise part
        yield part


def _read(group: Wanted, decoder: Decoder) -> Part:
    with pq.ParquetFile(group.path, memory_map=True) as parquet:
        table = parquet.read_row_group(group.index, columns=["patient_id", *decoder.columns], use_threads=False)
    return decoded(table, group, decoder)


def decoded(table: pa.Table, group: Wanted, decoder: Decoder) -> Part:
    """The bags of the wanted rows of a row group that was read."""
    ids = table["patient_id"]
    view = len(group.patients) >= _VIEW_SHARE * len(table)
    part = {}
    for patient in group.patients:
        row: dict[str, Any] = {name: table[name][patient.row].as_buffer() for name in decoder.embeddings}
        if HISTOGRAM in decoder.columns:
            row[HISTOGRAM] = table[HISTOGRAM][patient.row].values
        if TILE_INDEX in decoder.columns:
            row[TILE_INDEX] = _index_of(table[TILE_INDEX][patient.row].values)
        part[patient.patient_id] = decoder.bag(patient, ids[patient.row].as_py(), row, view=view)
    return part


def _index_of(places: pa.StructArray) -> np.ndarray[Any, Any]:
    """The tile_index of a row."""
    image_id, x_px, y_px = (pc.struct_field(places, name) for name in ("image_id", "x_px", "y_px"))
    return tile_index(image_id.to_pylist(), x_px.to_numpy(), y_px.to_numpy())


def reader_of(backend: str, large: bool) -> tuple[str, Reader]:
    """The reader and its name: petastorm, pyarrow, or for auto petastorm where it can be had, else pyarrow.

    Args:
        backend: which is asked for.
        large: whether files have columns of Arrow's large types.

    Raises:
        FeedError: petastorm is asked for, and can't be had or can't read these files.
    """
    if backend == "pyarrow":
        return backend, read_by_pyarrow
    missing = None
    if find_spec("petastorm") is None:
        missing = "petastorm is not installed: install the extra train"
    elif int(pa.__version__.partition(".")[0]) >= _PETASTORM_FAILS_AT:
        missing = f"petastorm needs pyarrow < {_PETASTORM_FAILS_AT}, this is {pa.__version__}: install an older one"
    elif large:
        missing = (
            "petastorm knows no large strings, bytes or lists, which files of this table have: let Spark write it anew"
        )
    if missing and backend == "petastorm":
        raise FeedError(f"{missing}, or take backend pyarrow")
    if missing:
        return "pyarrow", read_by_pyarrow
    from jobs.training.feed.petastorm_rows import read_by_petastorm  # noqa: PLC0415

    return "petastorm", read_by_petastorm
