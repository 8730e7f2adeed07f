"""Why a slide cannot be used: a code for machines, a message with the remedy for people."""

from enum import StrEnum


class ErrorCode(StrEnum):
    """What `slides.error_code` may hold. The README has the same table for users."""

    FILE_MISSING = "file_missing"  # nothing at the URI, or no file of that image_id under slides.root
    FILE_AMBIGUOUS = "file_ambiguous"  # several files under slides.root bear this image_id
    ACCESS_DENIED = "access_denied"  # the store refused the credentials
    READ_FAILED = "read_failed"  # the store or network failed, after retries
    FILE_EMPTY = "file_empty"  # zero bytes
    FILE_CHANGED = "file_changed"  # replaced while a run was reading it
    FILE_TRUNCATED = "file_truncated"  # the header points past the end of the file
    NOT_A_SLIDE = "not_a_slide"  # not a TIFF, whatever its name says
    HEADER_CORRUPT = "header_corrupt"  # a TIFF whose directory cannot be read or contradicts itself
    SIZE_IMPLAUSIBLE = "size_implausible"  # the header claims more pixels than any scanner makes
    UNSUPPORTED_FORMAT = "unsupported_format"  # a valid file of a kind that is not supported (16 bit, CMYK, ...)
    TILE_DATA_CORRUPT = "tile_data_corrupt"  # compressed data that does not decode
    MPP_UNKNOWN = "mpp_unknown"  # tiling.mpp is set, the slide's own is in neither header nor CSV
    MPP_TOO_COARSE = "mpp_too_coarse"  # the slide was scanned coarser than tiling.mpp
    EMBEDDING_NOT_FINITE = "embedding_not_finite"  # the encoder made NaN or infinity of a tile
    WORKER_DIED = "worker_died"  # the process died twice while it worked on this slide
    INTERNAL_ERROR = "internal_error"  # anything else: a fault of slidelake


class SlideError(Exception):
    """A slide that cannot be used. `code` is an `ErrorCode`, `message` names the thing, the number and the remedy."""

    def __init__(self, code: ErrorCode, message: str) -> None:
        super().__init__(code, message)  # both in args, so that it survives a pickle back from a worker
        self.code = code
        self.message = message

    def __str__(self) -> str:
        return f"{self.code.value}: {self.message}"


def damaged_header(what: str) -> SlideError:
    """Returns the error `header_corrupt`; `what` names the fault and its number."""
    remedy = "the header is damaged; upload the slide again, or export it anew"
    return SlideError(ErrorCode.HEADER_CORRUPT, f"{what}: {remedy}")
