"""One look at one flat slide, `python -m benchmarks.mask_process READER PATH`: tissue, seconds and peak memory as JSON.

Each reader brings the slide to 1/16. It imports its own libraries and no others, so that the peak is its own.
"""
# ruff: noqa: PLC0415

import json
import sys
from collections.abc import Callable
from typing import Any

from numpy.typing import NDArray

from benchmarks.measure import peak_bytes, seconds

_DOWNSAMPLE, _BRIGHTNESS = 16, 190

Look = Callable[[], NDArray[Any]]


def slidelake(path: str) -> Look:
    """The core alone, without Spark's side."""
    from udfs.wsi import open_slide

    def look() -> NDArray[Any]:
        with open_slide(path) as slide:
            return slide.downsampled(_DOWNSAMPLE)

    return look


def pyvips_shrink(path: str) -> Look:
    """The same area average, streaming."""
    import pyvips

    def look() -> NDArray[Any]:
        image = pyvips.Image.new_from_file(path, access="sequential")
        small: NDArray[Any] = image.shrink(_DOWNSAMPLE, _DOWNSAMPLE).numpy()
        return small

    return look


def pyvips_resize(path: str) -> Look:
    """What people write: an area average to near the size, then Lanczos."""
    import pyvips

    def look() -> NDArray[Any]:
        image = pyvips.Image.new_from_file(path, access="sequential")
        small: NDArray[Any] = image.resize(1 / _DOWNSAMPLE).numpy()
        return small

    return look


def main(reader: str, path: str) -> None:
    """Prepare, look once by the clock, print."""
    look = {"slidelake": slidelake, "pyvips_shrink": pyvips_shrink, "pyvips_resize": pyvips_resize}[reader](path)
    looks: list[NDArray[Any]] = []
    taken = seconds(lambda: looks.append(look()))
    peak = peak_bytes()
    tissue = float(1 - (looks[0].min(axis=-1) > _BRIGHTNESS).mean())
    print(json.dumps({"tissue": tissue, "seconds": taken, "peak_bytes": peak}))


if __name__ == "__main__":
    main(*sys.argv[1:])
