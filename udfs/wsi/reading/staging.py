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
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path, PurePosixPath
from urllib.parse import quote, unquote
from uuid import uuid4

from filelock import FileLock

from udfs.wsi.errors import ErrorCode, SlideError
from udfs.wsi.store import File, FileInfo, Pending, StorageOptions, Traffic, filesystem, secrets_of
from udfs.wsi.store.faults import OutOfTimeError, slide_error_of
from udfs.wsi.store.whole import in_parts

_MAX_BYTES = 20 * 10**9  # of all copies together; half of what the disk has for them if that is less
_REQUEST_BYTES = 8 * 2**20
_URLS = ("http://", "https://")
_NAME = re.compile(r"[0-9a-f]{32}-[0-9]+(\.part)?")  # of a copy, whatever else lies in that folder
_REMOVED = re.compile(r"[0-9a-f]{32}-[0-9]+\.[0-9a-f]{32}")  # of a copy that is being removed
_LOCK = "use.lock"  # an empty file
_INI_BYTES = 2**20  # more than any such text has
DICOM_HEAD_BYTES = 2**16  # the series stands before everything long
DICOM_SERIES = re.compile(rb"\x20\x00\x0e\x00UI..([0-9.]+)", re.DOTALL)  # (0020,000E), explicit VR, little-endian


_HAMAMATSU_NAMES = re.compile(
    # of several focal planes only the first, 0, is read
    r"^(?:MapFile|MacroImage|OptimisationFile|ImageFile(?:\((?:0|\d+,\d+|0,\d+,\d+)\))?)[ \t]*=[ \t]*(.+?)\s*$",
    re.MULTILINE,
)
_MIRAX_NAMES = re.compile(r"^(?:INDEXFILE|FILE_\d+)[ \t]*=[ \t]*(.+?)\s*$", re.MULTILINE)


@contextmanager
def staged(
    uri: str,
    storage_options: StorageOptions | None = None,
    kind: str | None = None,
    traffic: Traffic | None = None,
) -> Iterator[Path]:
    """A local path of a slide, good until the context ends: the slide's own if it is local, else the path of a copy.

    Copies lie in the folder that the environment variable SLIDELAKE_STAGING names, else in the system's folder for
    temporary files. They serve later calls of any process until the room is needed: then the longest unused copies are
    removed, but none that is being read.

    Args:
        uri: a path or any fsspec URI.
        storage_options: for fsspec.
        kind: the slide's format, from `udfs.wsi.reading.foreign.sniff`: it tells which other files are copied too.
        traffic: the cost of all files is added to it, and the time that it has waited counts (see `File`).

    Raises:
        SlideError: `read_failed` if the slide does not fit, and what reading it raises.
    """
    file = File(uri, storage_options, traffic=traffic)
    if file.is_local:
        file.close()
        yield Path(filesystem(uri)[1])
        return
    name = path_in(uri).name
    files = {name: file, **_companions(file, uri, storage_options, kind)}
    described = "\n".join(f"{name} {one.uri} {one.info.version}" for name, one in sorted(files.items()))
    size = sum(one.info.size_bytes for one in files.values())
    root = staging_folder()
    place = root / f"{hashlib.sha256(described.encode()).hexdigest()[:32]}-{size}"
    with ExitStack() as lock:
        try:
            lock.enter_context(_whole_copy(place, files))
        except OSError as error:
            raise SlideError(
                ErrorCode.READ_FAILED,
                f"{file.uri} can't be copied to {root} ({error}): free that disk, or name another folder in SLIDELAKE_STAGING",
            ) from None
        finally:
            for one in files.values():
                one.close()
        yield place / name


def staging_folder() -> Path:
    """Returns the folder of the copies, made if it is missing. Raises SlideError `read_failed` if it can't be used."""
    named = os.environ.get("SLIDELAKE_STAGING")
    root = Path(named) if named else Path(tempfile.gettempdir()) / f"slidelake-staging-{os.getuid()}"
    try:
        root.mkdir(mode=0o700, parents=True, exist_ok=True)
        if not named and root.lstat().st_uid != os.getuid():
            raise PermissionError("another user made it")  # anybody may, with this name in /tmp
    except OSError as error:
        raise SlideError(
            ErrorCode.READ_FAILED, f"{root} can't hold copies of slides ({error}): name a folder in SLIDELAKE_STAGING"
        ) from None
    return root


def path_in(uri: str) -> PurePosixPath:
    """Returns the path in a URI, decoded if the URI is a URL. In a chain, it is that of the first link that has one."""
    _, link, _ = _links(uri)
    return PurePosixPath(unquote(link.partition("?")[0]) if link.startswith(_URLS) else link)


def beside(uri: str, name: str) -> str:
    """Returns the URI of the file `name` (it may have folders) in the folder of another, with the same chain and query."""
    before, link, after = _links(uri)
    mark = query = ""
    if link.startswith(_URLS):
        link, mark, query = link.partition("?")
        name = quote(name)
    folder, slash, _ = link.rpartition("/")
    return f"{before}{folder}{slash}{name}{mark}{query}{after}"


def _links(uri: str) -> tuple[str, str, str]:
    """Splits a chain: what precedes its first link with a path, that link, what follows it."""
    if "://" not in uri:
        return "", uri, ""
    first, chain, rest = uri.partition("::")
    if "://" in first:
        return "", first, chain + rest
    before, link, after = _links(rest)  # simplecache::s3://...
    return first + chain + before, link, after


def _companions(file: File, uri: str, storage_options: StorageOptions | None, kind: str | None) -> dict[str, File]:
    """The other files, by their paths from the slide's folder, without those that are named but missing."""
    names: list[str] = []
    if kind == "DICOM":
        names = _series(file, uri, storage_options)
    elif kind in ("Hamamatsu VMS", "Hamamatsu VMU"):
        names = _HAMAMATSU_NAMES.findall(_text(file))
    elif kind == "MIRAX":
        folder = path_in(uri).stem
        ini = File(beside(uri, f"{folder}/Slidedat.ini"), storage_options, traffic=file.traffic)
        names = [f"{folder}/{name}" for name in ("Slidedat.ini", *_MIRAX_NAMES.findall(_text(ini)))]
    files = {}
    for name in names:
        path = PurePosixPath(name)
        if path.is_absolute() or ".." in path.parts:  # nothing that a slide says may lead out of its copy
            continue
        try:
            files[str(path)] = File(beside(uri, str(path)), storage_options, traffic=file.traffic)
        except SlideError as error:
            if error.code is not ErrorCode.FILE_MISSING:
                raise
    return files


def _text(file: File) -> str:
    [data] = file.ranges([0], [min(file.info.size_bytes, _INI_BYTES)])
    return data.decode("utf-8-sig", errors="replace")


def _series(file: File, uri: str, storage_options: StorageOptions | None) -> list[str]:
    """Names of the other files of a DICOM series. A folder may hold many; a file that does not name its series is taken."""
    own_name = path_in(uri).name
    try:
        listed = file.siblings()
    except Exception as error:
        failure = slide_error_of(error, file.uri, secrets_of(uri, storage_options))
        if failure.code is ErrorCode.ACCESS_DENIED or isinstance(error, OutOfTimeError):
            raise failure from None
        raise SlideError(
            ErrorCode.READ_FAILED,
            f"{file.uri}: its folder can't be listed for the other files of the series ({type(error).__name__}): "
            "put the slide in a store that lists folders",
        ) from None
    heads: dict[str, Pending] = {}
    for info in listed:
        other = path_in(info["name"])
        if info["type"] == "file" and other.suffix == PurePosixPath(own_name).suffix and info.get("size") != 0:
            known = FileInfo.from_fsspec(info) if info.get("size") else None
            sibling = File(beside(uri, other.name), storage_options, known, file.traffic)
            heads[other.name] = sibling.request(0, min(sibling.info.size_bytes, DICOM_HEAD_BYTES))
    # A file may refer to other series too, so one in common is enough.
    series = {name: set(DICOM_SERIES.findall(head.result())) for name, head in heads.items()}
    own = series.pop(own_name, set())
    return [name for name, theirs in series.items() if not own or not theirs or own & theirs]


@contextmanager
def _whole_copy(place: Path, files: Mapping[str, File]) -> Iterator[None]:
    """Keep the copy at `place` from being removed. Makes the copy first if there is none, or one that lost a file."""
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
    """Hold the lock in a folder. False if the folder is gone, or if `how` has LOCK_NB and another process has the lock."""
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
                _copy(file, target)
            if not _is_whole(part):
                raise OSError("not all of it arrived there")
            part.rename(place)
        except BaseException:
            shutil.rmtree(part, ignore_errors=True)
            raise


def _entries(root: Path) -> list[Path]:
    """The copies, whole or under way, the longest unused first."""

    def last_use(entry: Path) -> int:
        try:
            return (entry / _LOCK).stat().st_mtime_ns
        except FileNotFoundError:
            return 0

    return sorted((entry for entry in root.iterdir() if _NAME.fullmatch(entry.name)), key=last_use)


def _remove_abandoned(root: Path) -> None:
    """Remove what processes have left: copies under way that nobody has locked, and removed ones that are still there."""
    for entry in _entries(root):
        if entry.suffix == ".part":
            _remove_unused(entry)
    for entry in root.iterdir():
        if _REMOVED.fullmatch(entry.name):
            shutil.rmtree(entry, ignore_errors=True)


def _make_room(place: Path, uri: str) -> None:
    """Remove the copies that are the longest unused until a new one fits, but none that is in use."""
    root, size, entries = place.parent, _size(place), _entries(place.parent)
    used = sum(map(_size, entries))
    bound = min(_MAX_BYTES, (shutil.disk_usage(root).free + used) // 2)
    for entry in entries:
        if size <= bound < used + size and _remove_unused(entry):
            used -= _size(entry)
    if used + size > bound:
        raise SlideError(
            ErrorCode.READ_FAILED,
            f"{uri} takes {size:,} bytes, {root} may hold {bound:,} and {used:,} of them are in use: free that disk, "
            "read fewer slides at once, or name a folder on a larger disk in SLIDELAKE_STAGING",
        )


def _remove_unused(entry: Path) -> bool:
    """Remove a copy unless a process has it locked. Returns whether it is removed."""
    with _locked(entry, fcntl.LOCK_EX | fcntl.LOCK_NB) as is_held:
        if is_held:
            _remove(entry)
        return is_held


def _remove(entry: Path) -> None:
    """Remove a copy, first its name: a process that dies here leaves nothing that looks whole."""
    removed = entry.with_suffix(f".{uuid4().hex}")
    entry.rename(removed)
    shutil.rmtree(removed, ignore_errors=True)


def _copy(file: File, target: Path) -> None:
    with target.open("wb") as copy, closing(in_parts(file.request, file.info.size_bytes, _REQUEST_BYTES)) as parts:
        for data in parts:
            copy.write(data)
    file.check_unchanged()()


def _is_whole(place: Path) -> bool:
    """Whether all bytes are there: those who clean folders of temporary files take single old files out of it."""
    return sum(path.stat().st_size for path in place.rglob("*") if path.is_file()) == _size(place)


def _size(place: Path) -> int:
    return int(place.stem.rpartition("-")[2])
