"""Row groups read and decoded by petastorm's worker threads, in the order of the plan.

Made of petastorm's own reader, pool and worker, each with what it can't do by itself: read chosen row groups in a chosen
order, end when it is told to, and hand on a bag without copying it into pandas, back to Arrow, and out again.
"""

import threading
import warnings
from collections.abc import Generator, Sequence
from queue import Empty, SimpleQueue
from typing import Any

import pyarrow as pa
from petastorm.arrow_reader_worker import ArrowReaderWorker
from petastorm.reader import Reader as PetastormReader
from petastorm.workers_pool import EmptyResultError, VentilatedItemProcessedMessage
from petastorm.workers_pool.thread_pool import ThreadPool, WorkerTerminationRequested
from pyarrow.filesystem import LocalFileSystem

from jobs.training.feed.decoding import TILE_INDEX, Decoder
from jobs.training.feed.row_groups import Closed, Gate, Part, Wanted, decoded, received
from jobs.training.training_errors import FeedError

_POLL_S = 0.05
# petastorm 0.12 reads by what pyarrow 14 calls deprecated, and says of tile_index that it leaves it out
warnings.filterwarnings("ignore", category=FutureWarning, module=rf"petastorm\.|{__name__}$")
warnings.filterwarnings("ignore", r"\[ARROW-1644\]", UserWarning, r"petastorm\.")


def read_by_petastorm(wanted: Sequence[Wanted], decoder: Decoder, gate: Gate, threads: int) -> Generator[Part]:
    """Row groups by petastorm: a new reader each time, of one epoch."""
    if not wanted:
        return
    done: SimpleQueue[Part | BaseException] = SimpleQueue()
    reader = _PlannedReader(wanted, decoder, gate, done, threads)

    def drain() -> None:
        """Take what workers say to petastorm, so that they go on; all parts came before it has no more to say."""
        try:
            for _ in reader:
                pass
            done.put(
                FeedError("petastorm ended before its last row group: this is a fault of the feed, please report it")
            )
        except BaseException as error:
            done.put(error)

    drainer = threading.Thread(target=drain, name="feed", daemon=True)
    drainer.start()
    try:
        yield from received(done, len(wanted))
    except BaseException:
        gate.close()
        raise
    finally:
        reader.stop()
        drainer.join()
        reader.join()


class _PlannedReader(PetastormReader):  # type: ignore[misc]
    def __init__(
        self,
        wanted: Sequence[Wanted],
        decoder: Decoder,
        gate: Gate,
        done: "SimpleQueue[Part | BaseException]",
        threads: int,
    ) -> None:
        self._wanted = {(str(group.path), group.index): group for group in wanted}
        columns = ["patient_id", *(name for name in decoder.columns if name != TILE_INDEX)]

        class Worker(_Worker):
            """Knows what this epoch is about."""

            epoch = (self._wanted, decoder, gate, done)

        super().__init__(
            _Files(),
            [str(path) for path in dict.fromkeys(group.path for group in wanted)],
            schema_fields=[f"^{name}$" for name in columns],
            shuffle_row_groups=False,
            reader_pool=_Pool(threads),
            num_epochs=1,
            worker_class=Worker,
            is_batched_reader=True,
        )

    def _filter_row_groups(self, dataset: Any, row_groups: Sequence[Any], *rest: Any) -> tuple[list[int], None]:
        """Which row groups are read, in which order."""
        number = {(piece.path, piece.row_group): i for i, piece in enumerate(row_groups)}
        return [number[group] for group in self._wanted], None


class _Worker(ArrowReaderWorker):  # type: ignore[misc]
    """Decodes the rows that it read as they are in Arrow."""

    epoch: tuple[dict[tuple[str, int], Wanted], Decoder, Gate, "SimpleQueue[Part | BaseException]"]

    def _load_rows(self, pq_file: Any, piece: Any, shuffle_row_drop_range: Any) -> list[Any]:
        wanted, decoder, gate, done = self.epoch
        table = super()._load_rows(pq_file, piece, shuffle_row_drop_range)
        group = wanted[piece.path, piece.row_group]
        if TILE_INDEX in decoder.columns:  # a list of structs: petastorm has no type for it
            index = pq_file.read_row_group(piece.row_group, columns=[TILE_INDEX], use_threads=False)
            table = table.append_column(TILE_INDEX, index[TILE_INDEX])
        try:
            part = decoded(table, group, decoder)
        except Exception as error:  # by our queue: petastorm would print it before it is raised
            done.put(error)
            return []
        if not gate.wait(group.position):
            done.put(Closed())
            raise WorkerTerminationRequested
        done.put(part)
        return []  # to petastorm, a row group without a row


class _Files(LocalFileSystem):  # type: ignore[misc]
    """Maps files into memory: by Python's files each byte would be copied twice, with the interpreter held."""

    def open(self, path: str, mode: str = "rb") -> Any:
        """For reading."""
        return pa.memory_map(path, "r")


class _Pool(ThreadPool):  # type: ignore[misc]
    """Ends when it is stopped, and not before its last row group: petastorm's own asks whether all that was begun is done
    before it asks whether all was begun, and between the two the last may be.
    """

    def get_results(self) -> Any:
        while not self._stop_event.is_set():
            all_begun = self._ventilator.completed()
            if all_begun and self._results_queue.empty() and self._ventilated_items == self._ventilated_items_processed:
                break
            try:
                result = self._results_queue.get(timeout=_POLL_S)
            except Empty:
                continue
            if isinstance(result, Exception):
                raise result
            if isinstance(result, VentilatedItemProcessedMessage):
                self._ventilated_items_processed += 1
                self._ventilator.processed_item()
            else:
                return result
        raise EmptyResultError
