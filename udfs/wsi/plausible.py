"""What a slide's header can truly say: a damaged one claims sizes that no scanner makes, an edited one the dpi of a screen."""

from typing import Any

from udfs.wsi.errors import ErrorCode, SlideError

_MAX_EDGE_PX = 1_000_000
_MAX_AREA_PX = 60_000_000_000  # 245,000 px squared; at 1/16 this takes 700 MB
_MPP_RANGE = (0.02, 20.0)  # um/px; outside lie the 72 and 96 dpi of image editors, not scanners


def check_size(uri: str, width_px: int, height_px: int) -> None:
    """Refuse a level 0 that no scanner makes.

    Raises:
        SlideError: `size_implausible`.
    """
    if max(width_px, height_px) > _MAX_EDGE_PX or width_px * height_px > _MAX_AREA_PX:
        raise SlideError(
            ErrorCode.SIZE_IMPLAUSIBLE,
            f"{uri}: the header claims {width_px} x {height_px} px, over the limit of {_MAX_EDGE_PX} px a side and "
            f"{_MAX_AREA_PX} px in all: the header is damaged; upload or export the slide again",
        )


def plausible_spacing(x: Any, y: Any) -> tuple[float, float] | None:
    """Micrometres a pixel along both axes; an axis that is not given (None) is as long as the other.

    None if neither is given, or what is given can't be true.
    """
    given = [plausible_mpp(value) for value in (x, y) if value is not None]
    mpp = [value for value in given if value is not None]
    return (mpp[0], mpp[-1]) if mpp and len(mpp) == len(given) else None


def plausible_mpp(value: Any) -> float | None:
    """Micrometres a pixel as a number, None where it is none or can't be true."""
    try:
        mpp = float(value)
    except (TypeError, ValueError):
        return None
    return mpp if _MPP_RANGE[0] <= mpp <= _MPP_RANGE[1] else None
