"""A slide with the directories of a 2 GB scan and none of its pixels: tiles are holes of a sparse file.

For tests and benchmarks of opening. Written by `struct`, so that each directory lies where its kind of writer puts it.
"""

import io
import struct
from collections.abc import Callable, Iterator
from itertools import accumulate
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from tests.slides.atomic import whole_file

HUGE_SVS_LEVELS = tuple((110_000 >> level, 90_000 >> level) for level in range(8))
"""Width and height of the levels that `write_huge_svs` writes, pixels."""
HUGE_SVS_TILE_PX = 256
HUGE_SVS_MPP = 0.2525

_ASCII, _SHORT, _LONG, _UNDEFINED = 2, 3, 4, 7
_SIZES = {_ASCII: 1, _SHORT: 2, _LONG: 4, _UNDEFINED: 1}  # bytes a value
_JPEG, _LZW, _RGB = 7, 5, 2
_LIBRARY = "Aperio Image Library v11.2.1 \r\n"
_BLOCK_BYTES = (4_000, 16_000)  # of a JPEG block; 10 KB on average
_HEADER_BYTES = 8

Layout = Literal["libtiff", "tifffile"]
Tags = dict[int, tuple[int, bytes]]
"""Code -> TIFF type and encoded values."""
Page = tuple[NDArray[np.uint32], Callable[[int], Tags]]
"""Sizes of the blocks in bytes, and the tags of the directory where the first of them lies at the given offset."""


def write_huge_svs(path: Path, layout: Layout = "libtiff") -> Path:
    """Write a little-endian classic TIFF of 2 GB as Aperio orders one: the same bytes every time, 2 MB on the disk.

    Level 0 of 110,000 x 90,000 px, a thumbnail in strips, levels 1 to 7, each half the last along an edge, label and
    macro. A directory and its arrays lie behind the page's own blocks ("libtiff", as scanners write) or in front of
    them ("tifffile").
    """
    pages = list(_pages())
    lengths = [len(_directory(tags(0), 0, 0)) for _, tags in pages]
    sizes = [_even(int(blocks.sum())) for blocks, _ in pages]
    starts = list(accumulate(map(int.__add__, lengths, sizes), initial=_HEADER_BYTES))
    behind = layout == "libtiff"
    directories = [start + size * behind for start, size in zip(starts, sizes, strict=False)]
    first_blocks = [start + length * (not behind) for start, length in zip(starts, lengths, strict=False)]
    with whole_file(path) as temporary, temporary.open("wb") as file:
        file.truncate(starts[-1])
        file.write(struct.pack("<2sHI", b"II", 42, directories[0]))
        following = [*directories[1:], 0]
        for (_, tags), at, after, block in zip(pages, directories, following, first_blocks, strict=True):
            file.seek(at)
            file.write(_directory(tags(block), at, after))
    return path


def _pages() -> Iterator[Page]:
    random = np.random.default_rng(0)
    (width, height), *lower = HUGE_SVS_LEVELS
    scan = f"{_LIBRARY}{width}x{height} [0,0 {width}x{height}] ({HUGE_SVS_TILE_PX}x{HUGE_SVS_TILE_PX})"
    facts = f"|AppMag = 40|MPP = {HUGE_SVS_MPP}"
    yield _tiled(random, width, height, f"{scan} JPEG/RGB Q=70{facts}")
    yield _strips(random, 1024, 837, 16, _JPEG, 0, f"{_LIBRARY}{width}x{height} -> 1024x837 - {facts}")
    for w, h in lower:
        yield _tiled(random, w, h, f"{scan} -> {w}x{h} JPEG/RGB Q=70{facts}")
    yield _strips(random, 387, 463, 7, _LZW, 1, f"{_LIBRARY}label 387x463")
    yield _strips(random, 1280, 431, 16, _JPEG, 9, f"{_LIBRARY}macro 1280x431")


def _tiled(random: np.random.Generator, width: int, height: int, description: str) -> Page:
    edge = HUGE_SVS_TILE_PX
    sizes = _sizes(random, -(-width // edge) * -(-height // edge))
    fixed = _image(width, height, _JPEG, 0, description) | {322: _long(edge), 323: _long(edge), 325: _long(*sizes)}
    return sizes, lambda start: fixed | {324: _offsets(start, sizes)}


def _strips(
    random: np.random.Generator, width: int, height: int, rows: int, compression: int, kind: int, description: str
) -> Page:
    sizes = _sizes(random, -(-height // rows))
    fixed = _image(width, height, compression, kind, description) | {278: _long(rows), 279: _long(*sizes)}
    return sizes, lambda start: fixed | {273: _offsets(start, sizes)}


def _image(width: int, height: int, compression: int, kind: int, description: str) -> Tags:
    tags = {
        254: _long(kind),
        256: _long(width),
        257: _long(height),
        258: _short(8, 8, 8),
        259: _short(compression),
        262: _short(_RGB),
        270: (_ASCII, description.encode() + b"\0"),
        277: _short(3),
        284: _short(1),
    }
    return tags | ({347: (_UNDEFINED, _jpeg_tables())} if compression == _JPEG else {317: _short(2)})


def _jpeg_tables() -> bytes:
    stream = io.BytesIO()
    Image.new("RGB", (16, 16)).save(stream, format="JPEG", quality=70, streamtype=1)  # 1: tables and no picture
    return stream.getvalue()


def _sizes(random: np.random.Generator, count: int) -> NDArray[np.uint32]:
    return random.integers(*_BLOCK_BYTES, count, dtype=np.uint32)


def _offsets(start: int, sizes: NDArray[np.uint32]) -> tuple[int, bytes]:
    return _long(*(start + np.cumsum(sizes) - sizes))


def _short(*values: int) -> tuple[int, bytes]:
    return _SHORT, np.asarray(values, "<u2").tobytes()


def _long(*values: int) -> tuple[int, bytes]:
    return _LONG, np.asarray(values, "<u4").tobytes()


def _directory(tags: Tags, at: int, following: int) -> bytes:
    """A directory at byte `at`, behind it the values that it has no room for; its length depends on the tags alone."""
    entries, values = b"", b""
    behind = at + 2 + 12 * len(tags) + 4
    for code, (kind, data) in sorted(tags.items()):
        inline = len(data) <= 4
        place = data.ljust(4, b"\0") if inline else struct.pack("<I", behind + len(values))
        entries += struct.pack("<HHI", code, kind, len(data) // _SIZES[kind]) + place
        values += b"" if inline else data.ljust(_even(len(data)), b"\0")
    return struct.pack("<H", len(tags)) + entries + struct.pack("<I", following) + values


def _even(size: int) -> int:
    """Rounded up to where TIFF wants its directories and values to begin."""
    return size + size % 2
