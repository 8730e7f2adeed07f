"""What a node has, for the job doctor: slidelake's code, a folder. Needs no package but Python's own."""

import hashlib
import socket
from collections.abc import Iterator
from importlib.resources import files
from importlib.resources.abc import Traversable
from pathlib import Path


def sees_folder(path: str) -> tuple[str, bool]:
    """Returns this host, and whether it has the folder."""
    return socket.gethostname(), Path(path).is_dir()


def code_digest() -> str:
    """Returns a hash of what Spark runs on executors: package udfs as this process imports it."""
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
