"""Checks that a folder of output.root holds the table of its name, undamaged and with the columns of this version."""

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
from jobs.runtime.spark.session import call_static
from udfs.schemas import TABLES
from udfs.wording import some
from udfs.wsi.store import public_uri

_REMEDY = "set another output.root, or move that folder away"
_OPEN_IT = "let this user and this machine read that folder, then run the same command again"
# Properties that keep a table readable for deltalake, polars, DuckDB and petastorm alike.
READABLE_BY_OTHERS = {"delta.enableDeletionVectors": "false", "delta.columnMapping.mode": "none"}
_REQUIRED = READABLE_BY_OTHERS | {"delta.appendOnly": "false"}
_DAMAGED = re.compile(
    r"ChecksumException|is not a Parquet file|MALFORMED_RECORD|JsonParseException|JsonEOFException|MismatchedInputException"
    r"|ParquetDecodingException|CANNOT_READ_FILE_FOOTER|DELTA_STATE_RECOVER_ERROR"
)
_MISSING = re.compile(
    r"FILE_NOT_EXIST|DELTA_VERSIONS_NOT_CONTIGUOUS|DELTA_TRUNCATED_TRANSACTION_LOG|DELTA_\w*NOT_FOUND"
)
_NOT_FOUND = re.compile(r"FileNotFoundException:\s*([^\n]*(?:does not exist|No such file)[^\n]*)")
_OUT_OF_REACH = re.compile(  # the file may be undamaged: nobody should delete anything for these
    r"Permission denied|Too many open files|AccessControl|AccessDenied|\bConnection\b|Connect\w*Exception|UnknownHost"
    r"|timed out|Input/output error|Stale file handle"
)
_STACK = re.compile(r"^\s+at .*$", re.MULTILINE)  # names of classes in it say nothing of the fault
_GAP = re.compile(r"Versions \(?(?:List|Vector)?\(?([\d, ]+)\)? are not contiguous")
_GLOB = re.compile(r"[\\{}\[\]*?]")  # Spark reads these as patterns in paths


class DamagedTableError(Exception):
    """A table whose log or files are damaged or missing: one line that names table, file and remedy."""


@dataclass
class Log:
    """What the log of an existing table says."""

    version: int
    columns: list[str]
    properties: dict[str, str]


def refuse_unwritable_name(session: SparkSession, path: str) -> None:
    """Raise ConfigError if Java cannot write the characters of a local path: in its locale they become other names."""
    if path.isascii() or ("://" in path and not path.startswith("file://")):
        return
    encoding = call_static(session, "java.lang.System", "getProperty", "sun.jnu.encoding")
    try:
        path.encode(encoding)
    except UnicodeEncodeError:
        raise ConfigError(
            f"output.root: {path} has letters that Java cannot write in this locale ({encoding})", "set LC_ALL=C.UTF-8"
        ) from None


def open_log(session: SparkSession, name: str, path: str, schema: StructType) -> Log | None:
    """Return what the log of the table at a path says; None if the path is empty.

    Raises:
        ConfigError: the path holds no Delta table, or another one.
        DamagedTableError: the log cannot be read.
    """
    try:
        if not DeltaTable.isDeltaTable(session, path):
            if files := _files(session, path):
                raise ConfigError(
                    f"output.root: {public_uri(path)} is in the place of table {name} and holds no Delta table, but "
                    f"{some(files, 3)}",
                    f"{_REMEDY}; if its _delta_log was lost, restore that from a copy",
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
                f"output.root: {public_uri(path)} cannot be opened as table {name} ({why})",
                _OPEN_IT if is_out_of_reach(str(error)) else _REMEDY,
            ) from None
        raise
    raise ConfigError(f"output.root: {public_uri(path)} is another table than {name}: {'; '.join(differ)}", _REMEDY)


def latest_version(session: SparkSession, path: str) -> int:
    """Return the version of the Delta table at a path as it is now."""
    return int(DeltaTable.forPath(session, path).history(1).select("version").collect()[0][0])


def damage_of(text: str, name: str, path: str) -> str | None:
    """Return what an error's text says of damage to the table at a path, and the remedy; None if it names no damage."""
    text = _STACK.sub("", text)
    if is_out_of_reach(text):
        return None
    is_damaged = bool(_DAMAGED.search(text))
    is_missing = _MISSING.search(text) or any(_place_in(line, path) for line in _NOT_FOUND.findall(text))
    if not (is_damaged or is_missing):
        return None
    file = _file_in(text, path)
    if gap := _GAP.search(text):
        found = {int(number) for number in gap[1].split(",")}
        missing = sorted(set(range(min(found), max(found))) - found)
        file = f"_delta_log/{missing[0]:020}.json" if missing else "_delta_log"
    state = "is damaged" if is_damaged else "is missing"
    remedy = f"restore it from a copy; without a copy, {TABLES[name].if_deleted} once you delete that folder"
    return f"table {name}: {file or '_delta_log'} in {public_uri(path)} {state}: {remedy}"


def is_out_of_reach(text: str) -> bool:
    """Return whether an error's text says that a file could not be reached: its bytes may be right."""
    return bool(_OUT_OF_REACH.search(_STACK.sub("", text)))


def table_in(text: str, paths: Mapping[str, str]) -> str | None:
    """Return the name of the table whose file an error's text names; `paths` are those of tables by name."""
    return next((name for name, path in paths.items() if _file_in(text, path)), None)


def _file_in(text: str, path: str) -> str | None:
    found = (re.match(r"(?:_delta_log/)?[\w.-]+\.(?:json|parquet)\b", place) for place in _place_in(text, path))
    return next((file[0] for file in found if file), None)


def _place_in(text: str, path: str) -> list[str]:
    """What follows the path of a table in a text. Java writes the path with other schemes, and escaped in URIs."""
    scheme, is_uri, rest = path.partition("://")
    host, _, below = rest.partition("/") if is_uri else ("", "", scheme)
    store = re.escape(host) if host else r"[^/\s]*"
    own = rf"(?<![^\s'\"(\[,=])(?:[\w+.-]+:(?://{store})?)?/*{re.escape(below.strip('/'))}/"
    return [text[found.end() :] for text in (text, unquote(text)) for found in re.finditer(own, text)]


def _differences(
    columns: StructType, schema: StructType, partitions: list[str], properties: dict[str, str]
) -> list[str]:
    """How a table differs from the one of the schema. It may lack columns that an older version did not have."""
    kinds = {column.name: column.dataType.simpleString() for column in columns}
    wanted = {column.name: column.dataType.simpleString() for column in schema}
    required = [column.name for column in schema if not column.nullable or column.name == "run_id"]
    found = [f"it has no column {name}" for name in required if name not in kinds]
    found += [f"{name} is {kinds[name]}, not {kind}" for name, kind in wanted.items() if kinds.get(name, kind) != kind]
    not_null = [column.name for column in columns if not column.nullable and column.name not in wanted]
    found += [f"column {name} must not be null" for name in not_null]
    found += [f"it is partitioned by {', '.join(partitions)}"] if partitions else []
    return found + [
        f"its property {key} is {properties[key]}"
        for key, ours in _REQUIRED.items()
        if properties.get(key, ours) != ours
    ]


def _files(session: SparkSession, path: str) -> list[str]:
    files = session.read.format("binaryFile").option("recursiveFileLookup", True)
    try:
        found = files.load(_GLOB.sub(r"\\\g<0>", path)).inputFiles()
    except AnalysisException as error:
        if error.getCondition() == "PATH_NOT_FOUND":
            return []
        raise
    except IllegalArgumentException:
        return []  # Hadoop finds no name with a colon and a pattern; Delta refuses to make a table over files
    return sorted(unquote(uri.rpartition("/")[2]) for uri in found)
