"""One file behind any fsspec URI: its size and version, and ranges of its bytes, many of them under way at once."""

import asyncio
import os
from collections.abc import Awaitable, Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from stat import S_ISDIR
from time import perf_counter
from typing import Any, TypeVar

from fsspec import AbstractFileSystem
from fsspec.asyn import AsyncFileSystem
from fsspec.implementations.asyn_wrapper import AsyncFileSystemWrapper
from fsspec.implementations.local import LocalFileSystem
from tenacity import AsyncRetrying, retry_if_exception, stop_after_attempt, wait_exponential, wait_random

from udfs.wsi.errors import ErrorCode, SlideError
from udfs.wsi.store.about import FileInfo, Link, Traffic
from udfs.wsi.store.faults import (
    DISAGREEING,
    ContradictionError,
    OutOfTimeError,
    ShortReadError,
    WrongAnswerError,
    may_pass,
    slide_error_of,
    status_of,
)
from udfs.wsi.store.ranges import bring_range, strong_etag
from udfs.wsi.store.uris import StorageOptions, filesystem, public_uri, redact, secrets_of, store_of, timeout_of

ATTEMPTS = 7  # per request, with some 15 s of waiting between them in all
FIRST_WAIT_S = 0.2  # before the second attempt, doubled before each further one
DEADLINE_S = 60.0  # for an answer; after that, the connection counts as hung
_LEAST_BYTES_PER_S = 1e6  # a file that comes faster than this never runs out of time
_AT_ONCE = 32  # requests of one file under way
_NO_SUCH_RANGE = 416  # HTTP's: the file ends before it

_LOCAL_GAP_BYTES = 32 * 1024  # reading this costs about as much as a system call and a seek

_links: dict[str, Link] = {}  # by store: the estimates of one slide serve the next

T = TypeVar("T")


@dataclass(frozen=True)
class Pending:
    """Bytes on their way."""

    result: Callable[[], bytes]  # waits for them; raises SlideError
    cancel: Callable[[], object]  # they are not wanted any more


@lru_cache(maxsize=16)
def _asynchronous(fs: AbstractFileSystem, _process: int) -> AsyncFileSystemWrapper:
    # Made once per filesystem and process, whose loop it uses: its constructor takes longer than reading a tile.
    return AsyncFileSystemWrapper(fs, asynchronous=False)


class Calls:
    """Calls to the store of one file: each tried again if that may help, all together within a bound of time.

    The bound is `timeout_s` of the storage options, plus one second per MB received. Only time spent in waiting counts.
    Raises what the store's client raises. (The coroutines of fsspec's filesystems begin with _, as its documentation says.)
    """

    def __init__(self, uri: str, storage_options: StorageOptions | None, traffic: Traffic) -> None:
        """Opens the filesystem of a URI. Files that share a `traffic` share the bound of time."""
        self.traffic = traffic
        self._timeout_s = timeout_of(storage_options)
        self._under_way: set[Future[Any]] = set()
        self._etag: str | None = None
        self.link = _links.setdefault(store_of(uri), Link())
        fs, self.path = filesystem(uri, storage_options)
        self.is_local = isinstance(fs, LocalFileSystem)
        # Filesystems that are not asynchronous by themselves get one request at a time.
        self._slots = asyncio.Semaphore(_AT_ONCE if isinstance(fs, AsyncFileSystem) else 1)
        # On fsspec's loop even if the caller runs another, as notebooks do.
        self._fs: Any = fs if isinstance(fs, AsyncFileSystem) else _asynchronous(fs, os.getpid())

    def begin(self, call: Callable[[], Awaitable[T]], deadline_s: float | None = None) -> "Future[T]":
        """Runs a call on fsspec's event loop, on which the clients of stores live; `deadline_s` is that of one attempt."""

        async def attempt() -> T:
            async with self._slots:
                self.traffic.requests += 1
                return await asyncio.wait_for(call(), deadline_s or DEADLINE_S)

        retrying = AsyncRetrying(
            retry=retry_if_exception(may_pass),
            stop=stop_after_attempt(ATTEMPTS),
            wait=wait_exponential(multiplier=FIRST_WAIT_S, max=10.0) + wait_random(0, FIRST_WAIT_S),
            reraise=True,
        )
        future: Future[T] = asyncio.run_coroutine_threadsafe(retrying(attempt), self._fs.loop)
        self._under_way.add(future)
        future.add_done_callback(self._under_way.discard)
        return future

    def wait(self, future: "Future[T]") -> T:
        """Returns the result of a call that was begun; raises OutOfTimeError."""
        begun, traffic = perf_counter(), self.traffic
        left = self._timeout_s + traffic.bytes / _LEAST_BYTES_PER_S - traffic.waited_s
        try:
            return future.result(max(left, 0.0))
        except TimeoutError:
            if future.done():  # of the last attempt
                return future.result()
            future.cancel()
            waited_s = traffic.waited_s + perf_counter() - begun
            text = f"{traffic.bytes:,} bytes arrived in {waited_s:.0f} s of waiting"
            raise OutOfTimeError(f"{text}, slides.timeout_s is {self._timeout_s:g}") from None
        finally:
            traffic.waited_s += perf_counter() - begun

    def result(self, call: Callable[[], Awaitable[T]], deadline_s: float | None = None) -> T:
        """Runs a call and waits for its result."""
        return self.wait(self.begin(call, deadline_s))

    def request(self, start: int, count: int, size_bytes: int) -> Pending:
        """Begins to read the bytes [start, start + count) of the file, which has `size_bytes`."""
        future = self.begin(lambda: self._checked_range(start, count, size_bytes))
        return Pending(lambda: self.wait(future), future.cancel)

    def close(self) -> None:
        """Cancels the calls under way."""
        for future in tuple(self._under_way):
            future.cancel()

    async def info(self) -> Any:
        """Returns the store's description of the file, in fsspec's form."""
        self._fs.invalidate_cache()  # listings that a client keeps would hide a replaced file
        begun = perf_counter()
        info = await self._fs._info(self.path)
        self.link.learn(0, perf_counter() - begun)
        self._etag = self._etag or strong_etag(info.get("ETag") or info.get("etag"))
        return info

    async def siblings(self) -> Any:
        """Returns the store's listing of the file's folder, in fsspec's form."""
        self._fs.invalidate_cache()
        return await self._fs._ls(self.path.rpartition("/")[0], detail=True)

    async def whole(self, size_bytes: int) -> bytes:
        """Returns all of the file by one request. `size_bytes` is its least size; 0 if that is unknown."""
        data: bytes = await self._fs._cat_file(self.path)
        self.traffic.bytes += len(data)
        if len(data) < size_bytes:
            raise ShortReadError(f"{len(data):,} of {size_bytes:,} bytes arrived")
        return data

    async def _checked_range(self, start: int, count: int, size_bytes: int) -> bytes:
        begun = perf_counter()
        part = await bring_range(self._fs, self.path, start, count)
        n_bytes = len(part.data)
        self.traffic.bytes += n_bytes
        if n_bytes != count:
            fault = ShortReadError if n_bytes < count else WrongAnswerError
            raise fault(f"{n_bytes:,} bytes arrived, {count:,} were requested")
        if part.size_bytes not in (None, size_bytes):
            raise ContradictionError(f"its server reports {part.size_bytes:,} bytes, earlier {size_bytes:,}")
        self._etag = self._etag or part.etag
        if part.etag not in (None, self._etag):
            raise ContradictionError("its server sent parts of two versions of the file (their ETag differs)")
        self.link.learn(count, perf_counter() - begun)
        return part.data


class File:
    """One file, opened by URI."""

    def __init__(
        self,
        uri: str,
        storage_options: StorageOptions | None = None,
        info: FileInfo | None = None,
        traffic: Traffic | None = None,
    ) -> None:
        """Asks the store of a path or any fsspec URI for the file's size and version, unless `info` has them.

        The cost of reading is added to `traffic`. Files that share it share the bound of time (see `Calls`). Raises
        SlideError: `file_missing`, `access_denied`, `read_failed`, `not_a_slide` (a folder) or `file_empty`.
        """
        self.uri = public_uri(uri)
        self.traffic = Traffic() if traffic is None else traffic
        self._secrets = secrets_of(uri, storage_options)
        self._descriptor: int | None = None
        try:
            self._calls = Calls(uri, storage_options, self.traffic)
        except Exception as error:
            raise self._translate(error) from None
        self.is_local = self._calls.is_local
        self.info = info or self._ask()

    @property
    def gap_bytes(self) -> int:
        """The largest gap, in bytes, between two wanted ranges for which one request is cheaper than two."""
        return _LOCAL_GAP_BYTES if self.is_local else self._calls.link.gap_bytes

    def request(self, start: int, count: int) -> Pending:
        """Begins to read the bytes [start, start + count).

        Its result raises SlideError: `file_truncated` if the file ends before the range does, else as the constructor.
        """
        if start + count > self.info.size_bytes:
            raise self._truncated(start, start + count - self.info.size_bytes)
        if self.is_local:
            return Pending(lambda: self._read_local(start, count), lambda: None)
        pending = self._calls.request(start, count, self.info.size_bytes)

        def result() -> bytes:
            try:
                return pending.result()
            except Exception as error:
                # the store may contradict its own description because the file was replaced
                if isinstance(error, ShortReadError | ContradictionError) or status_of(error) == _NO_SUCH_RANGE:
                    self.check_unchanged()()
                raise self._translate(error) from None

        return Pending(result, pending.cancel)

    def ranges(self, starts: Sequence[int], counts: Sequence[int]) -> list[bytes]:
        """Returns the bytes [start, start + count) of each pair, read all at once; see `request`."""
        pending = [self.request(start, count) for start, count in zip(starts, counts, strict=True)]
        return [request.result() for request in pending]

    def siblings(self) -> Sequence[Mapping[str, Any]]:
        """Returns the store's listing of this file's folder, in fsspec's form; raises what the store's client raises."""
        listed: Sequence[Mapping[str, Any]] = self._calls.result(self._calls.siblings)
        return listed

    def check_unchanged(self) -> Callable[[], None]:
        """Asks whether this is still the file of `info`. Returns a function that waits for the answer.

        The function raises SlideError, `file_changed` if it is another file.
        """
        answer = None if self.is_local else self._calls.begin(self._calls.info)

        def wait() -> None:
            now = self._ask(answer)
            if now == self.info:
                return
            remedy = f"run again; {DISAGREEING}" if answer and now.size_bytes == self.info.size_bytes else "run again"
            text = f"was replaced since its header was read ({self.info.version} became {now.version}): {remedy}"
            raise SlideError(ErrorCode.FILE_CHANGED, f"{self.uri} {text}")

        return wait

    def redact(self, text: str) -> str:
        """Returns the text without any secret of this file's URI or storage options."""
        return redact(text, self._secrets)

    def close(self) -> None:
        """Closes the file and cancels its calls."""
        self._calls.close()
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None

    def _ask(self, answer: "Future[Any] | None" = None) -> FileInfo:
        try:
            if not self.is_local:
                info = self._calls.wait(answer) if answer else self._calls.result(self._calls.info)
                is_folder = info.get("type") == "directory"
                found = None if info.get("size") is None else FileInfo.from_fsspec(info)
            else:
                path = Path(self._calls.path)
                try:  # avoids the loop, which takes longer than reading a tile
                    stat = path.stat()
                except OSError:
                    stat = self._calls.result(lambda: asyncio.to_thread(path.stat))
                is_folder, found = S_ISDIR(stat.st_mode), FileInfo.from_stat(stat)
        except Exception as error:
            raise self._translate(error) from None
        if is_folder:
            raise SlideError(ErrorCode.NOT_A_SLIDE, f"{self.uri} is a folder: give the URI of a slide file")
        if found is None:
            text = f"{self.uri}: its server does not give sizes: put the slide in another store"
            raise SlideError(ErrorCode.READ_FAILED, text)
        if found.size_bytes == 0:
            raise SlideError(ErrorCode.FILE_EMPTY, f"{self.uri} has 0 bytes: upload it again")
        return found

    def _read_local(self, start: int, count: int) -> bytes:
        begun = perf_counter()
        try:
            if self._descriptor is None:
                self._descriptor = os.open(self._calls.path, os.O_RDONLY)
            data = os.pread(self._descriptor, count, start)
            # the file was cut short meanwhile, or a network mount gives what it has
            while len(data) < count and (more := os.pread(self._descriptor, count - len(data), start + len(data))):
                data += more
        except OSError as error:
            raise self._translate(error) from None
        if len(data) < count:
            self.check_unchanged()()
            raise self._truncated(start, count - len(data))
        self.traffic.requests += 1
        self.traffic.bytes += len(data)
        self.traffic.waited_s += perf_counter() - begun
        return data

    def _truncated(self, start: int, missing: int) -> SlideError:
        text = f"{self.uri} ends {missing} bytes into a block at byte {start}: upload it again"
        return SlideError(ErrorCode.FILE_TRUNCATED, text)

    def _translate(self, error: Exception) -> SlideError:
        return slide_error_of(error, self.uri, self._secrets)
