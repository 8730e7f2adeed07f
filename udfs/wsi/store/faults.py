"""What the errors of stores mean: which may pass, which are definite, and their words for users."""

import errno
from collections.abc import Mapping, Sequence

from udfs.wsi.errors import ErrorCode, SlideError
from udfs.wsi.store.uris import PublicUri, redact

DISAGREEING = "if nobody replaces it, servers behind one address disagree about it: give the address of one of them"

_GONE = (404, 410)
# What clients raise for options and URIs that they cannot use, unlike a store's answers.
_REFUSED = (ValueError, TypeError, AttributeError, LookupError, NotImplementedError)


class StoreError(Exception):
    """What a store did wrong, in words for users. No OSError, because aiohttp converts those that it sees."""


class ShortReadError(StoreError):
    """A store sent fewer bytes than requested, although it has them."""


class WrongAnswerError(StoreError):
    """A store sent something else than requested."""


class ContradictionError(WrongAnswerError):
    """A store contradicts the size or version that it gave before: the file was replaced, or the store is wrong."""


class NoRangesError(WrongAnswerError):
    """A store sends whole files only."""


class OutOfTimeError(StoreError):
    """Waiting for a store took longer than the settings allow."""


def status_of(error: BaseException) -> int | None:
    """Returns the HTTP status of a store's answer; None if the client does not give it."""
    response = getattr(error, "response", None)  # botocore's is a mapping
    amazons = response.get("ResponseMetadata", {}).get("HTTPStatusCode") if isinstance(response, Mapping) else None
    # the first is aiohttp's, the second Azure's
    statuses = (getattr(error, "status", None), getattr(error, "status_code", None), amazons)
    return next((status for status in statuses if isinstance(status, int)), None)


def unmasked(error: Exception) -> Exception:
    """Returns the cause of a FileNotFoundError if the file may exist; any other error as it is.

    Over HTTP, fsspec raises FileNotFoundError for every failure to ask for a size: also if the connection is refused, or
    the client cannot use an option.
    """
    cause = error.__cause__
    if not isinstance(error, FileNotFoundError) or not isinstance(cause, Exception):
        return error
    status = status_of(cause)
    # the cause in other stores is a look-up in a listing, or an error of the same kind
    missing = status in _GONE if status else isinstance(cause, LookupError) or _is_missing(cause)
    return error if missing else cause


def may_pass(error: BaseException) -> bool:
    """Returns whether a second try can help: not after a definite answer of the store, nor after a fault of ours."""
    if not isinstance(error, Exception):
        return False
    error = unmasked(error)
    if status := status_of(error):
        return status >= 500 or status in (408, 429)
    definite = (PermissionError, IsADirectoryError, NoRangesError, SlideError)
    ours = (ImportError, MemoryError, *_REFUSED)
    # Clients of HTTP and Azure raise classes of their own for dropped connections, which are no OSError.
    return not _is_missing(error) and not isinstance(error, definite + ours)


def _is_missing(error: BaseException) -> bool:
    is_loop = isinstance(error, OSError) and error.errno == errno.ELOOP  # a link to itself leads nowhere either
    return is_loop or isinstance(error, FileNotFoundError | NotADirectoryError)


_REMEDIES: tuple[tuple[type[Exception] | tuple[type[Exception], ...], str], ...] = (  # of the first kind that fits
    (ImportError, "install the fsspec package of the URI's protocol (adlfs, s3fs, gcsfs)"),
    (_REFUSED, "check slides.storage_options, and the protocol, user and password of the URI"),
    (OutOfTimeError, "run again with --retry-failed, and raise slides.timeout_s if the store is only slow"),
    (NoRangesError, "put the slide in another store"),
    (ContradictionError, f"run again with --retry-failed; {DISAGREEING}"),
    (Exception, "run again with --retry-failed"),
)


def slide_error_of(error: Exception, uri: PublicUri, secrets: Sequence[str]) -> SlideError:
    """Returns the error of the store of a file, from `uri`, in words for users and without `secrets`; a `SlideError` as it is."""
    if isinstance(error, SlideError):
        return error
    error = unmasked(error)
    status = status_of(error)
    if _is_missing(error) or status in _GONE:
        return SlideError(ErrorCode.FILE_MISSING, f"nothing at {uri}: check slides.root and the CSV's uri")
    # Clients quote a server's whole answer.
    first_line = next((line.strip() for line in str(error).splitlines() if line.strip()), "no answer in time")
    text = redact(first_line if isinstance(error, StoreError) else f"{type(error).__name__}: {first_line}", secrets)
    if isinstance(error, PermissionError) or status in (401, 403):
        remedy = "check the credentials in slides.storage_options, and whether they expired"
        return SlideError(ErrorCode.ACCESS_DENIED, f"{uri}: {text}; {remedy}")
    remedy = next(remedy for kinds, remedy in _REMEDIES if isinstance(error, kinds))
    return SlideError(ErrorCode.READ_FAILED, f"{uri}: {text}; {remedy}")
