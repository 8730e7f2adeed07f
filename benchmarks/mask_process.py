"""One look at one slide, `python -m benchmarks.mask_process READER PATH`: tissue, seconds and peak memory as JSON.

slidelake runs `find_tissue` on one row: header, 1/16, mask, grid. libvips makes the 1/16 and the mask only, from the same
level. Each imports its own libraries and no others, so that the peak is its own.
"""
# ruff: noqa: PLC0415

import json
import sys
from collections.abc import Callable
from typing import Any

from benchmarks.measure import peak_bytes, seconds

_TILE_PX, _DOWNSAMPLE, _BRIGHTNESS, _MAX_BACKGROUND = 448, 16, 190, 0.10
_LEVEL_1 = 4  # downsample of the second level, where there is one

Look = Callable[[], dict[str, Any]]


def slidelake(path: str) -> Look:
    """What a Python worker of the slides pass does."""
    import pandas as pd

    from udfs.slides import TissueSpec, find_tissue

    unknown = ("center_id", "image_num", "label", "mpp", "error_code", "error_message", "params_hash", "file_version")
    row = dict.fromkeys(unknown) | {"image_id": "bench", "patient_id": "bench", "uri": path, "size_bytes": 0}
    spec = TissueSpec(_TILE_PX, None, _DOWNSAMPLE, _BRIGHTNESS, _MAX_BACKGROUND)

    def look() -> dict[str, Any]:
        (found,) = find_tissue(spec, "bench")([pd.DataFrame([row], dtype=object)])
        slide = found.iloc[0]
        if slide["status"] != "ok":
            raise AssertionError(slide["error_message"])
        return {"tissue": slide["tissue_fraction"], "px": f"{slide['width_px']}x{slide['height_px']}"}

    return look


def libvips(path: str) -> Look:
    """The same mask by libvips, streaming."""
    import pyvips

    def look() -> dict[str, Any]:
        image = pyvips.Image.new_from_file(path, access="sequential")
        px, edge = f"{image.width}x{image.height}", _DOWNSAMPLE
        if image.get("n-pages") > 1:
            image, edge = pyvips.Image.new_from_file(path, access="sequential", page=1), _DOWNSAMPLE // _LEVEL_1
        small = image.shrink(edge, edge).numpy()
        return {"tissue": float(1 - (small.min(axis=-1) > _BRIGHTNESS).mean()), "px": px}

    return look


def main(reader: str, path: str) -> None:
    """Prepare, look once by the clock, print."""
    look = {"slidelake": slidelake, "libvips": libvips}[reader](path)
    result: dict[str, Any] = {}
    taken = seconds(lambda: result.update(look()))
    print(json.dumps(result | {"seconds": taken, "peak_bytes": peak_bytes()}))


if __name__ == "__main__":
    main(*sys.argv[1:])
