"""The row groups of an epoch, read from where they lie: at once from a local disk, else file after file as copies come."""

import threading
from collections.abc import Generator, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from queue import SimpleQueue

from jobs.training.feed.decoding import Decoder
from jobs.training.feed.epochs import Patient, Turn
from jobs.training.feed.row_groups import Gate, Part, Reader, Wanted, received
from jobs.training.tables.pinned import PinnedTable

# Of remote files that are read together; as many come meanwhile.
_TOGETHER_BYTES = 2**30

Groups = Mapping[int, Sequence[Patient]]
"""Those wanted of each row group, by its number among the table's, in the order of reading."""


def groups_of(steps: Sequence[Sequence[Turn]]) -> dict[int, list[Patient]]:
    """What some steps want, in the order that they need it."""
    groups: dict[int, dict[str, Patient]] = {}
    for step in steps:
        for turn in step:
            groups.setdefault(turn.patient.group, {})[turn.patient.patient_id] = turn.patient
    return {number: list(patients.values()) for number, patients in groups.items()}


def delivered(
    table: PinnedTable, groups: Groups, decoder: Decoder, gate: Gate, reader: Reader, threads: int
) -> Generator[Part]:
    """A part for each row group, in any order. Closing it ends all that it began.

    Raises:
        FileNotFoundError: a file is gone.
        FeedError: as `TableStore.local` and `Decoder.bag`.
    """
    if table.store.is_local:
        [(wanted, stack)] = _segments(table, [list(groups)], groups)
        with stack:
            yield from reader(wanted, decoder, gate, threads)
        return
    done: SimpleQueue[Part | BaseException] = SimpleQueue()

    def work() -> None:
        try:
            for wanted, stack in _segments(table, _cut(table, list(groups)), groups):
                with stack:
                    for part in reader(wanted, decoder, gate, threads):
                        done.put(part)
        except BaseException as error:
            done.put(error)

    worker = threading.Thread(target=work, name="feed", daemon=True)
    worker.start()
    try:
        yield from received(done, len(groups))
    finally:
        gate.close()
        worker.join()


def _cut(table: PinnedTable, numbers: Sequence[int]) -> list[list[int]]:
    """Runs of row groups whose files have `_TOGETHER_BYTES`, or one file if that has more."""
    cut: list[list[int]] = []
    files: set[int] = set()
    for number in numbers:
        file = table.groups[number].file
        size = sum(table.files[i].n_bytes for i in files | {file})
        if not cut or (file not in files and size > _TOGETHER_BYTES):
            cut.append([])
            files = set()
        cut[-1].append(number)
        files.add(file)
    return cut


def _segments(
    table: PinnedTable, cut: Sequence[Sequence[int]], groups: Groups
) -> Iterator[tuple[list[Wanted], ExitStack]]:
    """What to read of each run, and what keeps its files there; those of the next come meanwhile."""
    place = {number: i for i, number in enumerate(groups)}

    def hold(numbers: Sequence[int]) -> tuple[list[Wanted], ExitStack]:
        files = list(dict.fromkeys(table.groups[number].file for number in numbers))
        with ExitStack() as stack:
            paths = stack.enter_context(table.store.local([table.files[file] for file in files]))
            path_of = dict(zip(files, paths, strict=True))
            return [
                _wanted(table, number, place[number], path_of, groups[number]) for number in numbers
            ], stack.pop_all()
        raise AssertionError

    with ThreadPoolExecutor(1) as pool:
        ahead: Future[tuple[list[Wanted], ExitStack]] | None = None
        try:
            for i in range(len(cut)):
                held = (ahead or pool.submit(hold, cut[i])).result()
                ahead = pool.submit(hold, cut[i + 1]) if i + 1 < len(cut) else None
                yield held
        finally:
            if ahead and not ahead.cancel() and not ahead.exception():
                ahead.result()[1].close()


def _wanted(
    table: PinnedTable, number: int, place: int, path_of: Mapping[int, Path], patients: Sequence[Patient]
) -> Wanted:
    group = table.groups[number]
    return Wanted(place, path_of[group.file], group.index, list(patients))
