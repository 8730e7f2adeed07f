"""Writer of Hamamatsu NDPI slides: a TIFF whose offsets have 64 bits, and each level one JPEG in one strip.

The layout is the one that OpenSlide and tifffile read: behind the entries of a directory come the next directory's offset
in 8 bytes and the upper 4 bytes of each entry's value; McuStarts says where in the JPEG each restart interval begins.
"""

import io
import re
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from PIL import Image

from tests.slides.make import Pixels

MACRO, MAP = -1.0, -2.0
"""What stands in place of a magnification where a picture is no level."""

_ASCII, _SHORT, _LONG, _RATIONAL, _SIGNED, _FLOAT = 2, 3, 4, 5, 9, 11
_CODES = {_ASCII: "s", _SHORT: "H", _LONG: "I", _RATIONAL: "I", _SIGNED: "i", _FLOAT: "f"}
_UNITS = {"4:4:4": (8, 8), "4:2:2": (16, 8), "4:2:0": (16, 16)}
"""Width and height of a JPEG's smallest whole unit, pixels."""

_RESTART = re.compile(rb"\xff[\xd0-\xd7]")
_Tag = tuple[int, int, Sequence[int | float | bytes]]  # code, type, values


@dataclass(frozen=True)
class NdpiImage:
    """One directory."""

    pixels: Pixels  # [h, w, 3]
    lens: float  # magnification, or MACRO or MAP
    restart_px: int | None = 64  # between two restart markers along a row; None: no markers
    has_starts: bool = True  # whether McuStarts says where the restart intervals begin
    focal_plane: int = 0  # number of the plane, 0 the middle one


def write_ndpi(
    path: Path,
    images: Sequence[NdpiImage],
    *,
    subsampling: str = "4:2:2",
    mpp: float = 0.5,
    hole: int = 0,
    compression: int = 7,
) -> Path:
    """Write the images in this order, the first at `mpp` um/px.

    hole          bytes of nothing in front of the images, free where file systems leave them out: from 4 GiB on every
                  offset needs its upper half
    compression   what the directories say; the content is JPEG
    """
    with path.open("wb") as file:
        file.write(struct.pack("<2sHQ", b"II", 42, 0))
        file.seek(hole, io.SEEK_CUR)
        link = 4  # where the next directory's offset goes
        for image in images:
            jpeg, starts = _encoded(image, subsampling)
            strip = file.tell()
            file.write(jpeg)
            pixel_um = mpp * images[0].pixels.shape[1] / image.pixels.shape[1]
            tags = _tags(image, strip, len(jpeg), starts, pixel_um, compression)
            directory, next_link = _write_directory(file, tags)
            end = file.tell()
            file.seek(link)
            file.write(struct.pack("<Q", directory))
            file.seek(end)
            link = next_link
    return path


def _encoded(image: NdpiImage, subsampling: str) -> tuple[bytes, list[int]]:
    """A JPEG and where in it each restart interval begins."""
    stream = io.BytesIO()
    unit = _UNITS[subsampling][0]
    blocks = image.restart_px // unit if image.restart_px else 0
    Image.fromarray(image.pixels).save(
        stream, "JPEG", quality=90, subsampling=subsampling, restart_marker_blocks=blocks
    )
    jpeg = stream.getvalue()
    scan = jpeg.index(b"\xff\xda")
    starts = [scan + 2 + int.from_bytes(jpeg[scan + 2 : scan + 4], "big")]
    # within a scan 0xFF is followed by 0 unless it begins a marker
    starts += [marker.end() for marker in _RESTART.finditer(jpeg, starts[0])]
    return jpeg, starts


def _tags(
    image: NdpiImage, strip: int, size: int, starts: Sequence[int], pixel_um: float, compression: int
) -> list[_Tag]:
    height, width = image.pixels.shape[:2]
    per_cm = [round(1e7 / pixel_um), 1000]
    tags: list[_Tag] = [
        (256, _LONG, [width]),
        (257, _LONG, [height]),
        (258, _SHORT, [8, 8, 8]),
        (259, _SHORT, [compression]),
        (262, _SHORT, [6]),
        (271, _ASCII, [b"Hamamatsu\0"]),
        (273, _LONG, [strip]),
        (277, _SHORT, [3]),
        (278, _LONG, [height]),
        (279, _LONG, [size]),
        (282, _RATIONAL, per_cm),
        (283, _RATIONAL, per_cm),
        (296, _SHORT, [3]),
        (65420, _LONG, [1]),  # this is NDPI
        (65421, _FLOAT, [image.lens]),
        (65424, _SIGNED, [image.focal_plane]),
    ]
    return [*tags, (65426, _LONG, starts)] if image.restart_px and image.has_starts else tags


def _write_directory(file: BinaryIO, tags: Sequence[_Tag]) -> tuple[int, int]:
    """Write the values, then the directory: its place, and the place of the link to the next one."""
    entries, upper = b"", b""
    for code, kind, values in tags:
        count = len(values) // (2 if kind == _RATIONAL else 1)
        if kind == _ASCII:
            [content] = values
            assert isinstance(content, bytes)
            count = len(content)
        elif code == 273:  # the only number that goes beyond 32 bits
            content = struct.pack("<Q", *values)
        else:
            content = struct.pack(f"<{len(values)}{_CODES[kind]}", *values)
        if len(content) > 4 and code != 273:
            at = file.tell()
            file.write(content)
            content = struct.pack("<Q", at)
        content = content.ljust(8, b"\0")
        entries += struct.pack("<HHI", code, kind, count) + content[:4]
        upper += content[4:]
    directory = file.tell()
    file.write(struct.pack("<H", len(tags)) + entries + bytes(8) + upper)
    return directory, directory + 2 + len(entries)
