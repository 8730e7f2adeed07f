"""Files that a host makes once and all its processes use. Who loses them loses time and nothing else.

A file is whole or not there: it is written beside its place and renamed. Who writes holds a lock, which the kernel drops
when the process dies.
"""

import fcntl
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def cache_folder() -> Path:
    """The folder that SLIDELAKE_CACHE names, else one in the system's folder for temporary files; made where needed.

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


@contextmanager
def building(path: Path, *, wait: bool = True) -> Iterator[Path | None]:
    """A turn at making a file of the cache.

    Args:
        path: the file.
        wait: wait while another process makes it; else it is nobody's turn then.

    Yields:
        Where to write it, if it is not there and the turn is ours: it gets its name when the block ends without an error.
        None otherwise.

    Raises:
        OSError: the folder can't be written.
    """
    with path.with_name(f"{path.name}.lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            yield None
            return
        if path.exists():
            yield None
            return
        unfinished = path.with_name(f"{path.name}.unfinished")  # one name: what a killed process left is overwritten
        try:
            yield unfinished
            with unfinished.open("rb") as written:
                os.fsync(written.fileno())
            unfinished.replace(path)
        finally:
            unfinished.unlink(missing_ok=True)  # after an error: a full disk needs the room
