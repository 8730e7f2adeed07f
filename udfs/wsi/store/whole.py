"""Small files behind any fsspec URI, read and written as a whole: settings, a CSV, weights."""

import os
from collections import deque
from collections.abc import Callable, Generator
from contextlib import suppress
from pathlib import Path

from fsspec.implementations.local import LocalFileSystem

from udfs.wsi.store.about import FileInfo, Traffic
from udfs.wsi.store.faults import NoRangesError, WrongAnswerError, unmasked
from udfs.wsi.store.file import Calls, Pending
from udfs.wsi.store.uris import StorageOptions, filesystem, timeout_of

_REQUEST_BYTES = 8 * 2**20
_REQUESTS_AHEAD = 4


def read_bytes(uri: str, storage_options: StorageOptions | None = None) -> bytes:
    """Returns the content of a file, read by ranges if it is large and its server knows them.

    Raises what the store's client raises, FileNotFoundError only if there is no file, OutOfTimeError after `timeout_s` of
    the storage options.
    """
    calls = Calls(uri, storage_options, Traffic())
    if calls.is_local:
        return Path(calls.path).read_bytes()
    try:
        info = calls.result(calls.info)
        if info.get("type") == "directory":
            raise IsADirectoryError(uri)
        size = info.get("size") or 0
        if size > _REQUEST_BYTES:
            with suppress(NoRangesError):
                data = b"".join(in_parts(lambda start, count: calls.request(start, count, size), size, _REQUEST_BYTES))
                if FileInfo.from_fsspec(calls.result(calls.info)) != FileInfo.from_fsspec(info):
                    raise WrongAnswerError("it was replaced while it was read: run again")
                return data
        return calls.result(lambda: calls.whole(size), timeout_of(storage_options))
    except FileNotFoundError as error:
        raise unmasked(error) from None
    finally:
        calls.close()


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
