"""The row groups of an epoch, wherever they lie: which reader reads them, and of remote files, file after file as copies come."""

from collections.abc import Generator, Sequence
from contextlib import ExitStack, closing
from importlib.util import find_spec

import pyarrow as pa

from jobs.training.feed.bags import Decoder
from jobs.training.feed.epochs import FedPatient, Turn
from jobs.training.feed.row_groups import Gate, Part, RowGroupReader, Wanted, read_by_pyarrow
from jobs.training.refusals import FeedError
from jobs.training.table_versions import PinnedTable
from udfs.wsi.prefetch import prefetch

# Remote files that are read together; the next ones are copied meanwhile.
TOGETHER_BYTES = 2**30
PETASTORM_FAILS_AT = 15  # pyarrow's major version

Groups = dict[int, list[FedPatient]]
"""The fed patients of each row group, by its number in the table, in the order of reading."""


def groups_of(steps: Sequence[Sequence[Turn]]) -> Groups:
    """Returns the row groups of some steps, in the order in which the steps need them."""
    groups: dict[int, dict[str, FedPatient]] = {}
    for step in steps:
        for turn in step:
            groups.setdefault(turn.patient.group, {})[turn.patient.patient_id] = turn.patient
    return {number: list(patients.values()) for number, patients in groups.items()}


def delivered(
    table: PinnedTable, groups: Groups, decoder: Decoder, gate: Gate, reader: RowGroupReader, threads: int
) -> Generator[Part]:
    """Yields one part per row group, in any order. Closing it ends everything that it began.

    Raises:
        FileNotFoundError: a file is gone.
        FeedError: as `TableStore.local` and `Decoder.bag`.
    """

    def parts() -> Generator[Part]:
        with closing(prefetch(_segments(table, groups), 1)) as segments:
            for wanted in segments:
                yield from reader(wanted, decoder, gate, threads)

    yield from prefetch(parts(), len(groups) + 1, gate.close)  # the gate says how far ahead


def _segments(table: PinnedTable, groups: Groups) -> Generator[list[Wanted]]:
    """Yields what to read together. The files of a segment stay until the next but one is requested."""
    place = {number: i for i, number in enumerate(groups)}
    before = now = ExitStack()
    try:
        for numbers in [list(groups)] if table.store.is_local else _cut(table, list(groups)):
            before.close()
            before, now = now, ExitStack()
            files = list(dict.fromkeys(table.groups[number].file for number in numbers))
            paths = now.enter_context(table.store.local([table.files[file] for file in files]))
            path_of = dict(zip(files, paths, strict=True))
            wanted = [(number, table.groups[number]) for number in numbers]
            yield [Wanted(place[n], path_of[group.file], group.index, groups[n]) for n, group in wanted]
    finally:
        before.close()
        now.close()


def _cut(table: PinnedTable, numbers: Sequence[int]) -> list[list[int]]:
    """Returns runs of row groups whose files have `TOGETHER_BYTES`, or a single larger file."""
    cut: list[list[int]] = []
    files: set[int] = set()
    for number in numbers:
        file = table.groups[number].file
        size = sum(table.files[i].n_bytes for i in files | {file})
        if not cut or (file not in files and size > TOGETHER_BYTES):
            cut.append([])
            files = set()
        cut[-1].append(number)
        files.add(file)
    return cut


def reader_of(backend: str, large: bool) -> tuple[str, RowGroupReader]:
    """Returns the name of the reader, and the reader; for auto, petastorm if it works here, else pyarrow.

    `large`: whether files have columns of Arrow's large types. Raises FeedError if petastorm is requested, and is not installed
    or cannot read these files.
    """
    missing = None
    if find_spec("petastorm") is None:
        missing = "petastorm is not installed: install the extra train"
    elif int(pa.__version__.partition(".")[0]) >= PETASTORM_FAILS_AT:
        missing = f"petastorm needs pyarrow < {PETASTORM_FAILS_AT}, this is {pa.__version__}: install an older one"
    elif large:
        missing = (
            "petastorm knows no large strings, bytes or lists, which files of this table have: let Spark write it anew"
        )
    if missing and backend == "petastorm":
        raise FeedError(f"{missing}, or take backend pyarrow")
    if missing or backend == "pyarrow":
        return "pyarrow", read_by_pyarrow
    from jobs.training.feed.petastorm_rows import read_by_petastorm  # noqa: PLC0415 - fails with a newer pyarrow

    return "petastorm", read_by_petastorm
