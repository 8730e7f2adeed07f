"""Local copies of remote slides, each with the files that belong to it, in a folder of bounded size that processes share.

A copy is a folder named by what it holds and how many bytes that is; a copy under way bears the suffix .part. The lock in it is
shared by the processes that read the slide and exclusive while it is copied or removed; its time is that of the last use. The
kernel drops the locks of processes that die, so what they left behind is known by its free lock. (filelock has no shared locks
that threads and forked processes can hold.) A copy that is removed gets another name first: network disks keep a folder while
the lock in it is open.
"""

import fcntl
import hashlib
import os
import re
import shutil
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path
from uuid import uuid4

from filelock import FileLock

from udfs.wsi.errors import ErrorCode, SlideError
from udfs.wsi.host_cache import own_folder
from udfs.wsi.reading.companions import companions, path_in
from udfs.wsi.store import File, StorageOptions, Traffic, filesystem
from udfs.wsi.store.whole import in_parts

MAX_BYTES = 20 * 10**9  # of all copies together; half of what the disk has for them if that is less
REQUEST_BYTES = 8 * 2**20
_NAME = re.compile(r"[0-9a-f]{32}-[0-9]+(\.part)?")  # of a copy, whatever else lies in that folder
_REMOVED = re.compile(r"[0-9a-f]{32}-[0-9]+\.[0-9a-f]{32}")  # of a copy that is being removed
_LOCK = "use.lock"  # an empty file


@contextmanager
def staged(
    uri: str, storage_options: StorageOptions | None = None, kind: str | None = None, traffic: Traffic | None = None
) -> Iterator[Path]:
    """Yields a local path of a slide, good until the context ends: the slide's own if it is local, else that of a copy.

    Copies lie in the folder that the environment variable SLIDELAKE_STAGING names, else in the system's folder for
    temporary files. They serve later calls of any process until the room is needed: then the longest unused copies are
    removed, but none that is being read.

    `kind` is the slide's format, from `udfs.wsi.reading.foreign.sniff`: it decides which other files are copied too. The cost of
    all files is added to `traffic`, and the time that it has waited counts (see `File`). Raises SlideError: `read_failed` if the
    slide does not fit or the folder cannot be used, and what reading it raises.
    """
    file = File(uri, storage_options, traffic=traffic)
    if file.is_local:
        file.close()
        yield Path(filesystem(uri)[1])
        return
    name = path_in(uri).name
    files = {name: file, **companions(file, uri, storage_options, kind)}
    described = "\n".join(f"{name} {one.uri} {one.info.version}" for name, one in sorted(files.items()))
    size = sum(one.info.size_bytes for one in files.values())
    with ExitStack() as lock:
        try:
            root = own_folder("SLIDELAKE_STAGING", "staging")
            place = root / f"{hashlib.sha256(described.encode()).hexdigest()[:32]}-{size}"
            lock.enter_context(_whole_copy(place, files))
        except OSError as error:
            raise SlideError(
                ErrorCode.READ_FAILED,
                f"{file.uri} cannot be copied to this machine ({error}): free that disk, or name another folder in "
                "SLIDELAKE_STAGING",
            ) from None
        finally:
            for one in files.values():
                one.close()
        yield place / name


@contextmanager
def _whole_copy(place: Path, files: Mapping[str, File]) -> Iterator[None]:
    """Keeps the copy at `place` from being removed. Makes the copy first if there is none, or one that lost a file."""
    while True:
        with _locked(place, fcntl.LOCK_SH) as is_held:
            if is_held and _is_whole(place):
                now = time.time_ns()  # the kernel's own time of the change may be some milliseconds old
                os.utime(place / _LOCK, ns=(now, now))
                yield
                return
        with _locked(place, fcntl.LOCK_EX) as is_held:
            if is_held and not _is_whole(place):
                _remove(place)
        _copy_unless_another_process_does(place, files)


@contextmanager
def _locked(folder: Path, how: int) -> Iterator[bool]:
    """Holds the lock in a folder. False if the folder is removed, or if `how` has LOCK_NB and another process has the lock."""
    try:
        descriptor = os.open(folder / _LOCK, os.O_RDWR | os.O_CREAT, 0o600)
    except FileNotFoundError:
        yield False
        return
    try:
        try:
            fcntl.flock(descriptor, how)
            is_held = os.path.samestat(os.fstat(descriptor), (folder / _LOCK).stat())
        except (BlockingIOError, FileNotFoundError):
            is_held = False
        yield is_held
    finally:
        os.close(descriptor)


def _copy_unless_another_process_does(place: Path, files: Mapping[str, File]) -> None:
    part = place.with_suffix(".part")
    with ExitStack() as lock:
        with FileLock(place.with_name("room.lock")):  # one process makes room at a time, or two would take the same
            _remove_abandoned(place.parent)
            is_mine = not place.exists() and not part.exists()
            if is_mine:
                _make_room(place, next(iter(files.values())).uri)
                part.mkdir()  # from now on, the bytes that it is going to have are counted
                lock.enter_context(_locked(part, fcntl.LOCK_EX))
        if not is_mine:
            with _locked(part, fcntl.LOCK_SH):  # wait for the other process
                return
        try:
            for name, file in files.items():
                target = part / name
                target.parent.mkdir(parents=True, exist_ok=True)
                with (
                    target.open("wb") as copy,
                    closing(in_parts(file.request, file.info.size_bytes, REQUEST_BYTES)) as data,
                ):
                    copy.writelines(data)
                file.check_unchanged()()
            if not _is_whole(part):
                raise OSError(f"{part} lost some of its bytes")
            part.rename(place)
        except BaseException:
            shutil.rmtree(part, ignore_errors=True)
            raise


def _remove_abandoned(root: Path) -> None:
    """Removes what processes have left: copies under way without a held lock, and removed copies."""
    for entry in root.iterdir():
        if _REMOVED.fullmatch(entry.name):
            shutil.rmtree(entry, ignore_errors=True)
        elif _NAME.fullmatch(entry.name) and entry.suffix == ".part":
            _remove_unused(entry)


def _make_room(place: Path, uri: str) -> None:
    """Removes the copies that are the longest unused until a new one fits, but none that is in use."""
    root, size = place.parent, _size(place)
    entries = sorted((entry for entry in root.iterdir() if _NAME.fullmatch(entry.name)), key=_last_use)
    used = sum(map(_size, entries))
    bound = min(MAX_BYTES, (shutil.disk_usage(root).free + used) // 2)
    for entry in entries:
        if size <= bound < used + size and _remove_unused(entry):
            used -= _size(entry)
    if used + size > bound:
        raise SlideError(
            ErrorCode.READ_FAILED,
            f"{uri} takes {size:,} bytes, {root} may hold {bound:,} and {used:,} of them are in use: free that disk, "
            "read fewer slides at once, or name a folder on a larger disk in SLIDELAKE_STAGING",
        )


def _last_use(entry: Path) -> int:
    try:
        return (entry / _LOCK).stat().st_mtime_ns
    except FileNotFoundError:
        return 0


def _remove_unused(entry: Path) -> bool:
    """Removes a copy unless a process has it locked. Returns whether it is removed."""
    with _locked(entry, fcntl.LOCK_EX | fcntl.LOCK_NB) as is_held:
        if is_held:
            _remove(entry)
        return is_held


def _remove(entry: Path) -> None:
    """Removes a copy, first its name: a process that dies here leaves nothing that looks whole."""
    removed = entry.with_suffix(f".{uuid4().hex}")
    entry.rename(removed)
    shutil.rmtree(removed, ignore_errors=True)


def _is_whole(place: Path) -> bool:
    """Returns whether all bytes exist: those who clean folders of temporary files take single old files out of it."""
    return sum(path.stat().st_size for path in place.rglob("*") if path.is_file()) == _size(place)


def _size(place: Path) -> int:
    return int(place.stem.rpartition("-")[2])
