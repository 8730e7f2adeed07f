"""Row groups read by petastorm's worker threads, in the order of the plan.

Made of petastorm's own pool, ventilator and worker. Its Reader would choose the order of the row groups itself, and copy each
bag into pandas, back to Arrow, and out again.
"""

import warnings
from collections.abc import Callable, Generator, Sequence
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from petastorm.arrow_reader_worker import ArrowReaderWorker
from petastorm.cache import CacheBase
from petastorm.etl.dataset_metadata import infer_or_load_unischema, load_row_groups
from petastorm.workers_pool import EmptyResultError
from petastorm.workers_pool.thread_pool import ThreadPool
from petastorm.workers_pool.ventilator import ConcurrentVentilator
from pyarrow.filesystem import LocalFileSystem

from jobs.training.feed.bags import TILE_INDEX, Decoder
from jobs.training.feed.row_groups import Gate, Part, Wanted, decoded
from jobs.training.refusals import FeedError

_BEGUN = 2  # row groups that are handed to threads before one is free
# petastorm 0.12 uses what pyarrow 14 calls deprecated, and warns that it leaves out tile_index
warnings.filterwarnings("ignore", category=FutureWarning, module=rf"petastorm\.|{__name__}$")
warnings.filterwarnings("ignore", r"\[ARROW-1644\]", UserWarning, r"petastorm\.")


def read_by_petastorm(wanted: Sequence[Wanted], decoder: Decoder, gate: Gate, threads: int) -> Generator[Part]:
    """Reads row groups by petastorm."""
    if not wanted:
        return
    files = _MappedFiles(gate)
    paths = [str(path) for path in dict.fromkeys(group.path for group in wanted)]
    dataset = pq.ParquetDataset(paths, filesystem=files, validate_schema=False, metadata_nthreads=10)
    columns = ["patient_id", *(name for name in decoder.columns if name != TILE_INDEX)]
    schema = infer_or_load_unischema(dataset).create_schema_view([f"^{name}$" for name in columns])
    piece_of = {(piece.path, piece.row_group): piece for piece in load_row_groups(dataset)}
    pieces = [piece_of[str(group.path), group.index] for group in wanted]
    bags = _BagsOfRowGroups(wanted, decoder, gate)
    pool = ThreadPool(threads)
    turns = [
        {"piece_index": i, "worker_predicate": None, "shuffle_row_drop_partition": (0, 1)} for i in range(len(wanted))
    ]
    ventilator = ConcurrentVentilator(pool.ventilate, turns, max_ventilation_queue_size=threads + _BEGUN)
    # filesystem, paths, fields, n-gram, pieces, cache, transformation, its fields, filters, whether to shuffle rows, seed
    arguments = (files, paths, schema, None, pieces, bags, None, schema, None, False, None)
    pool.start(ArrowReaderWorker, arguments, ventilator=ventilator)
    try:
        for _ in wanted:
            yield _next_part(pool)
    except EmptyResultError:
        raise FeedError(
            "petastorm ended before its last row group: this is a fault of the feed, please report it"
        ) from None
    except BaseException as error:
        gate.close(error)
        raise
    finally:
        pool.stop()
        pool.join()


def _next_part(pool: ThreadPool) -> Any:
    try:
        return pool.get_results()
    except EmptyResultError:  # petastorm may look between the last row group but one's end and the last one's begin
        return pool.get_results()


class _BagsOfRowGroups(CacheBase):  # type: ignore[misc]
    """What petastorm asks for a row group; in place of a cache's entry it gets the bags of what was read."""

    def __init__(self, wanted: Sequence[Wanted], decoder: Decoder, gate: Gate) -> None:
        self._wanted, self._decoder, self._gate = wanted, decoder, gate

    def get(self, key: str, fill_cache_func: Callable[[], pa.Table]) -> Part | Exception:
        """Returns the bags of a row group, or the error: petastorm would print one that is raised."""
        group = self._wanted[int(key.rpartition(":")[2])]
        try:
            self._gate.wait(group.position)
            table = fill_cache_func()
            if TILE_INDEX in self._decoder.columns:  # a list of structs: petastorm has no type for it
                with pq.ParquetFile(group.path, memory_map=True) as parquet:
                    index = parquet.read_row_group(group.index, columns=[TILE_INDEX], use_threads=False)
                table = table.append_column(TILE_INDEX, index[TILE_INDEX])
            return decoded(table, group, self._decoder)
        except Exception as error:
            self._gate.close(error)
            return error


class _MappedFiles(LocalFileSystem):  # type: ignore[misc]
    """Maps files into memory: through Python's files, each byte would be copied twice, with the interpreter held."""

    def __init__(self, gate: Gate) -> None:
        super().__init__()
        self._gate = gate

    def open(self, path: str, mode: str = "rb") -> Any:
        """Opens a file to read."""
        try:
            return pa.memory_map(path, "r")
        except OSError as error:  # ends the threads that wait, since petastorm joins them before it raises the error
            self._gate.close(error)
            raise
