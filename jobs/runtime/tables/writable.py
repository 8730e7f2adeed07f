"""Checks before Spark starts that a job can write to its folders on this machine's disks."""

import os
import re
from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryDirectory

from jobs.runtime.settings.config import Config, ConfigError
from udfs.schemas import TABLES
from udfs.wording import named
from udfs.wsi.store import absolute_uri

# If one of these is set, a plain path may be one of HDFS or DBFS to Spark, so this machine's disks say nothing about it.
_OTHER_DEFAULT_STORE = ("HADOOP_CONF_DIR", "YARN_CONF_DIR", "DATABRICKS_RUNTIME_VERSION")
# The default store in Spark's own settings, spark-defaults.conf and core-site.xml; a plain path is one of that store.
_DEFAULT_STORE = re.compile(
    r"^[ \t]*spark\.hadoop\.fs\.default(?:FS|\.name)[ \t]*[\s=:][ \t]*(\S+)"
    r"|<name>\s*fs\.default(?:FS|\.name)\s*</name>\s*<value>\s*([^<\s]+)",
    re.MULTILINE,
)


def refuse_unwritable(config: Config, job: str) -> None:
    """Try each local folder that the job writes to, and leave nothing there.

    Raises:
        ConfigError: a folder cannot be made or written.
    """
    for key, uri, location in config.locations(job):
        path = _local_path(uri)
        if path is None or location.written is None:
            continue
        folders = [path] if location.written == "folder" else [path.parent]
        if key == "output.root":
            folders += [path / name for name in TABLES if os.path.lexists(path / name)]
        for folder in folders:
            if reason := why_unwritable(folder):
                raise ConfigError(
                    f"{key}: {named(str(folder))} cannot be written ({reason})",
                    f"give this user the right to write there, or set {key} to another place",
                )


def why_unwritable(folder: Path) -> str | None:
    """Return why a folder cannot be made or written to; None if it can, as a temporary folder in it shows."""
    existing = folder
    try:
        while not existing.exists():
            if existing.is_symlink():
                return f"{named(str(existing))} is a link to nothing"
            existing = existing.parent
        with TemporaryDirectory(prefix="_slidelake_", dir=existing):
            return None
    except NotADirectoryError:
        return f"{named(str(existing))} is a file, not a folder"
    except OSError as error:
        return f"{error.strerror}: {named(str(existing))}"


def _local_path(uri: str) -> Path | None:
    protocol, is_uri, path = absolute_uri(uri).partition("://")
    if is_uri:
        return Path(path) if protocol in ("file", "local") else None
    return None if _has_other_default_store() else Path(protocol)


def _has_other_default_store() -> bool:
    """Whether the environment or Spark's settings files name a default store other than this machine's disks."""
    if any(name in os.environ for name in _OTHER_DEFAULT_STORE):
        return True
    folder = os.environ.get("SPARK_CONF_DIR") or str(Path(os.environ.get("SPARK_HOME", ""), "conf"))
    for name in ("spark-defaults.conf", "core-site.xml"):
        with suppress(OSError):
            text = Path(folder, name).read_text(encoding="utf-8", errors="replace")
            if any(not (own or site).startswith("file:") for own, site in _DEFAULT_STORE.findall(text)):
                return True
    return False
