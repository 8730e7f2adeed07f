"""One version of a Delta table, read by deltalake without a JVM: a table patients to be fed, or some columns of any table."""

from collections import Counter
from collections.abc import Callable, Collection, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from typing import TypeVar
from urllib.parse import unquote

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from deltalake import DeltaTable
from deltalake.exceptions import DeltaError, TableNotFoundError

from jobs.training.refusals import FeedError, NoTableError
from jobs.training.table_stores import DataFile, TableStore
from udfs.wording import some
from udfs.wsi.store import StorageOptions, public_uri

_AT_ONCE = 8  # files whose rows are read
_SMALL = pa.schema(  # columns that cost nothing beside the bags; those that a table lacks are null
    [(name, pa.string()) for name in ("patient_id", "encoder", "center_id", "label", "split")]
    + [(name, pa.int32()) for name in ("n_tiles", "embedding_dim")]
    + [(name, pa.string()) for name in ("embedding_dtype", "params_hash", "run_id")]
)
_LARGE = (pa.large_string(), pa.large_binary())
Found = TypeVar("Found")


@dataclass(frozen=True)
class RowGroup:
    """A row group of a file."""

    file: int  # index into PinnedTable.files
    index: int  # in the file
    n_rows: int


@dataclass(frozen=True)
class PinnedTable:
    """A version of a table patients, which does not change whatever is written to the table."""

    store: TableStore
    version: int
    files: list[DataFile]  # by name
    groups: list[RowGroup]  # of the files, in order
    rows: pa.Table  # the small columns of all rows, in order of `groups`
    columns: frozenset[str]  # that all files have
    large: frozenset[str]  # columns that some file has as large strings, bytes or lists

    @property
    def uri(self) -> str:
        """The table's URI without secrets."""
        return self.store.uri

    @property
    def name(self) -> str:
        """The version and its table, for messages."""
        return f"version {self.version} of {self.uri}"

    def encoder_of_bags(self, wanted: str | None) -> str:
        """Returns the encoder whose bags are taken: the wanted one; if None, the only one.

        Raises:
            FeedError: there are no bags of this encoder, or bags of several and none is wanted.
        """
        if "encoder" not in self.columns and self.files:
            raise FeedError(
                f"{self.name} has no column encoder, so an older version of slidelake made it: make it anew"
            )
        existing = sorted(set(self.rows["encoder"].to_pylist()))
        if not existing:
            raise FeedError(f"{self.name} has no patients to feed: run the patients job")
        if wanted is None and len(existing) > 1:
            raise FeedError(
                f"{self.name} has bags of {len(existing)} encoders, {some(existing)}: choose one by encoder (job train: "
                "training.encoder)"
            )
        if wanted is not None and wanted not in existing:
            raise FeedError(
                f"{self.name} has no bags of encoder {wanted}, but of {some(existing)}: choose one of these (job train: "
                "training.encoder), or run the main job with that encoder"
            )
        return wanted or existing[0]


def pin_table(uri: str, version: int | None, storage_options: StorageOptions | None = None) -> PinnedTable:
    """Returns a version of a table patients; the newest if None.

    Raises:
        FeedError: the table or the version does not exist, or Parquet readers would misread its files.
    """

    def look(parquet: pq.ParquetFile) -> tuple[list[int], pa.Schema, pa.Table]:
        sizes = [parquet.metadata.row_group(i).num_rows for i in range(parquet.num_row_groups)]
        return sizes, parquet.schema_arrow, _read(parquet, _SMALL)

    store, number, files, _ = _opened(uri, version, storage_options)
    looks = _each(store, number, files, "patient_id", look)
    groups = [RowGroup(i, j, n_rows) for i, (sizes, _, _) in enumerate(looks) for j, n_rows in enumerate(sizes)]
    fields = [field for _, schema, _ in looks for field in schema]
    large = frozenset(field.name for field in fields if field.type in _LARGE or pa.types.is_large_list(field.type))
    in_files = Counter(field.name for field in fields)
    columns = frozenset(name for name, count in in_files.items() if count == len(files))
    rows = pa.concat_tables([_SMALL.empty_table(), *(rows for _, _, rows in looks)]).combine_chunks()
    return PinnedTable(store, number, files, groups, rows, columns, large)


def read_columns(
    uri: str,
    columns: Sequence[str],
    version: int | None = None,
    storage_options: StorageOptions | None = None,
    only: tuple[str, Collection[str]] | None = None,
) -> tuple[int, pa.Table]:
    """Returns the number of a version, None: the newest; and its rows.

    `only`: a column of strings, and its values in the rows that are returned; None: all rows.

    Raises:
        NoTableError: there is no such table.
        FeedError: the version or the store cannot be read, or the files have deleted rows.
        KeyError: the version has no such column.
    """
    store, number, files, schema = _opened(uri, version, storage_options)
    names = dict.fromkeys([*columns, *([only[0]] if only else [])])
    fields = pa.schema([schema.field(name) for name in names])

    def read(parquet: pq.ParquetFile) -> pa.Table:
        rows = _read(parquet, fields)
        if only:
            column, values = only
            rows = rows.filter(pc.is_in(rows[column], pa.array(values, fields.field(column).type)))
        return rows

    rows = pa.concat_tables([fields.empty_table(), *_each(store, number, files, columns[0], read)])
    return number, rows.select(columns)


def _opened(
    uri: str, version: int | None, storage_options: StorageOptions | None
) -> tuple[TableStore, int, list[DataFile], pa.Schema]:
    """Returns the store, the number of the version, its files by name, and its columns."""
    store = TableStore(uri, storage_options)
    with store.log(version) as folder:
        table = _delta_table(folder, version, store.uri)
        _check_kind(table, store.uri)
        actions = pa.table(table.get_add_actions()).select(["path", "size_bytes"]).to_pylist()
        files = [store.file(unquote(action["path"]), action["size_bytes"]) for action in actions]
        return store, table.version(), sorted(files, key=lambda file: file.uri), pa.schema(table.schema().to_arrow())


def _each(
    store: TableStore, version: int, files: Sequence[DataFile], column: str, read: Callable[[pq.ParquetFile], Found]
) -> list[Found]:
    """Returns what is read of the footers and small columns of some files. `column`: of the table, for the remedy."""

    def of_file(file: DataFile) -> Found:
        with store.looked_at(file) as source:
            try:
                parquet = pq.ParquetFile(source)
            except pa.ArrowInvalid as error:
                raise FeedError(
                    f"pyarrow {pa.__version__} cannot read {public_uri(file.uri)} ({error}): where update, merge or delete of "
                    "deltalake, or polars, wrote it, its types are newer: let Spark write the table anew, or deltalake, "
                    f'DeltaTable("{store.uri}").optimize.z_order(["{column}"]), and take the version that it writes'
                ) from None
            with parquet:
                return read(parquet)

    with ThreadPoolExecutor(_AT_ONCE) as pool:
        try:
            return list(pool.map(of_file, files))
        except FileNotFoundError as error:
            raise version_lost(version, store.uri, error) from None


def _read(parquet: pq.ParquetFile, fields: pa.Schema) -> pa.Table:
    """Returns some columns of a file; null if the file is older than the column."""
    rows = parquet.read([name for name in fields.names if name in parquet.schema_arrow.names])
    for field in fields:
        if field.name not in rows.column_names:
            rows = rows.append_column(field, pa.nulls(len(rows), field.type))
    return rows.select(fields.names).cast(fields)


def version_lost(version: int, uri: str, error: FileNotFoundError) -> FeedError:
    """Returns the error for a version that has lost a file."""
    return FeedError(
        f"version {version} of {uri} is not whole any more, {error.filename or error} is gone: it was vacuumed; train on a "
        "newer version, and keep those that you train on with delta.deletedFileRetentionDuration"
    )


def _delta_table(folder: str, version: int | None, uri: str) -> DeltaTable:
    """Returns a version of the table whose log lies in a local folder; the newest if None."""
    try:
        return DeltaTable(folder, version=version)
    except TableNotFoundError:
        raise NoTableError(f"no Delta table at {uri}: run the patients job, or correct the URI") from None
    except (DeltaError, OverflowError) as error:  # the latter for a version below 0
        existing = []
        if version is not None:
            with suppress(DeltaError):  # the log cannot be read
                existing = [commit["version"] for commit in DeltaTable(folder).history()]
        if existing and version not in existing:
            raise FeedError(
                f"{uri} has no version {version}, it has versions {min(existing)} to {max(existing)}: name one of them, or none "
                "for the newest"
            ) from None
        which = uri if version is None else f"version {version} of {uri}"
        text = " ".join(str(error).split())
        raise FeedError(f"{which} cannot be opened ({text}): its log is damaged, restore it from a copy") from None
    except BaseException as error:  # deltalake does not export the class of its panics
        if type(error).__name__ != "PanicException" or "orked process" not in str(error):
            raise
        raise FeedError(
            f"{uri} cannot be opened in a process that was forked from one that opened a table: make the feed before the "
            'DataLoader, or give the DataLoader multiprocessing_context="spawn"'
        ) from None


def _check_kind(table: DeltaTable, uri: str) -> None:
    """Raises FeedError unless the files hold exactly the rows of the table, by the names of its columns."""
    metadata, protocol = table.metadata(), table.protocol()
    if metadata.partition_columns:
        raise FeedError(
            f"{uri} is partitioned by {', '.join(metadata.partition_columns)}, which its files do not hold: write it without "
            "partitions"
        )
    if metadata.configuration.get("delta.columnMapping.mode", "none") != "none":
        raise FeedError(f"{uri} has column mapping, its files name columns otherwise: write it anew without")
    if "deletionVectors" not in (protocol.reader_features or ()):
        return
    try:
        has_deletions = pa.table(table.deletion_vectors()).num_rows > 0
    except (DeltaError, OSError):  # they lie in files of their own, which a copy of the log lacks
        has_deletions = True
    if has_deletions:
        raise FeedError(
            f"{uri} has deletion vectors, rows that are deleted and still in its files: run REORG TABLE delta.`{uri}` APPLY "
            "(PURGE), then train on the version that it writes"
        )
