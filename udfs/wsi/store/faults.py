"""What the errors of stores mean: which may pass, which are an answer, and what users are told."""

from collections.abc import Mapping, Sequence

from udfs.wsi.errors import ErrorCode, SlideError
from udfs.wsi.store.uris import redact

_GONE = (404, 410)


class ShortReadError(OSError):
    """A store sent fewer bytes than it was asked for and has."""


def status_of(error: BaseException) -> int | None:
    """The HTTP status that a store answered with, where a client tells it."""
    response = getattr(error, "response", None)  # botocore's is a mapping
    told = response.get("ResponseMetadata", {}).get("HTTPStatusCode") if isinstance(response, Mapping) else None
    # aiohttp's, Azure's, Amazon's
    statuses = (getattr(error, "status", None), getattr(error, "status_code", None), told)
    return next((status for status in statuses if isinstance(status, int)), None)


def cause_of(error: Exception) -> Exception:
    """Over HTTP, fsspec calls each failure to ask for a size FileNotFoundError, a refused connection too: then its cause."""
    cause = error.__cause__
    if not isinstance(error, FileNotFoundError) or not isinstance(cause, Exception):
        return error
    status = status_of(cause)
    missing = status in _GONE if status else not may_pass(cause)
    return error if missing else cause


def may_pass(error: BaseException) -> bool:
    """Whether a second try can help: not where the store gave a definite answer, nor for a fault of ours."""
    if isinstance(error, Exception):
        error = cause_of(error)
    status = status_of(error)
    if status:
        return status >= 500 or status in (408, 429)
    definite = (FileNotFoundError, PermissionError, IsADirectoryError, NotADirectoryError, SlideError)
    ours = (ImportError, ValueError, TypeError, AttributeError, LookupError, NotImplementedError, MemoryError)
    # Clients of HTTP and Azure raise dropped connections as classes of their own, no OSError among them.
    return isinstance(error, Exception) and not isinstance(error, definite + ours)


def as_slide_error(error: Exception, uri: str, secrets: Sequence[str]) -> SlideError:
    """The error of a store as users get it.

    Args:
        error: what the store's client raised.
        uri: the file's, without secrets.
        secrets: texts that must not be shown.
    """
    if isinstance(error, SlideError):
        return error
    error = cause_of(error)
    status = status_of(error)
    if isinstance(error, FileNotFoundError) or status in _GONE:
        return SlideError(ErrorCode.FILE_MISSING, f"nothing at {uri}: check slides.root and the CSV's uri")
    # Clients quote whole answers of a server; the first line says it.
    said = next((line.strip() for line in str(error).splitlines() if line.strip()), "no answer in time")
    text = redact(f"{type(error).__name__}: {said}", secrets)
    if isinstance(error, PermissionError) or status in (401, 403):
        remedy = "check the credentials in slides.storage_options, and whether they expired"
        return SlideError(ErrorCode.ACCESS_DENIED, f"{uri}: {text}; {remedy}")
    if isinstance(error, ImportError | ValueError):
        remedy = "check the URI's protocol, and that its fsspec package (adlfs, s3fs, gcsfs) is installed"
        return SlideError(ErrorCode.READ_FAILED, f"{uri}: {text}; {remedy}")
    return SlideError(ErrorCode.READ_FAILED, f"{uri}: {text}; run again with --retry-failed")
