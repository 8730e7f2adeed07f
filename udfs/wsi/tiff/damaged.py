"""The error of a damaged header, which every reader of TIFF's directories may meet."""

from udfs.wsi.errors import ErrorCode, SlideError


def damaged(what: str) -> SlideError:
    """Returns the error `header_corrupt`; `what` names the fault and its number."""
    return SlideError(
        ErrorCode.HEADER_CORRUPT, f"{what}: the header is damaged; upload the slide again, or export it anew"
    )
