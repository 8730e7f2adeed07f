"""JPEG blocks: streams made complete and decoded by libjpeg-turbo into a buffer that is reused."""

import numpy as np
import simplejpeg
from numpy.typing import NDArray

_START, _END = b"\xff\xd8", b"\xff\xd9"
_SCAN = b"\xff\xda"  # the marker that a scan begins with; compressed data never contains it
_FRAMES = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}  # second bytes of the markers that a frame begins with
_ALONE = frozenset((0x01, *range(0xD0, 0xDA), 0xFF))  # those of markers without a segment, and fill bytes
_PROGRESSIVE = frozenset((0xC2, 0xC6, 0xCA, 0xCE))  # those of frames whose coefficients come in many scans
_MOST_SCANS = 100  # libjpeg's encoder writes no more; its decoder goes through the whole image for each, however empty
DC_SCALE = 8  # edge of a JPEG's smallest unit, whose mean is its DC coefficient


def decode_jpeg(
    stream: bytes, width: int, height: int, out: NDArray[np.uint8], *, grey: bool = False, scale: int = 1
) -> NDArray[np.uint8]:
    """Decodes a complete JPEG into `out` (contiguous), and returns uint8 [h, w, 3], or [h, w, 1] if `grey`, a view of `out`.

    Chroma is upsampled by libjpeg's default ("fancy", triangle filter), as OpenSlide does. An image larger than the block
    (width x height pixels) is refused before memory is allocated for it. With scale 8, each pixel is the mean of an 8 x 8
    square; else `scale` is 1. Raises ValueError if the data is damaged, even if libjpeg would fill the damage with grey.
    """
    stored_height, stored_width, _, _ = simplejpeg.decode_jpeg_header(stream)
    if stored_height > height or stored_width > width:
        raise ValueError(f"a JPEG of {stored_width} x {stored_height} px in a block of {width} x {height}")
    if not _is_one_scan(stream) and (scans := stream.count(_SCAN)) > _MOST_SCANS:
        raise ValueError(f"{scans:,} scans in one JPEG, over the limit of {_MOST_SCANS}")
    pixels: NDArray[np.uint8] = simplejpeg.decode_jpeg(
        stream,
        colorspace="GRAY" if grey else "RGB",
        min_height=-(-stored_height // scale),
        min_width=-(-stored_width // scale),
        min_factor=scale,
        buffer=out,
        strict=True,
    )
    return pixels


def _is_one_scan(stream: bytes) -> bool:
    """Returns whether a decoder stops after the first scan: the frame is sequential, and the scan has all its components.

    Nothing behind the header of that scan is examined. ITU-T T.81, B.1.1 and B.2.
    """
    at, components, is_progressive = len(_START), 0, True
    while at + 10 < len(stream) and stream[at] == 0xFF and (marker := stream[at + 1]) not in _ALONE:
        length = int.from_bytes(stream[at + 2 : at + 4])
        if marker in _FRAMES:
            components, is_progressive = stream[at + 9], marker in _PROGRESSIVE
        elif marker == _SCAN[1]:
            return not is_progressive and stream[at + 4] == components
        at += 2 + length
    return False  # something that encoders do not write between segments


def whole_jpeg(data: memoryview, tables: bytes, is_ycbcr: bool) -> bytes:
    """Returns a stream that any decoder reads as the TIFF means it.

    TIFF keeps shared tables in the directory, and its photometric tag says whether the samples are RGB or YCbCr. Decoders
    look for an Adobe marker (transform 0 or 1) in the stream instead; the stream's own marker, if it has one, follows and
    takes precedence. TIFF Technical Note 2; ITU-T T.872, 6.5.3.
    """
    if data[:2] != _START:
        raise ValueError("not a JPEG stream")
    adobe = b"\xff\xee\x00\x0eAdobe\x00\x64\x00\x00\x00\x00" + (b"\x01" if is_ycbcr else b"\x00")
    return b"".join((_START, adobe, tables[2:-2], data[2:]))


def restarted_jpeg(data: memoryview, header: bytes) -> bytes:
    """Returns a stream of one restart interval: Hamamatsu stores a level as one JPEG. `header` has the size of the part."""
    ends_in_marker = len(data) > 1 and data[-2] == 0xFF and (0xD0 <= data[-1] <= 0xD7 or data[-1] == 0xD9)
    scan = data[:-2] if ends_in_marker else data
    return b"".join((header, scan, _END))
