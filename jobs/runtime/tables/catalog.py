"""Names of tables in a schema of Spark's catalog (Unity Catalog, Hive), if output.schema names one.

The catalog holds names and places only. Delta's log, beside the table's files, says what a table is.
"""

import re
from collections.abc import Iterable, Mapping
from urllib.parse import urlsplit

from pyspark.errors import AnalysisException
from pyspark.sql import SparkSession

from jobs.runtime.settings.config import ConfigError
from jobs.runtime.spark.delta_table import DeltaTable
from udfs.wsi.store import public_uri

_NOT_PLAIN = re.compile(r"[^0-9A-Za-z ,.:/_-]")


def refuse_unusable(session: SparkSession, schema: str, paths: Mapping[str, str]) -> None:
    """Check that tables of these names, at these paths, can be in the schema.

    Raises:
        ConfigError: the schema is missing or would not last, or has a table of such a name at another place.
    """
    is_its_own = schema.partition(".")[0] in (schema, "spark_catalog")
    if is_its_own and session.conf.get("spark.sql.catalogImplementation") == "in-memory":
        raise ConfigError(
            f"output.schema: Spark's own catalog, which {schema} would be in, ends with this session: set "
            "spark.sql.catalogImplementation to hive, or name a schema of a catalog that stays"
        )
    if not session.catalog.databaseExists(_sql_name(schema)):
        raise ConfigError(
            f"output.schema: Spark's catalog has no schema {schema}: CREATE SCHEMA {schema}, or name one that exists"
        )
    for name in sorted(_names(session, schema) & paths.keys()):
        place = _place(session, schema, name)
        if not _is_same(place, paths[name]):
            raise ConfigError(
                f"output.schema: {schema}.{name} is there already and is {public_uri(place)}, not {public_uri(paths[name])}: "
                "set another output.schema, or rename or drop that table"
            )


def register(session: SparkSession, schema: str, name: str, path: str, comment: str) -> bool:
    """Give the Delta table at a path its name if it has none, and then a comment if it has none.

    Returns:
        Whether the comment was set, which is a commit to the table.
    """
    if name in _names(session, schema):
        return False
    table = _sql_name(schema, name)
    session.sql(f"CREATE TABLE IF NOT EXISTS {table} USING delta LOCATION {literal(path)}")
    lacks_comment = not DeltaTable.forPath(session, path).detail().select("description").collect()[0][0]
    if lacks_comment:
        session.sql(f"COMMENT ON TABLE {table} IS {literal(comment)}")
    return lacks_comment


def is_in(column: str, values: Iterable[str]) -> str:
    """Return the condition of SQL that a column has one of some values."""
    return f"{column} IN ({', '.join(literal(value) for value in sorted(values))})"


def are_in(columns: tuple[str, str], pairs: Iterable[tuple[str, str]]) -> str:
    """Return the condition of SQL that two columns have one of some pairs of values; short if few values of the second occur."""
    of_second: dict[str, list[str]] = {}
    for first, second in pairs:
        of_second.setdefault(second, []).append(first)
    conditions = [f"{is_in(columns[1], [second])} AND {is_in(columns[0], of)}" for second, of in of_second.items()]
    return " OR ".join(f"({condition})" for condition in conditions)


def literal(text: str) -> str:
    """Return a text as SQL writes it.

    Spark looks for variables (``${env:HOME}``) in SQL before it reads any of it, in strings too. So every character that is no
    letter, digit or harmless sign of ASCII is written as its code point.
    """
    escaped = _NOT_PLAIN.sub(lambda match: f"\\U{ord(match[0]):08x}", text)
    return f"'{escaped}'"


def sql_name(*names: str) -> str:
    """Return a name as SQL writes it, from its parts."""
    return ".".join(f"`{name.replace('`', '``')}`" for name in names)


def _names(session: SparkSession, schema: str) -> set[str]:
    return {row.tableName for row in session.sql(f"SHOW TABLES IN {_sql_name(schema)}").collect()}


def _place(session: SparkSession, schema: str, name: str) -> str:
    """The URI of a table's files, or what the name stands for instead."""
    try:
        about = session.sql(f"DESCRIBE TABLE EXTENDED {_sql_name(schema, name)}").collect()
    except AnalysisException:
        return "a table whose files are missing"
    return next((str(row.data_type) for row in about if row.col_name == "Location"), "a view")


def _is_same(place: str, path: str) -> bool:
    """Catalogs give plain paths a scheme."""
    return (place if "://" in path else urlsplit(place).path).rstrip("/") == path.rstrip("/")


def _sql_name(schema: str, *names: str) -> str:
    return sql_name(*schema.split("."), *names)
