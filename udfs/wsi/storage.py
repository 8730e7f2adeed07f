"""Bytes of a file behind any fsspec URI: what it is, whether it changed, ranges of it. Secrets never leave here in a text."""

import io
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, cast
from urllib.parse import unquote, urlsplit, urlunsplit

import fsspec
from fsspec.core import url_to_fs
from fsspec.implementations.local import LocalFileSystem
from tenacity import Retrying, retry_if_exception, stop_after_attempt, wait_exponential, wait_random

from udfs.wsi.errors import ErrorCode, SlideError

StorageOptions = Mapping[str, Any]

_HEADER_READAHEAD = 256 * 1024  # bytes; directories of a slide lie close together
_FETCH_ATTEMPTS = 4
_VERSION_KEYS = (
    *("ETag", "etag", "md5Hash", "Content-MD5", "Digest"),
    *("mtime", "LastModified", "last_modified", "Last-Modified", "updated", "created"),
)


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


class File:
    """One file, opened by URI; hands out byte ranges with retries."""

    def __init__(self, uri: str, storage_options: StorageOptions | None = None) -> None:
        """Ask the store for the file's size.

        Raises:
            SlideError: `file_missing`, `access_denied`, `read_failed` or `file_empty`.
        """
        self.uri = public_uri(uri)
        self._secrets = secrets_of(uri, storage_options)
        try:
            self._fs, self._path = url_to_fs(uri, **dict(storage_options or {}))
            info = self._retrying()(self._fs.info, self._path)
        except Exception as error:
            raise self._translate(error) from None
        if info.get("type") == "directory":
            raise SlideError(ErrorCode.NOT_A_SLIDE, f"{self.uri} is a folder: give the URI of a slide file")
        self.info = FileInfo.from_fsspec(info)
        if self.info.size_bytes == 0:
            raise SlideError(ErrorCode.FILE_EMPTY, f"{self.uri} has 0 bytes: upload it again")

    def open(self) -> BinaryIO:
        """A seekable stream for the header."""
        try:
            if isinstance(self._fs, LocalFileSystem):
                return open(self._path, "rb")  # the slide closes it
            return cast(BinaryIO, io.BufferedReader(_RangeStream(self)))
        except Exception as error:
            raise self._translate(error) from None

    def ranges(self, starts: Sequence[int], counts: Sequence[int]) -> list[bytes]:
        """The bytes [start, start + count) of each pair, in one call to the store.

        Raises:
            SlideError: `file_truncated` where the file ends before a range does, else as the constructor.
        """
        ends = [start + count for start, count in zip(starts, counts, strict=True)]
        try:
            parts: list[bytes] = self._retrying()(
                self._fs.cat_ranges, [self._path] * len(starts), list(starts), ends, on_error="raise"
            )
        except Exception as error:
            raise self._translate(error) from None
        for start, count, part in zip(starts, counts, parts, strict=True):
            if len(part) < count:
                raise SlideError(
                    ErrorCode.FILE_TRUNCATED,
                    f"{self.uri} ends {count - len(part)} bytes into a block at byte {start}: upload it again",
                )
            if len(part) > count:
                raise SlideError(
                    ErrorCode.READ_FAILED, f"{self.uri}: its server ignores byte ranges: put the slide in another store"
                )
        return parts

    def redact(self, text: str) -> str:
        """The text without any secret of this file's URI or storage options."""
        return redact(text, self._secrets)

    def _retrying(self) -> Retrying:
        return Retrying(
            retry=retry_if_exception(_may_pass),
            stop=stop_after_attempt(_FETCH_ATTEMPTS),
            wait=wait_exponential(multiplier=0.2, max=5.0) + wait_random(0, 0.5),
            reraise=True,
        )

    def _translate(self, error: Exception) -> SlideError:
        if isinstance(error, SlideError):
            return error
        if isinstance(error, FileNotFoundError):
            return SlideError(ErrorCode.FILE_MISSING, f"nothing at {self.uri}: check slides.root and the CSV's uri")
        text = redact(f"{type(error).__name__}: {error}", self._secrets)
        if isinstance(error, PermissionError) or re.search(r"\b40[13]\b", text):
            remedy = "check the credentials in slides.storage_options"
            return SlideError(ErrorCode.ACCESS_DENIED, f"{self.uri}: {text}; {remedy}")
        if isinstance(error, ImportError | ValueError):
            remedy = "check the URI's protocol, and that its fsspec package (adlfs, s3fs, gcsfs) is installed"
            return SlideError(ErrorCode.READ_FAILED, f"{self.uri}: {text}; {remedy}")
        return SlideError(ErrorCode.READ_FAILED, f"{self.uri}: {text}; run again with --retry-failed")


class _RangeStream(io.RawIOBase):
    """A file of a store as a stream, for its header: retries and errors are those of `File.ranges`."""

    def __init__(self, file: File) -> None:
        self._file = file
        self._at = 0
        self._parts: dict[int, bytes] = {}  # by number; directories lie close together, so these stay few

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._at = offset + (0, self._at, self._file.info.size_bytes)[whence]
        return self._at

    def readinto(self, buffer: Any) -> int:
        number, skip = divmod(self._at, _HEADER_READAHEAD)
        start, size = number * _HEADER_READAHEAD, self._file.info.size_bytes
        if self._at >= size:
            return 0
        if number not in self._parts:
            [self._parts[number]] = self._file.ranges([start], [min(_HEADER_READAHEAD, size - start)])
        data = self._parts[number][skip : skip + len(buffer)]
        buffer[: len(data)] = data
        self._at += len(data)
        return len(data)


def _may_pass(error: BaseException) -> bool:
    """Whether a second try can help: not where the store gave a definite answer, nor for a fault of ours."""
    status = getattr(error, "status", None) or getattr(error, "status_code", None)  # aiohttp's, Azure's
    if isinstance(status, int):
        return status >= 500 or status in (408, 429)
    definite = (FileNotFoundError, PermissionError, IsADirectoryError, NotADirectoryError)
    ours = (ImportError, ValueError, TypeError, AttributeError, LookupError, NotImplementedError, MemoryError)
    # Clients of HTTP and Azure raise dropped connections as classes of their own, no OSError among them.
    return isinstance(error, Exception) and not isinstance(error, definite + ours)


def read_bytes(uri: str, storage_options: StorageOptions | None = None) -> bytes:
    """A whole small file (a checkpoint, a CSV). Raises what fsspec raises."""
    with fsspec.open(uri, "rb", **dict(storage_options or {})) as stream:
        data: bytes = stream.read()
    return data


def absolute_uri(uri: str) -> str:
    """A plain path made absolute, for processes that run elsewhere; a URI as it is."""
    return uri if "://" in uri else str(Path(uri).absolute())


def public_uri(uri: str) -> str:
    """The URI without user, password, query and fragment, fit for tables and logs.

    Plain paths are kept as they are, even with ``?`` or ``#`` in a name.
    """
    if "::" in uri and "://" in uri:  # fsspec's chains: simplecache::https://..., zip://a.svs::s3://...
        return "::".join(public_uri(link) for link in uri.split("::"))
    if "://" not in uri:
        return uri
    parts = urlsplit(uri)
    # In abfss://container@account and the like, what precedes the @ is a container unless it holds a password.
    user, at, host = parts.netloc.rpartition("@")
    netloc = host if ":" in user or parts.scheme in ("http", "https", "ftp", "sftp") else f"{user}{at}{host}"
    return urlunsplit((parts.scheme, netloc, parts.path, "", ""))


def secrets_of(uri: str | None, storage_options: StorageOptions | None) -> tuple[str, ...]:
    """Every text in a URI or in storage options that must not be shown, longest first."""
    found: set[str] = set()

    def collect(value: Any) -> None:
        if isinstance(value, Mapping):
            for item in value.values():
                collect(item)
        elif isinstance(value, list | tuple):
            for item in value:
                collect(item)
        elif not isinstance(value, bool) and len(str(value)) >= 6:  # a password of digits is a number in YAML
            found.add(str(value))

    collect(storage_options or {})
    for link in (uri or "").split("::"):
        if "://" not in link:
            continue
        parts = urlsplit(link)
        found.update(text for text in (parts.query, parts.fragment, parts.password or "") if text)
        found.update(text for text in re.split(r"[&=]", parts.query) if len(text) >= 16)
    found |= {unquote(text) for text in found}  # errors of HTTP clients show them decoded
    return tuple(sorted(found, key=len, reverse=True))


def redact(text: str, secrets: Sequence[str]) -> str:
    """The text with every secret replaced by ``***``, and without the queries of URLs, which clients quote anew."""
    text = re.sub(r"(://[^\s'\"<>?#]*)[?#][^\s'\"<>)]*", r"\1", text)
    for secret in secrets:
        text = text.replace(secret, "***")
    return text
