"""read_local: all kept tiles of a local JPEG pyramid on one core, beside other readers and decoding alone.

In the sample's mosaic kept tiles lie in islands, so half of the blocks belong to one tile alone; in tissue without glass they
share them, as in most slides.
"""

from collections.abc import Iterator

from benchmarks import inputs, peers
from benchmarks.measure import Line


def run() -> Iterator[Line]:
    """A line for each slide."""
    slides = {"tissue": inputs.tissue(), "islands": inputs.pyramid(), "islands_240": inputs.pyramid_240()}
    for name, path in slides.items():
        yield {"slide": name, **peers.compared(path, inputs.kept_tiles(path))}
