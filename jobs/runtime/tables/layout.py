"""Whether what lies in the place of a table is that table, whole and as this version writes it."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from urllib.parse import unquote

from py4j.protocol import Py4JJavaError
from pyspark.errors import AnalysisException, IllegalArgumentException, PySparkException
from pyspark.sql import SparkSession
from pyspark.sql.types import StructType

from jobs.runtime.settings.config import ConfigError
from jobs.runtime.spark.delta_table import DeltaTable
from jobs.runtime.spark.jvm import call_static
from udfs.schemas import TABLES
from udfs.wording import some
from udfs.wsi.store import public_uri

_REMEDY = "set another output.root, or move that folder away"
_OPEN_IT = "let this user and this machine read that folder, then run the same command again"
_UNREADABLE_BY_OTHERS = {  # properties that other readers of Delta tables get wrong
    "delta.enableDeletionVectors": "false",
    "delta.columnMapping.mode": "none",
    "delta.appendOnly": "false",
}
_DAMAGED = re.compile(
    r"ChecksumException|is not a Parquet file|MALFORMED_RECORD|JsonParseException|JsonEOFException|MismatchedInputException"
    r"|ParquetDecodingException|CANNOT_READ_FILE_FOOTER|DELTA_STATE_RECOVER_ERROR"
)
_MISSING = re.compile(
    r"FILE_NOT_EXIST|DELTA_VERSIONS_NOT_CONTIGUOUS|DELTA_TRUNCATED_TRANSACTION_LOG|DELTA_\w*NOT_FOUND"
)
_NOT_FOUND = re.compile(r"FileNotFoundException:\s*([^\n]*(?:does not exist|No such file)[^\n]*)")
_OUT_OF_REACH = re.compile(  # the file may be whole: nobody should delete anything for these
    r"Permission denied|Too many open files|AccessControl|AccessDenied|\bConnection\b|Connect\w*Exception|UnknownHost"
    r"|timed out|Input/output error|Stale file handle"
)
_STACK = re.compile(r"^\s+at .*$", re.MULTILINE)  # names of classes in it say nothing of the fault
_GAP = re.compile(r"Versions \(?(?:List|Vector)?\(?([\d, ]+)\)? are not contiguous")
_GLOB = re.compile(r"[\\{}\[\]*?]")  # what Spark takes for patterns in paths


class DamagedTableError(Exception):
    """A table whose log or files are damaged or missing: one line that names table, file and remedy."""


@dataclass
class Log:
    """What the log of an existing table says."""

    version: int
    columns: list[str]
    properties: dict[str, str]


def refuse_unwritable_name(session: SparkSession, path: str) -> None:
    """Raise ConfigError if Java can't write the characters of a local path: its locale then makes other names of them."""
    if path.isascii() or ("://" in path and not path.startswith("file://")):
        return
    encoding = call_static(session, "java.lang.System", "getProperty", "sun.jnu.encoding")  # SQL would ask an executor
    try:
        path.encode(encoding)
    except UnicodeEncodeError:
        raise ConfigError(
            f"output.root: {path} has letters that Java can't write in this locale ({encoding})", "set LC_ALL=C.UTF-8"
        ) from None


def open_log(session: SparkSession, name: str, path: str, schema: StructType) -> Log | None:
    """Return what the log of the table at a path says; None if nothing lies there.

    Raises:
        ConfigError: what lies there is no Delta table, or not this one.
        DamagedTableError: its log can't be read.
    """
    try:
        if not DeltaTable.isDeltaTable(session, path):
            if files := _files(session, path):
                what = (
                    f"{public_uri(path)} is in the place of table {name} and holds no Delta table, but {some(files, 3)}"
                )
                raise ConfigError(
                    f"output.root: {what}", f"{_REMEDY}; if its _delta_log was lost, restore that from a copy"
                )
            return None
        table = DeltaTable.forPath(session, path)
        columns = table.toDF().schema
        partitions, properties = table.detail().select("partitionColumns", "properties").collect()[0]
        differ = _differences(columns, schema, partitions, properties)
        if not differ:
            return Log(latest_version(session, path), columns.names, properties)
    except (Py4JJavaError, PySparkException) as error:
        if damage := damage_of(str(error), name, path):
            raise DamagedTableError(damage) from None
        if isinstance(error, PySparkException):
            why = " ".join(str(error).split())
            raise ConfigError(
                f"output.root: {public_uri(path)} can't be opened as table {name} ({why})",
                _OPEN_IT if is_out_of_reach(str(error)) else _REMEDY,
            ) from None
        raise
    raise ConfigError(f"output.root: {public_uri(path)} is another table than {name}: {'; '.join(differ)}", _REMEDY)


def latest_version(session: SparkSession, path: str) -> int:
    """The version of the Delta table at a path as it is now."""
    return int(DeltaTable.forPath(session, path).history(1).select("version").collect()[0][0])


def damage_of(text: str, name: str, path: str) -> str | None:
    """Return what an error's text says of damage to the table at a path, and the remedy; None if it says nothing of it."""
    text = _STACK.sub("", text)
    if is_out_of_reach(text):
        return None
    is_damaged = bool(_DAMAGED.search(text))
    is_missing = _MISSING.search(text) or any(_place_in(line, path) for line in _NOT_FOUND.findall(text))
    if not (is_damaged or is_missing):
        return None
    file = _file_in(text, path)
    if gap := _GAP.search(text):
        there = {int(number) for number in gap[1].split(",")}
        missing = sorted(set(range(min(there), max(there))) - there)
        file = f"_delta_log/{missing[0]:020}.json" if missing else "_delta_log"
    state = "is damaged" if is_damaged else "is missing"
    remedy = f"restore it from a copy; without a copy, {TABLES[name].if_deleted} once you delete that folder"
    return f"table {name}: {file or '_delta_log'} in {public_uri(path)} {state}: {remedy}"


def is_out_of_reach(text: str) -> bool:
    """Whether an error's text says that a file could not be reached, so that nothing is known of its bytes."""
    return bool(_OUT_OF_REACH.search(_STACK.sub("", text)))


def table_in(text: str, paths: Mapping[str, str]) -> str | None:
    """Return the name of the table whose file an error's text names, of tables by name with their paths."""
    return next((name for name, path in paths.items() if _file_in(text, path)), None)


def _file_in(text: str, path: str) -> str | None:
    """The file of the table at `path` that a text names."""
    found = (re.match(r"(?:_delta_log/)?[\w.-]+\.(?:json|parquet)\b", place) for place in _place_in(text, path))
    return next((file[0] for file in found if file), None)


def _place_in(text: str, path: str) -> list[str]:
    """What a text has behind the path of a table, which Java writes with other schemes, and escaped in URIs."""
    scheme, is_uri, rest = path.partition("://")
    host, _, below = rest.partition("/") if is_uri else ("", "", scheme)
    store = re.escape(host) if host else r"[^/\s]*"
    own = rf"(?<![^\s'\"(\[,=])(?:[\w+.-]+:(?://{store})?)?/*{re.escape(below.strip('/'))}/"
    return [text[found.end() :] for text in (text, unquote(text)) for found in re.finditer(own, text)]


def _differences(there: StructType, schema: StructType, partitions: list[str], properties: dict[str, str]) -> list[str]:
    """What keeps a table from being the one of that schema. Columns that an older version had not are none of it."""
    columns = {column.name: column for column in there}
    required = [column.name for column in schema if not column.nullable or column.name == "run_id"]
    found = [f"it has no column {name}" for name in required if name not in columns]
    found += [
        f"{column.name} is {columns[column.name].dataType.simpleString()}, not {column.dataType.simpleString()}"
        for column in schema
        if column.name in columns and columns[column.name].dataType.simpleString() != column.dataType.simpleString()
    ]
    ours = set(schema.names)
    found += [
        f"column {column.name} must not be null" for column in there if not column.nullable and column.name not in ours
    ]
    found += [f"it is partitioned by {', '.join(partitions)}"] if partitions else []
    return found + [
        f"its property {key} is {properties[key]}"
        for key, ours_is in _UNREADABLE_BY_OTHERS.items()
        if properties.get(key, ours_is) != ours_is
    ]


def _files(session: SparkSession, path: str) -> list[str]:
    """Names of files that lie there and are no part of a table that is about to be made."""
    files = session.read.format("binaryFile").option("recursiveFileLookup", True)
    try:
        found = files.load(_GLOB.sub(r"\\\g<0>", path)).inputFiles()
    except AnalysisException as error:
        if error.getCondition() == "PATH_NOT_FOUND":
            return []
        raise
    except (
        IllegalArgumentException
    ):  # Hadoop finds no name with a colon and a pattern; Delta refuses to make a table over files
        return []
    return sorted(unquote(uri.rpartition("/")[2]) for uri in found)
