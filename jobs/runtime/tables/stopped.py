"""What stopped a run, in one line, if the code is not at fault: another run, a damaged table, a full disk."""

import os
import re
import shutil
import tempfile
from pathlib import Path

from jobs.runtime.spark.session import is_local
from jobs.runtime.tables.layout import DamagedTableError, damage_of, table_in
from jobs.runtime.tables.tables import ConcurrentRunError, Tables
from udfs.schemas import TABLES
from udfs.wsi.store import absolute_uri, public_uri

_OTHER_WRITER = re.compile(
    r"DELTA_CONCURRENT_\w+|DELTA_(?:METADATA|PROTOCOL)_CHANGED|Concurrent(?:Append|DeleteRead|DeleteDelete|Transaction|Write|"
    r"Modification)Exception|(?:Metadata|Protocol)ChangedException"
)
_NO_ROOM = re.compile(r"No space left on device|[Dd]isk quota exceeded|File too large")


def why_stopped(error: BaseException, tables: Tables) -> str | None:
    """Return one line with the cause and the remedy; None for any other error."""
    if isinstance(error, ConcurrentRunError | DamagedTableError):
        return str(error)
    text = f"{type(error).__name__}: {error}"
    if no_room := _NO_ROOM.search(text):
        return f"{no_room[0]}: {_room(tables)}: free some, then run the same command again to go on"
    if _OTHER_WRITER.search(text):
        root = public_uri(tables.root)
        return f"another run wrote to {root} while this one did: let one end, then run the same command again to go on"
    paths = {name: tables.path(name) for name in TABLES}
    name = table_in(text, paths)
    return damage_of(text, name, paths[name]) if name else None


def _room(tables: Tables) -> str:
    """Where a run writes, and the free space there as far as this machine knows."""
    scratch = os.environ.get("SPARK_LOCAL_DIRS") or tables.spark.sparkContext.getConf().get(
        "spark.local.dir", tempfile.gettempdir()
    )
    places: list[tuple[str, str]] = [("output.root", absolute_uri(tables.root))]
    if is_local(tables.spark):
        places += [("spark.local.dir", folder) for folder in str(scratch).split(",")]
    return ", ".join(f"{setting} {public_uri(place)} {_free(place)}" for setting, place in places)


def _free(place: str) -> str:
    local = Path(place.removeprefix("file://"))
    if "://" in str(local) or not local.exists():
        return "is not on a disk of this machine"
    return f"has {shutil.disk_usage(local).free / 1e9:,.2f} GB free"
