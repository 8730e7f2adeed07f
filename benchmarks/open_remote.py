"""open_remote: from nothing to a header in use, over HTTP with latency, beside tiffslide over fsspec as it comes."""

from collections.abc import Iterator
from functools import partial

import fsspec
from tiffslide import TiffSlide

from benchmarks import inputs
from benchmarks.measure import Line
from benchmarks.remote import LATENCY_S, median_costs, served
from udfs.wsi import open_slide


def run() -> Iterator[Line]:
    """A line for each slide: the pyramid, and an Aperio scan of 2 GB as two kinds of writers order its directories."""
    slides = {"pyramid": inputs.pyramid(), "svs_libtiff": inputs.svs("libtiff"), "svs_tifffile": inputs.svs("tifffile")}
    with served(inputs.FOLDER) as server:
        for name, path in slides.items():
            url = f"{server.url}/{path.name}"
            costs = median_costs(server, {"ours": partial(_slidelake, url), "tiffslide": partial(_tiffslide, url)})
            yield {
                "slide": name,
                "latency_ms": 1000 * LATENCY_S,
                **costs["ours"].line(),
                **costs["tiffslide"].line("tiffslide_"),
                "vs_tiffslide": costs["tiffslide"].seconds / costs["ours"].seconds,
            }


def _slidelake(url: str) -> None:
    with open_slide(url) as slide:
        _ = slide.levels, slide.mpp_x


def _tiffslide(url: str) -> None:
    with TiffSlide(fsspec.open(url)) as slide:
        _ = slide.level_dimensions, slide.properties
