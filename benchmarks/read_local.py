"""read_local: all kept tiles of a local JPEG pyramid on one core, beside other readers and decoding alone."""

from collections.abc import Iterator

from benchmarks import inputs, peers
from benchmarks.measure import Line


def run() -> Iterator[Line]:
    """A line for each size of blocks."""
    for block_px, path in {256: inputs.pyramid(), 240: inputs.pyramid_240()}.items():
        yield {"block_px": block_px} | peers.compared(path, inputs.kept_tiles(path))
