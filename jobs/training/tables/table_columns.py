"""Some columns of a table (slides, tiles, splits, runs) at one of its versions, wherever the table lies; no JVM."""

from collections.abc import Collection, Sequence
from urllib.parse import unquote

import pyarrow as pa
import pyarrow.compute as pc

from jobs.training.refusals import FeedError
from jobs.training.tables.pinned import check_kind, open_version, opened_parquet
from jobs.training.tables.stores import TableStore
from udfs.wsi.store import StorageOptions


def read_columns(
    uri: str,
    columns: Sequence[str],
    version: int | None = None,
    storage_options: StorageOptions | None = None,
    only: tuple[str, Collection[str]] | None = None,
) -> tuple[int, pa.Table]:
    """The rows of a version, None: the newest; and which it is.

    `only`: a column of strings, and the values of it whose rows are wanted; None: all rows.

    Raises:
        NoTableError: there is no such table.
        FeedError: the version can't be read any more, or the store can't; or it has deleted rows that are still in its files.
        KeyError: the version has no such column.
    """
    store = TableStore(uri, storage_options)
    with store.log(version) as folder:
        table = open_version(folder, version, store.uri)
        check_kind(table, store.uri)
        found = table.version()
        actions = pa.table(table.get_add_actions()).select(["path", "size_bytes"]).to_pylist()
        schema = pa.schema(table.schema().to_arrow())
    fields = pa.schema([schema.field(name) for name in columns])
    read = pa.schema([*fields, schema.field(only[0])]) if only and only[0] not in columns else fields
    parts = [fields.empty_table()]
    for action in sorted(actions, key=lambda action: str(action["path"])):
        try:
            file = store.file(unquote(action["path"]), action["size_bytes"])
            with opened_parquet(store, file, columns[0]) as parquet:
                part = parquet.read([name for name in read.names if name in parquet.schema_arrow.names])
        except FileNotFoundError:
            raise FeedError(f"version {found} of {store.uri} is not whole any more: it was vacuumed") from None
        # a file that was written before a column came has none of it
        arrays = [
            part[field.name].cast(field.type) if field.name in part.column_names else pa.nulls(len(part), field.type)
            for field in read
        ]
        rows = pa.table(arrays, read)
        if only:
            column, values = only
            rows = rows.filter(pc.is_in(rows[column], pa.array(values, read.field(column).type)))
        parts.append(rows.select(columns))
    return found, pa.concat_tables(parts)
