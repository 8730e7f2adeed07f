"""One file behind any fsspec URI: what it is, whether it changed, and ranges of its bytes, many of them on their way at once."""

import asyncio
import os
from collections.abc import Awaitable, Callable, Mapping, Sequence
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache
from time import perf_counter
from typing import Any, Protocol

import fsspec
from fsspec import AbstractFileSystem
from fsspec.asyn import AsyncFileSystem
from fsspec.core import url_to_fs
from fsspec.implementations.asyn_wrapper import AsyncFileSystemWrapper
from fsspec.implementations.local import LocalFileSystem
from tenacity import AsyncRetrying, retry_if_exception, stop_after_attempt, wait_exponential, wait_random

from udfs.wsi.errors import ErrorCode, SlideError
from udfs.wsi.store.faults import ShortReadError, as_slide_error, cause_of, may_pass, status_of
from udfs.wsi.store.link import Link
from udfs.wsi.store.uris import StorageOptions, options_for, public_uri, redact, secrets_of, store_of

ATTEMPTS = 7  # at a request, some 15 s of waiting between them in all
FIRST_WAIT_S = 0.2  # before the second attempt, doubled before each further one
DEADLINE_S = 60.0  # for an answer, after which a connection is taken for hung
_AT_ONCE = 32  # requests of one file under way
_NO_SUCH_RANGE = 416  # HTTP's: the file ends before it

_LOCAL_GAP_BYTES = 32 * 1024  # a system call and a seek of a disk's cache cost about as much as reading this
_VERSION_KEYS = (
    *("ETag", "etag", "md5Hash", "Content-MD5", "Digest"),
    *("mtime", "LastModified", "last_modified", "Last-Modified", "updated", "created"),
)

_links: dict[str, Link] = {}  # by store: what one slide taught serves the next


@dataclass(frozen=True)
class FileInfo:
    """A file at one moment. `version` changes whenever its content may have: the store's etag, else size and mtime."""

    size_bytes: int
    version: str

    @classmethod
    def from_fsspec(cls, info: Mapping[str, Any]) -> "FileInfo":
        """From what `fs.info`, `fs.ls` and `fs.find` give; each store has its own word for the same thing."""
        size = int(info["size"])
        for key in _VERSION_KEYS:
            if info.get(key):
                return cls(size, f"{size}-{str(info[key]).strip(chr(34))}")
        return cls(size, str(size))


@dataclass
class Traffic:
    """What reading cost: requests (each attempt counts), bytes that came, seconds that somebody waited for them."""

    requests: int = 0
    bytes: int = 0
    waited_s: float = 0.0

    def __add__(self, other: "Traffic") -> "Traffic":
        return Traffic(self.requests + other.requests, self.bytes + other.bytes, self.waited_s + other.waited_s)


class Pending(Protocol):
    """Bytes on their way."""

    def result(self) -> bytes:
        """Wait for them; raises SlideError."""

    def cancel(self) -> None:
        """They are not wanted any more."""


@lru_cache(maxsize=16)
def _asynchronous(fs: AbstractFileSystem, _process: int) -> AsyncFileSystemWrapper:
    """Made once a filesystem and process, whose loop it runs on: its constructor takes longer than reading a tile."""
    return AsyncFileSystemWrapper(fs, asynchronous=False)


class File:
    """One file, opened by URI."""

    info: FileInfo
    traffic: Traffic

    def __init__(self, uri: str, storage_options: StorageOptions | None = None, info: FileInfo | None = None) -> None:
        """Ask the store for the file's size and version, unless they are given.

        Raises:
            SlideError: `file_missing`, `access_denied`, `read_failed`, `not_a_slide` (a folder) or `file_empty`.
        """
        self.uri = public_uri(uri)
        self.traffic = Traffic()
        self._secrets = secrets_of(uri, storage_options)
        self._link = _links.setdefault(store_of(uri), Link())
        self._descriptor: int | None = None
        self._under_way: set[Future[Any]] = set()
        try:
            fs, self._path = url_to_fs(uri, **options_for(uri, storage_options))
        except Exception as error:
            raise self._translate(error) from None
        with suppress(AttributeError):  # Azure's client waits 15 s before a second try; adlfs has no setting for it
            fs._timeout_kwargs.setdefault("retry_total", 0)
        self.is_local = isinstance(fs, LocalFileSystem)
        # Only what was made for it may be asked for several things at once.
        self._slots = asyncio.Semaphore(_AT_ONCE if isinstance(fs, AsyncFileSystem) else 1)
        # On fsspec's loop also where the caller runs one of its own, as notebooks do.
        self._fs: Any = fs if isinstance(fs, AsyncFileSystem) else _asynchronous(fs, os.getpid())
        self._local = fs if self.is_local else None
        self.info = info or self._ask()

    @property
    def gap_bytes(self) -> int:
        """Between two wanted ranges, the gap up to which one request for both is the cheaper way."""
        return _LOCAL_GAP_BYTES if self.is_local else self._link.gap_bytes

    def request(self, start: int, count: int) -> Pending:
        """Begin to bring the bytes [start, start + count); its result raises SlideError.

        `file_truncated` where the file ends before the range does, else as the constructor.
        """
        if start + count > self.info.size_bytes:
            missing = start + count - self.info.size_bytes
            raise SlideError(
                ErrorCode.FILE_TRUNCATED,
                f"{self.uri} ends {missing} bytes into a block at byte {start}: upload it again",
            )
        if self.is_local:
            return _LocalRequest(self, start, count)
        return _RemoteRequest(self, self._submit(lambda: self._bring(start, count)))

    def ranges(self, starts: Sequence[int], counts: Sequence[int]) -> list[bytes]:
        """The bytes [start, start + count) of each pair, brought all at once; see `request`."""
        pending = [self.request(start, count) for start, count in zip(starts, counts, strict=True)]
        return [request.result() for request in pending]

    def check_unchanged(self) -> Callable[[], None]:
        """Ask whether this is still the file of `info`; what is returned waits for the answer.

        Raises:
            SlideError: `file_changed`, when the answer is waited for.
        """
        asked: Future[Any] | None = None if self.is_local else self._submit(self._info)

        def wait() -> None:
            now = self._ask(asked)
            if now != self.info:
                raise SlideError(
                    ErrorCode.FILE_CHANGED,
                    f"{self.uri} was replaced since its header was read ({self.info.version} became {now.version}): run again",
                )

        return wait

    def redact(self, text: str) -> str:
        """The text without any secret of this file's URI or storage options."""
        return redact(text, self._secrets)

    def close(self) -> None:
        """Give back what is held, and give up what is on its way."""
        for future in tuple(self._under_way):
            future.cancel()
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None

    def _ask(self, asked: "Future[Any] | None" = None) -> FileInfo:
        begun = perf_counter()
        try:
            info = self._at_once() or (asked or self._submit(self._info)).result()
        except Exception as error:
            raise self._translate(error) from None
        finally:
            self.traffic.waited_s += perf_counter() - begun
        if info.get("type") == "directory":
            raise SlideError(ErrorCode.NOT_A_SLIDE, f"{self.uri} is a folder: give the URI of a slide file")
        if info.get("size") is None:
            raise SlideError(
                ErrorCode.READ_FAILED, f"{self.uri}: its server does not tell sizes: put the slide in another store"
            )
        found = FileInfo.from_fsspec(info)
        if found.size_bytes == 0:
            raise SlideError(ErrorCode.FILE_EMPTY, f"{self.uri} has 0 bytes: upload it again")
        return found

    def _at_once(self) -> Any:
        """What the local disk says, without the loop, which takes longer than a tile; None where it has to be asked again."""
        with suppress(OSError):
            return self._local.info(self._path) if self._local else None

    def _submit(self, call: Callable[[], Awaitable[Any]]) -> "Future[Any]":
        """Run it, with retries, on fsspec's own event loop, where the clients of stores live."""

        async def attempt() -> Any:
            async with self._slots:
                self.traffic.requests += 1
                return await asyncio.wait_for(call(), DEADLINE_S)

        retrying = AsyncRetrying(
            retry=retry_if_exception(may_pass),
            stop=stop_after_attempt(ATTEMPTS),
            wait=wait_exponential(multiplier=FIRST_WAIT_S, max=10.0) + wait_random(0, FIRST_WAIT_S),
            reraise=True,
        )
        future: Future[Any] = asyncio.run_coroutine_threadsafe(retrying(attempt), self._fs.loop)
        self._under_way.add(future)
        future.add_done_callback(self._under_way.discard)
        return future

    async def _info(self) -> Any:
        self._fs.invalidate_cache()  # listings that a client keeps would hide a replaced file
        begun = perf_counter()
        info = await self._fs._info(self._path)
        self._link.learn(0, perf_counter() - begun)
        return info

    async def _bring(self, start: int, count: int) -> bytes:
        begun = perf_counter()
        data: bytes = await self._fs._cat_file(self._path, start=start, end=start + count)
        self.traffic.bytes += len(data)
        if len(data) < count:
            raise ShortReadError(f"{len(data)} of {count} bytes came")
        if len(data) > count:
            raise SlideError(
                ErrorCode.READ_FAILED, f"{self.uri}: its server ignores byte ranges: put the slide in another store"
            )
        self._link.learn(count, perf_counter() - begun)
        return data

    def _pread(self, start: int, count: int) -> bytes:
        if self._descriptor is None:
            self._descriptor = os.open(self._path, os.O_RDONLY)
        return os.pread(self._descriptor, count, start)

    def _translate(self, error: Exception) -> SlideError:
        return as_slide_error(error, self.uri, self._secrets)

    def _translate_range(self, error: Exception) -> SlideError:
        """As `_translate`; where a store has fewer bytes than it said, the file may be another one by now."""
        if isinstance(error, ShortReadError) or status_of(error) == _NO_SUCH_RANGE:
            try:
                self.check_unchanged()()
            except SlideError as changed:
                return changed
        return self._translate(error)


class _LocalRequest:
    """Read when it is waited for: the disk is told before, so that it reads ahead by itself."""

    def __init__(self, file: File, start: int, count: int) -> None:
        self._file, self._start, self._count = file, start, count

    def result(self) -> bytes:
        file, begun = self._file, perf_counter()
        try:
            data = file._pread(self._start, self._count)
            if len(data) < self._count:  # cut short under our hands, or a network mount that gives what it has
                data += file._pread(self._start + len(data), self._count - len(data))
        except OSError as error:
            raise file._translate(error) from None
        if len(data) < self._count:
            missing = self._count - len(data)
            raise SlideError(
                ErrorCode.FILE_TRUNCATED,
                f"{file.uri} ends {missing} bytes into a block at byte {self._start}: upload it again",
            )
        file.traffic.requests += 1
        file.traffic.bytes += len(data)
        file.traffic.waited_s += perf_counter() - begun
        return data

    def cancel(self) -> None:
        """Nothing was begun."""


class _RemoteRequest:
    def __init__(self, file: File, future: "Future[bytes]") -> None:
        self._file, self._future = file, future

    def result(self) -> bytes:
        begun = perf_counter()
        try:
            return self._future.result()
        except Exception as error:
            raise self._file._translate_range(error) from None
        finally:
            self._file.traffic.waited_s += perf_counter() - begun

    def cancel(self) -> None:
        self._future.cancel()


def read_bytes(uri: str, storage_options: StorageOptions | None = None) -> bytes:
    """A whole small file (a checkpoint, a CSV). Raises what fsspec raises, FileNotFoundError only where there is none."""
    try:
        with fsspec.open(uri, "rb", **options_for(uri, storage_options)) as stream:
            data: bytes = stream.read()
    except FileNotFoundError as error:
        raise cause_of(error) from None
    return data
