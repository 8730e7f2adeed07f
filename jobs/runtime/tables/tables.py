"""The Delta tables of one output root: how they are opened, made, read and written."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import pyarrow as pa
from pyspark.sql import Column, DataFrame, SparkSession
from pyspark.sql import functions as F
from pyspark.sql.pandas.types import from_arrow_type
from pyspark.sql.types import StructField, StructType

from jobs.runtime.spark.delta_table import DeltaTable
from jobs.runtime.tables.catalog import is_in, literal, refuse_unusable, register, sql_name
from jobs.runtime.tables.layout import READABLE_BY_OTHERS, Log, latest_version, open_log, refuse_unwritable_name
from udfs.schemas import TABLES
from udfs.wsi.store import absolute_uri, public_uri


def spark_schema(schema: pa.Schema) -> StructType:
    """Return an Arrow schema as Spark's, comments included."""

    def column(field_: pa.Field) -> StructField:
        comment = (field_.metadata or {}).get(b"comment", b"").decode()
        kind = from_arrow_type(field_.type, prefer_timestamp_ntz=False)
        return StructField(field_.name, kind, field_.nullable, {"comment": comment} if comment else None)

    return StructType([column(field_) for field_ in schema])


class ConcurrentRunError(Exception):
    """Another run writes to the same tables."""


@dataclass
class Tables:
    """The tables of one output root. One run writes them at a time: this one stops if it notices another writer.

    The log of a table is opened once: with `open`, or when the table is first needed. From then on this object knows the version
    and the properties, because no other run may write them.
    """

    spark: SparkSession
    root: str
    schema: str | None = None  # of Spark's catalog, in which the tables get names too
    versions_opened: dict[str, int] = field(default_factory=dict)  # of the tables that existed when they were opened
    _logs: dict[str, Log | None] = field(default_factory=dict)  # None: the table does not exist

    def path(self, name: str) -> str:
        """Return the URI of the table."""
        return f"{absolute_uri(self.root).rstrip('/')}/{name}"  # Delta wants no relative path

    def open(self, *names: str) -> None:
        """Open the logs of these tables, and alter nothing.

        Raises:
            ConfigError: a table's folder holds something else, or the table cannot be in the catalog's schema.
            DamagedTableError: a log cannot be read.
        """
        refuse_unwritable_name(self.spark, absolute_uri(self.root))
        if self.schema:
            refuse_unusable(self.spark, self.schema, {name: self.path(name) for name in names})
        for name in names:
            log = open_log(self.spark, name, self.path(name), spark_schema(TABLES[name].schema))
            self._logs[name] = log
            if log:
                self.versions_opened[name] = log.version

    def _log(self, name: str) -> Log | None:
        if name not in self._logs:
            self.open(name)
        return self._logs[name]

    def _existing(self, name: str) -> Log:
        log = self._log(name)
        if log is None:
            raise FileNotFoundError(f"no table {public_uri(self.path(name))}")
        return log

    def exists(self, name: str) -> bool:
        """Return whether the table existed when it was opened, or was made since."""
        return self._log(name) is not None

    def create(self, name: str, properties: Mapping[str, str] | None = None) -> None:
        """Make the table if it does not exist; one of an older version gets the columns and properties that it lacks.

        In the catalog's schema it gets its name, unless it has one.

        Args:
            name: of the table.
            properties: beside those of its layout; those of an existing table are changed.
        """
        table, path, log = TABLES[name], self.path(name), self._log(name)
        schema = spark_schema(table.schema)
        if log:
            new = [f"`{column.name}` {_type(column)}" for column in schema if column.name not in log.columns]
            if new:
                self.spark.sql(f"ALTER TABLE {sql_name('delta', path)} ADD COLUMNS ({', '.join(new)})")
                log.columns.extend(schema.names)
                self._refresh(name)
            wanted = {**table.layout, **log.properties, **(properties or {})}
            for key in [key for key, value in wanted.items() if log.properties.get(key) != value]:
                self.set_property(name, key, wanted[key])
        else:
            properties = READABLE_BY_OTHERS | dict(table.layout) | dict(properties or {})
            builder = DeltaTable.createIfNotExists(self.spark).location(path).addColumns(schema).comment(table.comment)
            for key, value in properties.items():
                builder = builder.property(key, value)
            builder.execute()
            # Version 0, whatever the table has now: so it is noticed if another run made the table meanwhile.
            self._logs[name] = Log(0, schema.names, properties)
        if self.schema and register(self.spark, self.schema, name, path, table.comment):
            self._refresh(name)

    def version(self, name: str) -> int:
        """Return the Delta version of an existing table, as this run opened or wrote it."""
        return self._existing(name).version

    def versions_written(self) -> dict[str, int]:
        """Return the Delta version of each table that was made or changed."""
        now = {name: log.version for name, log in self._logs.items() if log}
        return {name: version for name, version in now.items() if self.versions_opened.get(name) != version}

    def property(self, name: str, key: str) -> str | None:
        """Return a property of the table; None if the property or the table does not exist."""
        log = self._log(name)
        return log.properties.get(key) if log else None

    def set_property(self, name: str, key: str, value: str) -> None:
        """Set a property of the table; a commit without rows."""
        self._check_alone(name)
        table = sql_name("delta", self.path(name))
        self.spark.sql(f"ALTER TABLE {table} SET TBLPROPERTIES ('{key}' = {literal(value)})")
        self._existing(name).properties[key] = value
        self._refresh(name)

    def read(self, name: str) -> DataFrame:
        """Return the rows as they are now, none if the table does not exist; columns that an older version lacks are null."""
        log, schema = self._log(name), spark_schema(TABLES[name].schema)
        if log is None:
            return self.spark.createDataFrame([], schema)
        new = [column for column in schema if column.name not in log.columns]
        rows = self.spark.read.format("delta").load(self.path(name))
        return rows.withColumns({column.name: F.lit(None).cast(column.dataType) for column in new}) if new else rows

    def put(
        self,
        name: str,
        rows: DataFrame,
        key: str,
        written: Iterable[str],
        present: Iterable[str],
        among: tuple[str, str] | None = None,
    ) -> None:
        """Make `rows` the rows of some keys, in one commit; no commit if there are no keys.

        Args:
            name: name of the table.
            rows: the new rows, with at least the table's columns.
            key: the column that says whose rows they are.
            written: every value of it that `rows` may hold.
            present: the values that have rows now, which are removed; a value without new rows may be among them.
            among: another column of the key and its value, which all of `rows` have: rows with other values stay.
        """
        replaced = set(present)
        if keys := {*written, *replaced}:
            where = is_in(key, keys)
            if among:
                where += f" AND {is_in(among[0], [among[1]])}"
            self.replace(name, rows, where if replaced else None)

    def replace(self, name: str, rows: DataFrame, where: str | None) -> None:
        """Make `rows` the rows that meet a condition, which all of them have to meet, in one commit; None: add them."""
        self._check_alone(name)
        self._write(name, rows, where)

    def append(self, name: str, rows: DataFrame, *, shared: bool = False) -> None:
        """Add rows in one commit; to a `shared` table other runs may append, too."""
        if shared:
            self._refresh(name)
        else:
            self._check_alone(name)
        self._write(name, rows, None)

    def upsert(self, name: str, rows: DataFrame, key: str, columns: Iterable[str]) -> None:
        """Change some columns of the rows whose key is in `rows`."""
        self._check_alone(name)
        changes: dict[str, str | Column] = {column: F.col(f"new.{column}") for column in columns}
        table = DeltaTable.forPath(self.spark, self.path(name)).alias("old")
        # The new rows are few and narrow: they are broadcast, so that no row of the table, with its bags, is shuffled.
        table.merge(F.broadcast(rows).alias("new"), f"old.{key} = new.{key}").whenMatchedUpdate(set=changes).execute()
        self._refresh(name)

    def delete(self, name: str, where: str) -> None:
        """Delete the rows that meet a condition of SQL, in one commit."""
        self._check_alone(name)
        DeltaTable.forPath(self.spark, self.path(name)).delete(where)
        self._refresh(name)

    def compact(self, name: str) -> None:
        """Join small files to larger ones, in one commit that changes no row; none if there is nothing to join."""
        self._check_alone(name)
        DeltaTable.forPath(self.spark, self.path(name)).optimize().executeCompaction()
        self._refresh(name)

    def size(self, name: str) -> tuple[int, int]:
        """Return the number of files of the table as it is now, and their bytes."""
        detail = DeltaTable.forPath(self.spark, self.path(name)).detail().select("numFiles", "sizeInBytes").collect()[0]
        return int(detail["numFiles"]), int(detail["sizeInBytes"])

    def _write(self, name: str, rows: DataFrame, where: str | None) -> None:
        log = self._existing(name)
        writer = rows.select(TABLES[name].schema.names).write.format("delta").mode("overwrite" if where else "append")
        # All runs share one transaction id, numbered by the table's version: of two commits to the same version, by a
        # retry or by two runs at once, Delta accepts one.
        writer = writer.option("txnAppId", "slidelake").option("txnVersion", log.version + 1)
        if where:
            writer = writer.option("replaceWhere", where)
        writer.save(self.path(name))
        log.version += 1

    def _refresh(self, name: str) -> None:
        self._existing(name).version = latest_version(self.spark, self.path(name))

    def _check_alone(self, name: str) -> None:
        """Raise ConcurrentRunError unless the version of an existing table is the one that this run knows."""
        log, now = self._existing(name), latest_version(self.spark, self.path(name))
        if log.version != now:
            raise ConcurrentRunError(
                f"table {name} went from version {log.version} to {now} while this run was at work: another run "
                f"writes to {public_uri(self.root)}; let one end, then run again"
            )


def _type(column: StructField) -> str:
    return f"{column.dataType.simpleString()} COMMENT {literal(column.metadata.get('comment', ''))}"
