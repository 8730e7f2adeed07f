"""mask_pyramid: a pyramid at 1/16, averaged from its level at 1/4, beside libvips and decoding that level once."""

from collections.abc import Iterator
from functools import partial

import pyvips

from benchmarks import inputs, peers
from benchmarks.measure import Line, median_seconds
from udfs.wsi import open_slide

_LEVEL, _EDGE = 1, 4  # the nearest finer level, and how many of its pixels make one of the result


def run() -> Iterator[Line]:
    """One line."""
    path = str(inputs.pyramid())

    def ours() -> None:
        with open_slide(path) as slide:
            slide.downsampled(16)

    def libvips() -> None:
        level = pyvips.Image.new_from_file(path, access="sequential", page=_LEVEL)
        level.shrink(_EDGE, _EDGE).numpy()

    decode = partial(peers.decode, inputs.blocks(inputs.pyramid(), level=_LEVEL))
    taken = median_seconds({"ours": ours, "pyvips": libvips, "decode": decode})
    yield {
        "seconds": taken["ours"],
        "pyvips_seconds": taken["pyvips"],
        "one_read_seconds": taken["decode"],
        "vs_pyvips": taken["pyvips"] / taken["ours"],
        "of_one_read": taken["decode"] / taken["ours"],
    }
