"""The row groups of an epoch: how far readers may be ahead of the trainer, and the reader that needs pyarrow alone."""

import threading
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from multiprocessing.pool import ThreadPool
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from jobs.training.feed.bags import HISTOGRAM, TILE_INDEX, Bag, Decoder, tile_index
from jobs.training.feed.epochs import FedPatient

# Bags that wait for their turn, at most, unless a single row group has more.
AHEAD_BYTES = 512 * 2**20
# A bag that is a view keeps its whole row group in memory, so the fed patients must be most of it.
_VIEW_SHARE = 0.75


@dataclass(frozen=True)
class Wanted:
    """A row group and its patients that are fed."""

    position: int  # among the epoch's row groups, in the order of reading
    path: Path  # a local file
    index: int  # of the row group in the file
    patients: list[FedPatient]


Part = dict[str, Bag]
"""The bags of one row group, by patient_id."""


class Closed(Exception):
    """The trainer left the epoch."""


class Gate:
    """Holds readers back while they are far enough ahead of the trainer."""

    def __init__(self, sizes: Sequence[int]) -> None:
        """`sizes`: fed bytes of each row group, in the order of reading."""
        self._ends = np.cumsum(sizes)
        self._needed = self._used = 0
        self._error: BaseException | None = None
        self._changed = threading.Condition()

    def need(self, position: int) -> None:
        """Notes that the trainer waits for this row group."""
        with self._changed:
            self._needed = max(self._needed, position)
            self._changed.notify_all()

    def use(self, n_bytes: int) -> None:
        """Notes that the trainer took this many bytes."""
        with self._changed:
            self._used += n_bytes
            self._changed.notify_all()

    def wait(self, position: int) -> None:
        """Waits until a row group may be read. Raises what the gate was closed by."""
        with self._changed:
            self._changed.wait_for(
                lambda: self._error or position <= self._needed or self._ends[position] - self._used <= AHEAD_BYTES
            )
            if self._error:
                raise self._error

    def close(self, error: BaseException | None = None) -> None:
        """Ends all waiting by the first error, or by Closed."""
        with self._changed:
            self._error = self._error or error or Closed()
            self._changed.notify_all()


RowGroupReader = Callable[[Sequence[Wanted], Decoder, Gate, int], Generator[Part]]
"""Reads row groups in a number of threads: yields one part per row group, in any order. Closing it ends the threads."""


def read_by_pyarrow(wanted: Sequence[Wanted], decoder: Decoder, gate: Gate, threads: int) -> Generator[Part]:
    """Reads row groups by pyarrow alone."""

    def read(group: Wanted) -> Part:
        gate.wait(group.position)
        with pq.ParquetFile(group.path, memory_map=True) as parquet:
            table = parquet.read_row_group(group.index, columns=["patient_id", *decoder.columns], use_threads=False)
        return decoded(table, group, decoder)

    pool = ThreadPool(threads)
    try:
        yield from pool.imap_unordered(read, wanted)
    except BaseException:
        gate.close()
        raise
    finally:
        pool.close()
        pool.join()


def decoded(table: pa.Table, group: Wanted, decoder: Decoder) -> Part:
    """Returns the bags of the wanted rows of a row group."""
    ids = table["patient_id"]
    view = len(group.patients) >= _VIEW_SHARE * len(table)
    part = {}
    for patient in group.patients:
        row: dict[str, Any] = {name: table[name][patient.row].as_buffer() for name in decoder.embeddings}
        if HISTOGRAM in decoder.columns:
            row[HISTOGRAM] = table[HISTOGRAM][patient.row].values
        if TILE_INDEX in decoder.columns:
            places = table[TILE_INDEX][patient.row].values
            image_id, x_px, y_px = (pc.struct_field(places, name) for name in ("image_id", "x_px", "y_px"))
            row[TILE_INDEX] = tile_index(image_id.to_pylist(), x_px.to_numpy(), y_px.to_numpy())
        part[patient.patient_id] = decoder.bag(patient, ids[patient.row].as_py(), row, view=view)
    return part
