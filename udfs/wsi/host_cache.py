"""Files that a host makes once and all its processes use. Losing them costs time and nothing else."""

import hashlib
import os
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
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


def mark_used(path: Path) -> None:
    """Keep a file of the cache from `remove_unused`, before `make_once` gives it."""
    with suppress(OSError):  # a full disk: the file itself may be there
        _mark_of(path).touch()


def remove_unused(prefix: str, unused_s: float) -> None:
    """Remove the files of the cache whose names begin with `prefix` and that nobody made or marked as used for `unused_s`.

    What other processes have mapped stays mapped. Files that another process is making, or that this one may not remove, stay.

    Raises:
        OSError: see `own_folder`.
    """
    for found in cache_folder().glob(f"{prefix}*"):
        if found.suffix not in ("", ".unfinished"):
            continue
        path = found.with_suffix("")
        if _unused_s(found, path) > unused_s:
            with suppress(OSError, Timeout), FileLock(f"{path}.lock", timeout=0):
                if _unused_s(found, path) > unused_s:  # nobody marked it meanwhile
                    found.unlink(missing_ok=True)
                    _mark_of(path).unlink(missing_ok=True)


def _mark_of(path: Path) -> Path:
    return path.with_name(f"{path.name}.used")


def _unused_s(found: Path, path: Path) -> float:
    times = [0.0]
    for each in (found, _mark_of(path)):
        with suppress(OSError):
            times.append(each.stat().st_mtime)
    return time.time() - max(times)


def text_once(name: str, make: Callable[[], str]) -> str:
    """Returns the text that the first process of this host made under a name; each makes its own if it cannot be kept."""
    made: list[str] = []

    def write(unfinished: Path) -> None:
        made.append(make())
        unfinished.write_text(made[0])

    try:
        path = cache_folder() / name
        make_once(path, write)
        return path.read_text()
    except OSError:
        return made[0] if made else make()
