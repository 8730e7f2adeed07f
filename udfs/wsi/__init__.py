"""Whole-slide images without Spark: open a slide, find tissue, read tiles, normalise stain, embed, count colours.

NumPy in, NumPy out. Nothing here imports Spark, Arrow or pandas, so the same code serves jobs, notebooks and training loops.

`docs/glossary.md` has the terms: level, downsample, mpp, block, tile. ``x_px, y_px`` are always level-0 pixels.
"""

from typing import TYPE_CHECKING, Any

from udfs.wsi.errors import ErrorCode, SlideError

if TYPE_CHECKING:
    from udfs.wsi.reading.slide import Slide, open_slide

__all__ = ["ErrorCode", "Slide", "SlideError", "open_slide"]


def __getattr__(name: str) -> Any:
    """Imports the reader, with its codecs, when somebody asks for it: `slidelake JOB --help` needs none."""
    if name not in ("Slide", "open_slide"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from udfs.wsi.reading import slide  # noqa: PLC0415

    return getattr(slide, name)
