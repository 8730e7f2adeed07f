"""Files that a host makes once and all its processes use. Losing them costs time and nothing else."""

import hashlib
import os
import tempfile
from collections.abc import Callable
from pathlib import Path

from filelock import FileLock, Timeout


def cache_folder() -> Path:
    """Returns the folder of the cache, on a local disk: what is kept may fit the processor that made it.

    Raises:
        OSError: see `own_folder`.
    """
    return own_folder("SLIDELAKE_CACHE", "cache")


def own_folder(variable: str, purpose: str) -> Path:
    """Returns the folder that an environment variable names, else one in the system's folder for temporary files.

    The folder is made if it is missing.

    Raises:
        OSError: the folder cannot be made, or another user made it.
    """
    named = os.environ.get(variable)
    folder = Path(named) if named else Path(tempfile.gettempdir()) / f"slidelake-{purpose}-{os.getuid()}"
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    if not named and folder.lstat().st_uid != os.getuid():
        raise PermissionError(f"{folder} is another user's: name a folder in {variable}")  # anybody may make it
    return folder


def key_of(*what: object) -> str:
    """Returns a name for a file, from all that shapes its content."""
    return hashlib.sha256(repr(what).encode()).hexdigest()[:32]


def make_once(path: Path, make: Callable[[Path], object], *, wait: bool = True) -> None:
    """Make a file of the cache by `make(path)` if it does not exist. The file gets its name when it is whole.

    If another process makes the file, wait for it, or without `wait` leave it to that process.

    Raises:
        OSError: the folder cannot be written.
    """
    unfinished = path.with_name(f"{path.name}.unfinished")  # one name: what a killed process left is overwritten
    try:
        with FileLock(f"{path}.lock", timeout=-1 if wait else 0):
            if path.exists():
                return
            try:
                make(unfinished)
                with unfinished.open("rb") as written:
                    os.fsync(written.fileno())
                unfinished.replace(path)
            finally:
                unfinished.unlink(missing_ok=True)  # after an error: a full disk needs the room
    except Timeout:  # another process makes the file
        return


def text_once(name: str, make: Callable[[], str]) -> str:
    """Returns the text that the first process of this host made under a name; each makes its own if it cannot be kept."""
    try:
        path = cache_folder() / name
        make_once(path, lambda unfinished: unfinished.write_text(make()))
        return path.read_text()
    except OSError:
        return make()
