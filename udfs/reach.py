"""What an executor has and reaches, for the job doctor: slidelake's code, a range of a slide, a folder. Imports no model."""

import hashlib
import socket
import time
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.resources import files
from importlib.resources.abc import Traversable
from pathlib import Path

from udfs.wsi import ErrorCode, SlideError
from udfs.wsi.store import File, StorageOptions

_RANGE_BYTES = 65_536


@dataclass(frozen=True)
class Reached:
    """How it went to read from a slide."""

    host: str
    n_bytes: int = 0
    seconds: float = 0.0  # from the first question to the last byte
    error: ErrorCode | None = None
    message: str = ""  # of the error, with the remedy and without secrets


def read_range(uri: str, storage_options: StorageOptions) -> Reached:
    """Read the first bytes of a slide, as many as a small block has."""
    host, begun = socket.gethostname(), time.perf_counter()
    try:
        file = File(uri, storage_options)
        try:
            [data] = file.ranges([0], [min(_RANGE_BYTES, file.info.size_bytes)])
        finally:
            file.close()
    except SlideError as error:
        return Reached(host, error=error.code, message=error.message)
    return Reached(host, len(data), time.perf_counter() - begun)


def sees_folder(path: str) -> tuple[str, bool]:
    """This host, and whether it has the folder."""
    return socket.gethostname(), Path(path).is_dir()


def code_digest() -> str:
    """A hash of what Spark runs on executors, package udfs as this process imports it."""
    digest = hashlib.sha256()
    for name, text in sorted(_sources(files("udfs"))):
        digest.update(name.encode() + b"\0" + text + b"\0")
    return digest.hexdigest()


def _sources(folder: Traversable, prefix: str = "") -> Iterator[tuple[str, bytes]]:
    for entry in folder.iterdir():
        if entry.is_dir():
            yield from _sources(entry, f"{prefix}{entry.name}/")
        elif entry.name.endswith(".py"):
            yield f"{prefix}{entry.name}", entry.read_bytes()
