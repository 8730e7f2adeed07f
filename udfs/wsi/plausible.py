"""Checks values of a slide's header: a damaged header has impossible sizes, an edited header the dpi of a screen."""

from typing import Any

from udfs.wsi.errors import ErrorCode, SlideError

_MAX_EDGE_PX = 1_000_000
_MAX_AREA_PX = 60_000_000_000  # 245,000 px squared; at 1/16 this takes 700 MB
MPP_RANGE = (0.02, 20.0)  # um/px; outside lie the 72 and 96 dpi of image editors, not scanners
MPP_WANTED = f"micrometres per pixel, {MPP_RANGE[0]:g} to {MPP_RANGE[1]:g}"


def check_size(uri: str, width_px: int, height_px: int) -> None:
    """Raises SlideError `size_implausible` if level 0 is larger than any scanner makes it."""
    if max(width_px, height_px) > _MAX_EDGE_PX or width_px * height_px > _MAX_AREA_PX:
        raise SlideError(
            ErrorCode.SIZE_IMPLAUSIBLE,
            f"{uri}: the header claims {width_px} x {height_px} px, over the limit of {_MAX_EDGE_PX} px per edge and "
            f"{_MAX_AREA_PX} px in all: the header is damaged; upload or export the slide again",
        )


def plausible_spacing(x: Any, y: Any) -> tuple[float, float] | None:
    """Returns um/px along x and y, for an axis that is None the other's; None if both are, or if a value is implausible."""
    given = [plausible_mpp(value) for value in (x, y) if value is not None]
    mpp = [value for value in given if value is not None]
    return (mpp[0], mpp[-1]) if mpp and len(mpp) == len(given) else None


def plausible_mpp(value: Any) -> float | None:
    """Returns um/px as a number; None if the value is no number or implausible."""
    try:
        mpp = float(value)
    except (TypeError, ValueError):
        return None
    return mpp if MPP_RANGE[0] <= mpp <= MPP_RANGE[1] else None
