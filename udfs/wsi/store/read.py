"""Reading a small file behind any fsspec URI as a whole: settings, a CSV, weights."""

from collections import deque
from collections.abc import Callable, Generator
from contextlib import suppress
from pathlib import Path

from udfs.wsi.store.about import FileInfo, Traffic
from udfs.wsi.store.faults import NoRangesError, WrongAnswerError, cause_of
from udfs.wsi.store.file import Calls, Pending
from udfs.wsi.store.uris import StorageOptions, timeout_of

_REQUEST_BYTES = 8 * 2**20
_REQUESTS_AHEAD = 4


def read_bytes(uri: str, storage_options: StorageOptions | None = None) -> bytes:
    """The content of a file, by ranges if it is large and its server knows them.

    Raises what the store's client raises, FileNotFoundError only if there is none, OutOfTimeError after `timeout_s` of the
    storage options.
    """
    calls = Calls(uri, storage_options, Traffic())
    if calls.is_local:
        return Path(calls.path).read_bytes()
    try:
        info = calls.wait(calls.begin(calls.info))
        if info.get("type") == "directory":
            raise IsADirectoryError(uri)
        size = info.get("size") or 0
        if size > _REQUEST_BYTES:
            with suppress(NoRangesError):
                data = b"".join(in_parts(lambda start, count: _Range(calls, start, count, size), size, _REQUEST_BYTES))
                if FileInfo.from_fsspec(calls.wait(calls.begin(calls.info))) != FileInfo.from_fsspec(info):
                    raise WrongAnswerError("it was replaced while it was read: run again")
                return data
        return calls.wait(calls.begin(lambda: calls.whole(size), timeout_of(storage_options)))
    except FileNotFoundError as error:
        raise cause_of(error) from None
    finally:
        calls.close()


def in_parts(request: Callable[[int, int], Pending], size_bytes: int, part_bytes: int) -> Generator[bytes, None, None]:
    """The bytes of a file in order, of which a few parts are on their way at once; `request` takes first byte and count."""
    pending = deque[Pending]()
    try:
        for start in range(0, size_bytes, part_bytes):
            pending.append(request(start, min(part_bytes, size_bytes - start)))
            if len(pending) == _REQUESTS_AHEAD:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    finally:
        for one in pending:
            one.cancel()


class _Range:
    """A range on its way, with the errors of the store's client."""

    def __init__(self, calls: Calls, start: int, count: int, size_bytes: int) -> None:
        self._calls, self._future = calls, calls.begin(lambda: calls.range(start, count, size_bytes))

    def result(self) -> bytes:
        return self._calls.wait(self._future)

    def cancel(self) -> None:
        self._future.cancel()
