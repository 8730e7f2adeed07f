"""One version of a table patients: its files, and what of its rows is known before any bag is read. deltalake, no JVM."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from urllib.parse import unquote

import pyarrow as pa
import pyarrow.parquet as pq
from deltalake import DeltaTable
from deltalake.exceptions import DeltaError, TableNotFoundError

from jobs.training.refusals import FeedError, NoTableError
from jobs.training.tables.stores import DataFile, TableStore
from udfs.wsi.store import StorageOptions, public_uri

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
_LARGE = (pa.large_string(), pa.large_binary())


@dataclass(frozen=True)
class RowGroup:
    """A row group of a file."""

    file: int  # index into PinnedTable.files
    index: int  # in the file
    n_rows: int


@dataclass(frozen=True)
class PinnedTable:
    """A version of a table, that does not change whatever is written to it."""

    store: TableStore
    version: int
    files: list[DataFile]  # by name
    groups: list[RowGroup]  # of the files, in order
    rows: pa.Table  # the small columns of all rows, in order of `groups`
    columns: frozenset[str]  # that all files have
    large: frozenset[str]  # columns that some file has as large strings, bytes or lists

    @property
    def uri(self) -> str:
        """Of the table, without secrets."""
        return self.store.uri

    @property
    def name(self) -> str:
        """For messages."""
        return f"version {self.version} of {self.uri}"


def pin_table(uri: str, version: int | None, storage_options: StorageOptions | None = None) -> PinnedTable:
    """A version of a Delta table of patients; the newest where None.

    Raises:
        FeedError: there is no such table or version, or it is of a kind that Parquet readers get wrong.
    """
    store = TableStore(uri, storage_options)
    with store.log(version) as folder:
        table = open_version(folder, version, store.uri)
        pinned = table.version()
        check_kind(table, store.uri)
        actions = pa.table(table.get_add_actions())
    names = (unquote(path) for path in actions["path"].to_pylist())
    files = [store.file(name, size) for name, size in zip(names, actions["size_bytes"].to_pylist(), strict=True)]
    files.sort(key=lambda file: file.uri)
    groups: list[RowGroup] = []
    parts: list[pa.Table] = []
    columns: set[str] | None = None
    large: set[str] = set()
    with ThreadPoolExecutor(_AT_ONCE) as pool:
        try:
            for number, (sizes, schema, rows) in enumerate(pool.map(lambda file: _look(store, file), files)):
                groups += [RowGroup(number, index, n_rows) for index, n_rows in enumerate(sizes)]
                parts.append(rows)
                columns = set(schema.names) if columns is None else columns & set(schema.names)
                large |= {field.name for field in schema if field.type in _LARGE or pa.types.is_large_list(field.type)}
        except FileNotFoundError as error:
            raise gone(pinned, store.uri, error) from None
    rows = pa.concat_tables(parts) if parts else pa.schema(_SMALL).empty_table()
    return PinnedTable(store, pinned, files, groups, rows.combine_chunks(), frozenset(columns or ()), frozenset(large))


def gone(version: int, uri: str, error: FileNotFoundError) -> FeedError:
    """A file of the version is not there any more."""
    return FeedError(
        f"version {version} of {uri} is not whole any more, {error.filename or error} is gone: it was vacuumed; train on a "
        "newer version, and keep those that you train on with delta.deletedFileRetentionDuration"
    )


def open_version(folder: str, version: int | None, uri: str) -> DeltaTable:
    """A version of the table whose log lies in a local folder; the newest where None.

    Raises:
        NoTableError: there is no table.
        FeedError: it has no such version, its log can't be read, or this process was forked from one that opened a table.
    """
    try:
        return DeltaTable(folder, version=version)
    except TableNotFoundError:
        raise NoTableError(f"no Delta table at {uri}: run the patients job, or correct the URI") from None
    except (DeltaError, OverflowError) as error:  # the latter for a version below 0
        there = [] if version is None else _versions(folder)
        if there and version not in there:
            has = f"it has versions {min(there)} to {max(there)}"
            raise FeedError(
                f"{uri} has no version {version}, {has}: name one of them, or none for the newest"
            ) from None
        which = uri if version is None else f"version {version} of {uri}"
        text = " ".join(str(error).split())
        raise FeedError(f"{which} can't be opened ({text}): its log is damaged, restore it from a copy") from None
    except BaseException as error:
        if type(error).__name__ != "PanicException" or "orked process" not in str(
            error
        ):  # of deltalake, which has no name
            raise
        raise FeedError(
            f"{uri} can't be opened in a process that was forked from one that opened a table: make the feed before the "
            'DataLoader, or give the DataLoader multiprocessing_context="spawn"'
        ) from None


def _versions(folder: str) -> list[int]:
    """Those whose commit is in the log; none where it can't be read."""
    try:
        return [commit["version"] for commit in DeltaTable(folder).history()]
    except DeltaError:
        return []


def check_kind(table: DeltaTable, uri: str) -> None:
    """Raises FeedError for a table whose files do not hold just its rows, by its columns' names."""
    metadata, protocol = table.metadata(), table.protocol()
    if metadata.partition_columns:
        raise FeedError(
            f"{uri} is partitioned by {', '.join(metadata.partition_columns)}, which its files do not hold: write it without "
            "partitions"
        )
    if metadata.configuration.get("delta.columnMapping.mode", "none") != "none":
        raise FeedError(f"{uri} has column mapping, its files name columns otherwise: write it anew without")
    if "deletionVectors" in (protocol.reader_features or ()) and _has_deletions(table):
        raise FeedError(
            f"{uri} has deletion vectors, rows that are deleted and still in its files: run REORG TABLE delta.`{uri}` APPLY "
            "(PURGE), then train on the version that it writes"
        )


def _has_deletions(table: DeltaTable) -> bool:
    try:
        return bool(pa.table(table.deletion_vectors()).num_rows)
    except (DeltaError, OSError):  # they lie in files of their own, which a copy of the log has not
        return True


@contextmanager
def opened_parquet(store: TableStore, file: DataFile, column: str) -> Iterator[pq.ParquetFile]:
    """A file of a table, for its footer and some small columns. `column`: one that the table has, for the remedy.

    Raises:
        FeedError: pyarrow can't read it.
        FileNotFoundError: it is gone.
    """
    with store.looked_at(file) as source:
        try:
            parquet = pq.ParquetFile(source)
        except pa.ArrowInvalid as error:
            raise FeedError(
                f"pyarrow {pa.__version__} can't read {public_uri(file.uri)} ({error}): where update, merge or delete of "
                "deltalake, or polars, wrote it, its types are newer: let Spark write the table anew, or deltalake, "
                f'DeltaTable("{store.uri}").optimize.z_order(["{column}"]), and take the version that it writes'
            ) from None
        with parquet:
            yield parquet


def _look(store: TableStore, file: DataFile) -> tuple[list[int], pa.Schema, pa.Table]:
    """Rows of each row group of a file, its columns, and of its rows the small columns."""
    with opened_parquet(store, file, "patient_id") as parquet:
        schema = parquet.schema_arrow
        sizes = [parquet.metadata.row_group(i).num_rows for i in range(parquet.num_row_groups)]
        rows = parquet.read([field.name for field in _SMALL if field.name in schema.names])
    arrays = [
        rows[field.name].cast(field.type) if field.name in schema.names else pa.nulls(len(rows), field.type)
        for field in _SMALL
    ]
    return sizes, schema, pa.table(arrays, pa.schema(_SMALL))
