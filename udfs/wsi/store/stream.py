"""A file of a store as a stream for parsers of headers: few, large requests, and no byte twice."""

import io
from typing import Any, BinaryIO, cast

from udfs.wsi.store.file import File

_LEAST, _MOST = 256 * 1024, 4 * 1024 * 1024  # bytes of one request
_CHUNK_SHARE = 1024  # a directory with its arrays takes up to about a thousandth of a slide
# Every level is a fourth of the one above it, and its directory stands before or after it: the directories of small levels,
# label and macro all lie at the end, which is read as a whole.
_TAIL_SHARE, _MOST_TAIL = 128, 16 * 1024 * 1024
_MOST_READ = 64 * 1024 * 1024  # at once: the offsets of a million blocks take 8 MB


def open_stream(file: File) -> BinaryIO:
    """Returns a seekable stream, which keeps what it reads from a store in memory until it is closed."""
    return cast(BinaryIO, _Buffered(_Stream(file), 64 * 1024))


class _Buffered(io.BufferedReader):
    """Refuses to read more at once than any header needs: a damaged header may ask for the whole slide."""

    def read(self, size: int | None = -1, /) -> bytes:
        return super().read(_checked(-1 if size is None else size))

    def readinto(self, buffer: Any, /) -> int:
        _checked(memoryview(buffer).nbytes)
        return super().readinto(buffer)


def _checked(count: int) -> int:
    if not 0 <= count <= _MOST_READ:
        raise ValueError(f"{count} bytes requested at once")
    return count


class _Stream(io.RawIOBase):
    def __init__(self, file: File) -> None:
        self._file, self._at, self._size = file, 0, file.info.size_bytes
        self._chunk = min(max(self._size // _CHUNK_SHARE, _LEAST), _MOST)
        self._tail = self._size - min(max(self._size // _TAIL_SHARE, _LEAST), _MOST_TAIL)
        self._parts: dict[int, bytes] = {}  # what is read, by the first byte

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        at = offset + (0, self._at, self._size)[whence]
        if at < 0:
            raise ValueError(f"byte {at} is before the file")
        self._at = at
        return at

    def readinto(self, buffer: Any) -> int:
        count = min(len(buffer), self._size - self._at)
        if count <= 0:
            return 0
        data = self._read(count) if self._file.is_local else self._kept(count)
        buffer[: len(data)] = data
        self._at += len(data)
        return len(data)

    def _read(self, count: int) -> bytes:
        return self._file.ranges([self._at], [count])[0]

    def _kept(self, count: int) -> bytes:
        """Returns at least one byte, from a part in memory or by one request up to the next part."""
        start = self._at
        for begin, part in self._parts.items():
            if begin <= start < begin + len(part):
                return part[start - begin : start - begin + count]
        ahead = min((begin for begin in self._parts if begin > start), default=self._size)
        end = ahead if start >= self._tail else min(start + max(count, self._chunk), ahead)
        self._parts[start] = self._read(end - start)
        return self._parts[start][:count]
