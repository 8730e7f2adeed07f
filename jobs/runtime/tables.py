"""The Delta tables: where they lie, how they are made, and how rows get into them."""

from collections.abc import Iterable
from dataclasses import dataclass, field

import pyarrow as pa
from delta.tables import DeltaTable
from pyspark.sql import Column, DataFrame, SparkSession
from pyspark.sql import functions as F
from pyspark.sql.pandas.types import from_arrow_type
from pyspark.sql.types import StructField, StructType

from udfs import schemas
from udfs.wsi.storage import absolute_uri

SCHEMAS = {
    "slides": schemas.SLIDES,
    "tiles": schemas.TILES,
    "features": schemas.FEATURES,
    "patients": schemas.PATIENTS,
    "runs": schemas.RUNS,
}
_PROPERTIES = {
    # What keeps a table readable for deltalake, polars, DuckDB and petastorm alike.
    "delta.enableDeletionVectors": "false",
    "delta.columnMapping.mode": "none",
}


def spark_schema(schema: pa.Schema) -> StructType:
    """An Arrow schema as Spark's, comments included."""

    def column(field_: pa.Field) -> StructField:
        comment = (field_.metadata or {}).get(b"comment", b"").decode()
        kind = from_arrow_type(field_.type, prefer_timestamp_ntz=False)
        return StructField(field_.name, kind, field_.nullable, {"comment": comment} if comment else None)

    return StructType([column(field_) for field_ in schema])


@dataclass
class Tables:
    """The tables of one output root, written by one run at a time."""

    spark: SparkSession
    root: str
    run_id: str
    _commits: dict[str, int] = field(default_factory=dict)

    def path(self, name: str) -> str:
        """Where the table lies."""
        return f"{absolute_uri(self.root).rstrip('/')}/{name}"  # Delta wants no relative path

    def create(self, name: str) -> None:
        """Make the table where it is not there yet."""
        builder = (
            DeltaTable.createIfNotExists(self.spark).location(self.path(name)).addColumns(spark_schema(SCHEMAS[name]))
        )
        for key, value in _PROPERTIES.items():
            builder = builder.property(key, value)
        builder.execute()

    def read(self, name: str) -> DataFrame:
        """The rows as they are now."""
        return self.spark.read.format("delta").load(self.path(name))

    def versions(self) -> dict[str, int]:
        """The Delta version of each table that is there."""
        return {
            name: int(DeltaTable.forPath(self.spark, self.path(name)).history(1).collect()[0]["version"])
            for name in SCHEMAS
            if DeltaTable.isDeltaTable(self.spark, self.path(name))
        }

    def put(self, name: str, rows: DataFrame, key: str, written: Iterable[str], present: Iterable[str]) -> None:
        """Make `rows` the rows of some keys, in one commit.

        Args:
            name: of the table.
            rows: the new rows, with at least the table's columns.
            key: column that tells whose rows they are.
            written: every value of it that `rows` may hold.
            present: those values that have rows now, which go; a value without new rows may be among them.
        """
        gone = sorted(set(present))
        keys = sorted({*written, *gone})
        self._write(name, rows, f"{key} IN ({', '.join(_literal(value) for value in keys)})" if gone else None)

    def append(self, name: str, rows: DataFrame) -> None:
        """Add rows in one commit."""
        self._write(name, rows, None)

    def upsert(self, name: str, rows: DataFrame, key: str, columns: Iterable[str]) -> None:
        """Change some columns of the rows whose key `rows` has."""
        changes: dict[str, str | Column] = {column: F.col(f"new.{column}") for column in columns}
        table = DeltaTable.forPath(self.spark, self.path(name)).alias("old")
        table.merge(rows.alias("new"), f"old.{key} = new.{key}").whenMatchedUpdate(set=changes).execute()

    def _write(self, name: str, rows: DataFrame, where: str | None) -> None:
        # The transaction id makes a commit that is tried again, by Spark or by Delta, count once.
        commit = self._commits[name] = self._commits.get(name, -1) + 1
        writer = rows.select(SCHEMAS[name].names).write.format("delta").mode("overwrite" if where else "append")
        writer = writer.option("txnAppId", f"{self.run_id}/{name}").option("txnVersion", commit)
        if where:
            writer = writer.option("replaceWhere", where)
        writer.save(self.path(name))


def _literal(text: str) -> str:
    escaped = text.replace("\\", "\\\\").replace("'", "\\'")
    return f"'{escaped}'"
