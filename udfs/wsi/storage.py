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
from fsspec.registry import known_implementations
from tenacity import Retrying, retry_if_exception, stop_after_attempt, wait_exponential, wait_random

from udfs.wsi.errors import ErrorCode, SlideError

StorageOptions = Mapping[str, Any]

_HEADER_READAHEAD = 256 * 1024  # bytes; directories of a slide lie close together
_FETCH_ATTEMPTS = 4
_SHORTEST_SECRET = 6  # characters; what is shorter is a word of any text
_NETWORK_PROTOCOLS = ("http", "https", "ftp", "sftp")  # what precedes their @ is a credential, not a container
_GONE = (404, 410)
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


class StoreOptions(dict[str, Any]):
    """Storage options that know whose they are: those of the store of `root`, and of none beside it."""

    def __init__(self, options: Mapping[str, Any], root: str | None) -> None:
        super().__init__(options)
        self.root = root


def options_for(uri: str, options: StorageOptions | None) -> dict[str, Any]:
    """What of the options goes to the store of a URI: nothing to a plain path, nor to another store than theirs.

    az:// and abfss:// are one store. Options that know no store (slides.root is a path, or not set) go to any.
    """
    root = options.root if isinstance(options, StoreOptions) else None
    if "://" not in uri or (root and "://" in root and _store(root) != _store(uri)):
        return {}
    return dict(options or {})


def _store(uri: str) -> str:
    protocol = uri.rpartition("::")[2].partition("://")[0]
    return str(known_implementations.get(protocol, {}).get("class", protocol))


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
            self._fs, self._path = url_to_fs(uri, **options_for(uri, storage_options))
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
        error = _what_happened(error)
        status = _status(error)
        if isinstance(error, FileNotFoundError) or status in _GONE:
            return SlideError(ErrorCode.FILE_MISSING, f"nothing at {self.uri}: check slides.root and the CSV's uri")
        text = redact(f"{type(error).__name__}: {error}", self._secrets)
        if isinstance(error, PermissionError) or status in (401, 403):
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


def _status(error: BaseException) -> int | None:
    """The HTTP status that a store answered with, where a client tells it."""
    response = getattr(error, "response", None)  # botocore's is a mapping
    told = response.get("ResponseMetadata", {}).get("HTTPStatusCode") if isinstance(response, Mapping) else None
    statuses = (
        getattr(error, "status", None),
        getattr(error, "status_code", None),
        told,
    )  # aiohttp's, Azure's, Amazon's
    return next((status for status in statuses if isinstance(status, int)), None)


def _what_happened(error: Exception) -> Exception:
    """Over HTTP, fsspec calls each failure to ask for a size FileNotFoundError, a refused connection too: then its cause."""
    cause = error.__cause__
    if not isinstance(error, FileNotFoundError) or not isinstance(cause, Exception):
        return error
    status = _status(cause)
    missing = status in _GONE if status else not _may_pass(cause)
    return error if missing else cause


def _may_pass(error: BaseException) -> bool:
    """Whether a second try can help: not where the store gave a definite answer, nor for a fault of ours."""
    if isinstance(error, Exception):
        error = _what_happened(error)
    status = _status(error)
    if status:
        return status >= 500 or status in (408, 429)
    definite = (FileNotFoundError, PermissionError, IsADirectoryError, NotADirectoryError)
    ours = (ImportError, ValueError, TypeError, AttributeError, LookupError, NotImplementedError, MemoryError)
    # Clients of HTTP and Azure raise dropped connections as classes of their own, no OSError among them.
    return isinstance(error, Exception) and not isinstance(error, definite + ours)


def read_bytes(uri: str, storage_options: StorageOptions | None = None) -> bytes:
    """A whole small file (a checkpoint, a CSV). Raises what fsspec raises, FileNotFoundError only where there is none."""
    try:
        with fsspec.open(uri, "rb", **options_for(uri, storage_options)) as stream:
            data: bytes = stream.read()
    except FileNotFoundError as error:
        raise _what_happened(error) from None
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
    netloc = host if ":" in user or parts.scheme in _NETWORK_PROTOCOLS else f"{user}{at}{host}"
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
        elif (
            not isinstance(value, bool) and len(str(value)) >= _SHORTEST_SECRET
        ):  # a password of digits is a number in YAML
            found.add(str(value))

    collect(storage_options or {})
    for link in (uri or "").split("::"):
        if "://" not in link:
            continue
        parts = urlsplit(link)
        found.update(text for text in (parts.query, parts.fragment, parts.password or "") if text)
        found.update(text for text in re.split(r"[&=]", parts.query) if len(text) >= 16)
        if parts.scheme in _NETWORK_PROTOCOLS and len(parts.username or "") >= _SHORTEST_SECRET:
            found.add(str(parts.username))  # https://TOKEN@host
    found |= {unquote(text) for text in found}  # errors of HTTP clients show them decoded
    return tuple(sorted(found, key=len, reverse=True))


def redact(text: str, secrets: Sequence[str]) -> str:
    """The text with every secret replaced by ``***``, and without the queries of URLs, which clients quote anew."""
    text = re.sub(r"(://[^\s'\"<>?#]*)[?#][^\s'\"<>)]*", r"\1", text)
    for secret in secrets:
        text = text.replace(secret, "***")
    return text
