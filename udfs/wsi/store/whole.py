"""Files behind any fsspec URI, read and written as a whole: settings, a CSV, weights."""

import os
import shutil
from collections import deque
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from fsspec.implementations.local import LocalFileSystem

from udfs.wsi.store.about import FileInfo, Traffic, has_etag
from udfs.wsi.store.faults import NoRangesError, WrongAnswerError, unmasked
from udfs.wsi.store.file import Calls, Pending
from udfs.wsi.store.uris import StorageOptions, absolute_uri, filesystem, public_uri, timeout_of

_REQUEST_BYTES = 8 * 2**20
_REQUESTS_AHEAD = 4


def content_key(uri: str, storage_options: StorageOptions | None = None) -> tuple[object, ...] | None:
    """Returns what names the present content of a file; None if its store does not tell versions apart.

    The key of a local file has its inode and the time of its last change: files of one size and mtime that are renamed over
    each other differ. The key of a remote file with an etag has no query: a URL that is signed anew names the same content.
    Raises what `read_bytes` does.
    """
    with _calls(uri, storage_options) as calls:
        if calls.is_local:
            stat = Path(calls.path).stat()
            return absolute_uri(uri), stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns
        described = _described(calls)
    info = FileInfo.from_fsspec(described)
    if info.version == str(info.size_bytes):
        return None
    return public_uri(uri) if has_etag(described) else absolute_uri(uri), info.version


def read_bytes(uri: str, storage_options: StorageOptions | None = None) -> bytes:
    """Returns the content of a file, read by ranges if it is large and its server knows them.

    Raises what the store's client raises, FileNotFoundError only if there is no file, OutOfTimeError after `timeout_s` of
    the storage options.
    """
    with _calls(uri, storage_options) as calls:
        if calls.is_local:
            return Path(calls.path).read_bytes()
        return b"".join(_content(calls, _info(calls), storage_options))


def copy_to(path: Path, uri: str, storage_options: StorageOptions | None = None) -> None:
    """Writes the content of a file to a path of this machine, without holding all of it.

    Raises what `read_bytes` raises, and WrongAnswerError if the copy has another size than the store says.
    """
    with _calls(uri, storage_options) as calls:
        if calls.is_local:
            source = Path(calls.path)
            before = FileInfo.from_stat(source.stat())
            shutil.copyfile(source, path)
            if FileInfo.from_stat(source.stat()) != before:
                raise _replaced()
        else:
            before = _info(calls)
            with path.open("wb") as file:
                file.writelines(_content(calls, before, storage_options))
        written = path.stat().st_size
        if before.size_bytes and written != before.size_bytes:  # 0: its store does not give sizes
            raise WrongAnswerError(f"{written:,} bytes arrived, its store says {before.size_bytes:,}: run again")


@contextmanager
def _calls(uri: str, storage_options: StorageOptions | None) -> Iterator[Calls]:
    calls = Calls(uri, storage_options, Traffic())
    try:
        yield calls
    except FileNotFoundError as error:
        raise unmasked(error) from None
    finally:
        calls.close()


def _info(calls: Calls) -> FileInfo:
    return FileInfo.from_fsspec(_described(calls))


def _described(calls: Calls) -> dict[str, Any]:
    info = calls.result(calls.info)
    if info.get("type") == "directory":
        raise IsADirectoryError(calls.path)
    return {**info, "size": info.get("size") or 0}


def _content(calls: Calls, info: FileInfo, storage_options: StorageOptions | None) -> Generator[bytes, None, None]:
    size, n_parts = info.size_bytes, 0
    if size > _REQUEST_BYTES:
        try:
            for part in in_parts(lambda start, count: calls.request(start, count, size), size, _REQUEST_BYTES):
                yield part
                n_parts += 1
            if _info(calls) != info:
                raise _replaced()
            return
        except NoRangesError:
            if n_parts:  # the whole file behind them would be another file
                raise WrongAnswerError(
                    "its server sends some byte ranges and ignores others: give the address of one server, not of several"
                ) from None
    yield calls.result(lambda: calls.whole(size), timeout_of(storage_options))


def _replaced() -> WrongAnswerError:
    return WrongAnswerError("it was replaced while it was read: run again")


def in_parts(request: Callable[[int, int], Pending], size_bytes: int, part_bytes: int) -> Generator[bytes, None, None]:
    """Yields the bytes of a file in order, with a few requests under way, which end with the file's `close`.

    `request` takes the first byte and a count.
    """
    pending = deque[Pending]()
    for start in range(0, size_bytes, part_bytes):
        pending.append(request(start, min(part_bytes, size_bytes - start)))
        if len(pending) == _REQUESTS_AHEAD:
            yield pending.popleft().result()
    while pending:
        yield pending.popleft().result()


def write_bytes(uri: str, data: bytes, storage_options: StorageOptions | None = None) -> None:
    """Makes `data` the content of a file, whatever it was before. Missing folders are made.

    Readers find the old content or the new: on a disk by renaming, in an object store because a put is whole.
    """
    fs, path = filesystem(uri, storage_options)
    if not isinstance(fs, LocalFileSystem):
        fs.pipe_file(path, data)
        return
    whole = Path(path)
    whole.parent.mkdir(parents=True, exist_ok=True)
    part = whole.with_name(f".{whole.name}.{os.getpid()}")
    with part.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())  # or a crash of the machine may leave the new name without content
    part.replace(whole)
