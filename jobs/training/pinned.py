"""One version of a table patients: its files, and what of its rows is read before any bag is. deltalake, no JVM."""

from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import unquote

import pyarrow as pa
import pyarrow.parquet as pq
from deltalake import DeltaTable
from deltalake.exceptions import DeltaError, TableNotFoundError

from jobs.training.errors import FeedError

_AT_ONCE = 8  # files whose rows are looked at
_SMALL = (  # columns that cost nothing beside the bags; those that a table has not are null
    pa.field("patient_id", pa.string()),
    pa.field("center_id", pa.string()),
    pa.field("label", pa.string()),
    pa.field("split", pa.string()),
    pa.field("n_tiles", pa.int32()),
    pa.field("embedding_dim", pa.int32()),
    pa.field("embedding_dtype", pa.string()),
    pa.field("params_hash", pa.string()),
    pa.field("run_id", pa.string()),
)


@dataclass(frozen=True)
class DataFile:
    """A Parquet file of the table."""

    uri: str
    n_bytes: int


@dataclass(frozen=True)
class RowGroup:
    """A row group of a file."""

    file: int  # index into PinnedTable.files
    index: int  # in the file
    n_rows: int


@dataclass(frozen=True)
class PinnedTable:
    """A version of a table, that does not change whatever is written to it."""

    uri: str
    version: int
    files: list[DataFile]  # by name
    groups: list[RowGroup]  # of the files, in order
    rows: pa.Table  # the small columns of all rows, in order of `groups`
    columns: frozenset[str]  # that all files have


def pin_table(uri: str, version: int | None) -> PinnedTable:
    """A version of a Delta table of patients; the newest where None.

    Raises:
        FeedError: there is no such table or version, or it is of a kind that Parquet readers get wrong.
    """
    table = _opened(uri, version)
    pinned = table.version()
    _check_kind(table, uri)
    actions = pa.table(table.get_add_actions())
    files = sorted(
        (
            DataFile(str(Path(uri) / unquote(path)), size)
            for path, size in zip(actions["path"].to_pylist(), actions["size_bytes"].to_pylist(), strict=True)
        ),
        key=lambda file: file.uri,
    )
    groups: list[RowGroup] = []
    parts: list[pa.Table] = []
    columns: set[str] | None = None
    with ThreadPoolExecutor(_AT_ONCE) as pool:
        looked = pool.map(lambda file: _look(file, uri, pinned), files)
        for number, (sizes, names, rows) in enumerate(looked):
            groups += [RowGroup(number, index, n_rows) for index, n_rows in enumerate(sizes)]
            parts.append(rows)
            columns = names if columns is None else columns & names
    rows = pa.concat_tables(parts) if parts else pa.schema(_SMALL).empty_table()
    return PinnedTable(uri, pinned, files, groups, rows.combine_chunks(), frozenset(columns or ()))


def _opened(uri: str, version: int | None) -> DeltaTable:
    try:
        return DeltaTable(uri, version=version)
    except TableNotFoundError:
        raise FeedError(f"no Delta table at {uri}: run the patients job, or correct the URI") from None
    except DeltaError as error:
        raise FeedError(
            f"{uri} has no version {version} ({' '.join(str(error).split())}): name one that its history still has"
        ) from None


def _check_kind(table: DeltaTable, uri: str) -> None:
    partitions = table.metadata().partition_columns
    if partitions:
        raise FeedError(
            f"{uri} is partitioned by {', '.join(partitions)}, whose values are not in its files: write it without partitions"
        )
    if pa.table(table.deletion_vectors()).num_rows:
        raise FeedError(
            f"{uri} has rows that only deletion vectors delete: run REORG TABLE delta.`{uri}` APPLY (PURGE), then train on "
            "the version that it writes"
        )


def _look(file: DataFile, uri: str, version: int) -> tuple[list[int], set[str], pa.Table]:
    """Rows of each row group of a file, names of its columns, its small columns."""
    try:
        parquet = pq.ParquetFile(file.uri)
    except FileNotFoundError:
        raise FeedError(
            f"version {version} of {uri} is not whole any more, {file.uri} is gone: it was vacuumed; name a newer version"
        ) from None
    with parquet:
        present = set(parquet.schema_arrow.names)
        sizes = [parquet.metadata.row_group(i).num_rows for i in range(parquet.num_row_groups)]
        rows = parquet.read([field.name for field in _SMALL if field.name in present])
    arrays = [
        rows[field.name].cast(field.type) if field.name in present else pa.nulls(len(rows), field.type)
        for field in _SMALL
    ]
    return sizes, present, pa.table(arrays, pa.schema(_SMALL))


def chosen_rows(table: PinnedTable, split: Sequence[str] | None, patients: Sequence[str] | None) -> list[int]:
    """Numbers of the rows of some splits, or of some patients, or all, ascending.

    Raises:
        FeedError: there are none, a patient is twice in the table, or one that is asked for is not in it.
    """
    ids = table.rows["patient_id"].to_pylist()
    where = f"version {table.version} of {table.uri}"
    if len(set(ids)) < len(ids):
        twice = sorted(patient for patient, count in Counter(ids).items() if count > 1)
        raise FeedError(f"{where} has several rows of patients {', '.join(twice[:5])}: a patient must be one row")
    if patients is not None:
        wanted = set(patients)
        missing = sorted(wanted - set(ids))
        if missing:
            raise FeedError(
                f"{where} has no patients {', '.join(missing[:5])} ({len(missing)} of {len(wanted)} asked for)"
            )
        rows = [i for i, patient in enumerate(ids) if patient in wanted]
    elif split is not None:
        if "split" not in table.columns:
            raise FeedError(f"{where} has no column split: run the splits job first")
        splits = table.rows["split"].to_pylist()
        rows = [i for i, name in enumerate(splits) if name in split]
        if not rows:
            there = sorted({str(name) for name in splits})
            raise FeedError(
                f"{where} has no patient of split {', '.join(split)}, it has {', '.join(there)}: run the splits job"
            )
    else:
        rows = list(range(len(ids)))
    if not rows:
        raise FeedError(f"{where} has no patients to feed")
    return rows
