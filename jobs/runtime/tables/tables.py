"""The Delta tables: where they lie, how they are made, and how rows get into them."""

from collections.abc import Iterable
from dataclasses import dataclass, field

import pyarrow as pa
from pyspark.sql import Column, DataFrame, SparkSession
from pyspark.sql import functions as F
from pyspark.sql.pandas.types import from_arrow_type
from pyspark.sql.types import StructField, StructType

from jobs.runtime.tables.catalog import literal, refuse_unusable, register, sql_name
from jobs.runtime.tables.delta_table import DeltaTable
from jobs.runtime.tables.layout import refuse_others, refuse_unwritable_name
from udfs import schemas
from udfs.wsi.store import absolute_uri, public_uri

SCHEMAS = {
    "slides": schemas.SLIDES,
    "tiles": schemas.TILES,
    "indexes": schemas.INDEXES,
    "features": schemas.FEATURES,
    "patients": schemas.PATIENTS,
    "splits": schemas.SPLITS,
    "predictions": schemas.PREDICTIONS,
    "runs": schemas.RUNS,
}
_COMMENTS = {
    "slides": "A row an image of the CSV: header, um/px, levels, status, error, number of tiles, tissue fraction",
    "tiles": "A row a tile with enough tissue: its place, the level it is read from, its background fraction",
    "indexes": "A row a slide that was read: where its compressed blocks lie, so that workers need no header",
    "features": "A row a tile that was encoded: embeddings and colour histogram",
    "patients": "A row a patient with tiles: bags of embeddings, mean histogram, label, split, completeness",
    "splits": "A row a patient that was dealt: split, fold, number of images, seed",
    "predictions": "A row a patient and a model: probability by class, attention of each tile",
    "runs": "A row a run: settings (secrets masked), versions, Delta versions read and written, counts, seconds",
}
_PROPERTIES = {
    # What keeps a table readable for deltalake, polars, DuckDB and petastorm alike.
    "delta.enableDeletionVectors": "false",
    "delta.columnMapping.mode": "none",
}
# Training reads a row group at a time: small ones make small steps. As properties of the table these hold for whoever writes
# it, with whatever settings of Spark.
_ROW_GROUPS = {"parquet.block.size": str(32 << 20)}
# Delta's smallest and largest of each column cost more than all else about writing a tile, so they are kept only where a stage
# looks for its rows by them.
_STATISTICS = {"delta.dataSkippingStatsColumns": "image_id,patient_id"}
_LAYOUT = {
    "tiles": _STATISTICS,
    "features": _ROW_GROUPS | _STATISTICS,
    "patients": _ROW_GROUPS
    | {
        # Parquet looks at the size of a row group after 100 rows at the soonest, which bags fill many times over.
        "parquet.page.size.row.check.min": "1",
        # The smallest and largest bag of each row group would stay in memory until the file ends, and tell nobody anything.
        "parquet.column.statistics.enabled#embeddings_avg": "false",
        "parquet.column.statistics.enabled#embeddings_max": "false",
    },
}


def spark_schema(schema: pa.Schema) -> StructType:
    """An Arrow schema as Spark's, comments included."""

    def column(field_: pa.Field) -> StructField:
        comment = (field_.metadata or {}).get(b"comment", b"").decode()
        kind = from_arrow_type(field_.type, prefer_timestamp_ntz=False)
        return StructField(field_.name, kind, field_.nullable, {"comment": comment} if comment else None)

    return StructType([column(field_) for field_ in schema])


class ConcurrentRunError(Exception):
    """Another run writes to the same tables."""


@dataclass
class Tables:
    """The tables of one output root, written by one run at a time: a second writer is noticed, and stops this one."""

    spark: SparkSession
    root: str
    run_id: str
    schema: str | None = None  # of Spark's catalog, where they get their names too
    _known: dict[str, int] = field(default_factory=dict)  # the version of each table that this run has seen or made

    def path(self, name: str) -> str:
        """Where the table lies."""
        return f"{absolute_uri(self.root).rstrip('/')}/{name}"  # Delta wants no relative path

    def check_catalog(self) -> None:
        """Raise ConfigError where the tables can't be in the catalog's schema."""
        if self.schema:
            refuse_unusable(self.spark, self.schema, {name: self.path(name) for name in SCHEMAS})

    def check_layout(self) -> None:
        """Raise ConfigError if anything but a table lies in its place, DamagedTableError if its log can't be read."""
        refuse_unwritable_name(self.spark, absolute_uri(self.root))
        for name, schema in SCHEMAS.items():
            refuse_others(self.spark, name, self.path(name), spark_schema(schema))

    def create(self, name: str) -> None:
        """Make the table where it is not there yet; one of an older version gets the columns and properties that it lacks.

        In the catalog's schema it gets its name, where it has none.
        """
        schema, path, layout = spark_schema(SCHEMAS[name]), self.path(name), _LAYOUT.get(name, {})
        is_there = DeltaTable.isDeltaTable(self.spark, path)
        if is_there:
            have = set(self.read(name).columns)
            new = [f"`{column.name}` {_type(column)}" for column in schema if column.name not in have]
            if new:
                self.spark.sql(f"ALTER TABLE {sql_name('delta', path)} ADD COLUMNS ({', '.join(new)})")
            has = self._properties(name) if layout else {}
            for key, value in layout.items():
                if key not in has:
                    self.set_property(name, key, value)
        else:
            builder = (
                DeltaTable.createIfNotExists(self.spark).location(path).addColumns(schema).comment(_COMMENTS[name])
            )
            for key, value in (_PROPERTIES | layout).items():
                builder = builder.property(key, value)
            builder.execute()
        if self.schema:
            register(self.spark, self.schema, name, path, _COMMENTS[name])
        # One that was not there has its first version, or another run has made it meanwhile, which is to be noticed.
        self._known[name] = self.version(name) if is_there or self.schema else 0

    def version(self, name: str) -> int:
        """The Delta version of a table that is there."""
        return int(DeltaTable.forPath(self.spark, self.path(name)).history(1).collect()[0]["version"])

    def property(self, name: str, key: str) -> str | None:
        """A property of the table; None where it has none such, or is not there."""
        there = DeltaTable.isDeltaTable(self.spark, self.path(name))
        return self._properties(name).get(key) if there else None

    def _properties(self, name: str) -> dict[str, str]:
        found: dict[str, str] = DeltaTable.forPath(self.spark, self.path(name)).detail().collect()[0]["properties"]
        return found

    def set_property(self, name: str, key: str, value: str) -> None:
        """Set a property of the table; a commit without rows."""
        table = sql_name("delta", self.path(name))
        self.spark.sql(f"ALTER TABLE {table} SET TBLPROPERTIES ('{key}' = {literal(value)})")
        self._known[name] = self.version(name)

    def read(self, name: str) -> DataFrame:
        """The rows as they are now."""
        return self.spark.read.format("delta").load(self.path(name))

    def versions(self) -> dict[str, int]:
        """The Delta version of each table that is there."""
        return {name: self.version(name) for name in SCHEMAS if DeltaTable.isDeltaTable(self.spark, self.path(name))}

    def put(
        self,
        name: str,
        rows: DataFrame,
        key: str,
        written: Iterable[str],
        present: Iterable[str],
        among: tuple[str, str] | None = None,
    ) -> None:
        """Make `rows` the rows of some keys, in one commit; none if there are no keys.

        Args:
            name: of the table.
            rows: the new rows, with at least the table's columns.
            key: column that tells whose rows they are.
            written: every value of it that `rows` may hold.
            present: those values that have rows now, which go; a value without new rows may be among them.
            among: another column of the key and its value, which all of `rows` have: rows with other values stay.
        """
        gone = sorted(set(present))
        keys = sorted({*written, *gone})
        if not keys:
            return
        where = f"{key} IN ({', '.join(literal(value) for value in keys)})"
        if among:
            where += f" AND {among[0]} = {literal(among[1])}"
        self._write(name, rows, where if gone else None)

    def append(self, name: str, rows: DataFrame) -> None:
        """Add rows in one commit."""
        self._write(name, rows, None)

    def upsert(self, name: str, rows: DataFrame, key: str, columns: Iterable[str]) -> None:
        """Change some columns of the rows whose key `rows` has."""
        self._check_alone(name)
        changes: dict[str, str | Column] = {column: F.col(f"new.{column}") for column in columns}
        table = DeltaTable.forPath(self.spark, self.path(name)).alias("old")
        # Few and narrow beside the table's: sent to all, so that no row of the table, bags and all, is shuffled.
        table.merge(F.broadcast(rows).alias("new"), f"old.{key} = new.{key}").whenMatchedUpdate(set=changes).execute()
        self._known[name] = self.version(name)

    def compact(self, name: str) -> None:
        """Join small files to larger ones, in one commit that changes no row; none where there is nothing to join."""
        self._check_alone(name)
        DeltaTable.forPath(self.spark, self.path(name)).optimize().executeCompaction()
        self._known[name] = self.version(name)

    def size(self, name: str) -> tuple[int, int]:
        """Files of the table as it is now, and their bytes."""
        detail = DeltaTable.forPath(self.spark, self.path(name)).detail().select("numFiles", "sizeInBytes").collect()[0]
        return int(detail["numFiles"]), int(detail["sizeInBytes"])

    def _write(self, name: str, rows: DataFrame, where: str | None) -> None:
        known = self._check_alone(name)
        writer = rows.select(SCHEMAS[name].names).write.format("delta").mode("overwrite" if where else "append")
        # One transaction id for all runs, numbered by the table's version: of two commits upon the same version, tried
        # again or by two runs at once, Delta lets one through.
        writer = writer.option("txnAppId", "slidelake").option("txnVersion", known + 1)
        if where:
            writer = writer.option("replaceWhere", where)
        writer.save(self.path(name))
        self._known[name] = known + 1

    def _check_alone(self, name: str) -> int:
        """The table's version, which must be the one that this run knows."""
        now = self.version(name)
        if self._known.setdefault(name, now) != now:
            raise ConcurrentRunError(
                f"table {name} went from version {self._known[name]} to {now} while this run was at work: another run "
                f"writes to {public_uri(self.root)}; let one end, then run again"
            )
        return now


def _type(column: StructField) -> str:
    return f"{column.dataType.simpleString()} COMMENT {literal(column.metadata.get('comment', ''))}"
