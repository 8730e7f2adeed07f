"""Files that a host makes once and all its processes use. Who loses them loses time and nothing else."""

import hashlib
import os
import tempfile
from collections.abc import Callable
from pathlib import Path

from filelock import FileLock, Timeout


def cache_folder() -> Path:
    """The folder that SLIDELAKE_CACHE names, else one in the system's folder for temporary files; made if needed.

    Local disks are meant: what is kept may fit the processor that made it.

    Raises:
        OSError: it can't be made, or another user made it.
    """
    named = os.environ.get("SLIDELAKE_CACHE")
    folder = Path(named) if named else Path(tempfile.gettempdir()) / f"slidelake-cache-{os.getuid()}"
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    if not named and folder.lstat().st_uid != os.getuid():
        raise PermissionError(f"{folder} is another user's: name a folder in SLIDELAKE_CACHE")  # anybody may make it
    return folder


def key_of(*what: object) -> str:
    """A name for what is kept, from all that shapes it."""
    return hashlib.sha256(repr(what).encode()).hexdigest()[:32]


def make_once(path: Path, make: Callable[[Path], object], *, wait: bool = True) -> None:
    """Make a file of the cache unless it is there. It is whole or not there: it gets its name when it is written.

    Args:
        path: the file.
        make: writes the file to the path that it is given.
        wait: wait while another process makes the file; else leave it to that process.

    Raises:
        OSError: the folder can't be written.
    """
    try:
        with FileLock(f"{path}.lock", timeout=-1 if wait else 0):
            if not path.exists():
                _make(path, make)
    except Timeout:  # another process makes it
        return


def text_once(name: str, make: Callable[[], str]) -> str:
    """The text that the first process of this host made under a name; each makes its own if it cannot be kept."""
    try:
        path = cache_folder() / name
        make_once(path, lambda unfinished: unfinished.write_text(make()))
        return path.read_text()
    except OSError:
        return make()


def _make(path: Path, make: Callable[[Path], object]) -> None:
    unfinished = path.with_name(f"{path.name}.unfinished")  # one name: what a killed process left is overwritten
    try:
        make(unfinished)
        with unfinished.open("rb") as written:
            os.fsync(written.fileno())
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)  # after an error: a full disk needs the room
