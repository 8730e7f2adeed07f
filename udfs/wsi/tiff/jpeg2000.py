"""JPEG 2000 blocks, as Aperio and others store them, through OpenJPEG. Its memory and time are bounded by the block's header.

The header is described in ITU-T T.800, annexes A and I.
"""

import io
import struct
from collections.abc import Iterator

import imagecodecs
import numpy as np
from numpy.typing import NDArray
from PIL import Image

_START = b"\xff\x4f\xff\x51"  # of a codestream; sizes of image and tiles follow
_HEADER_BOX, _PALETTE_BOX, _CODESTREAM_BOX = b"jp2h", b"pclr", b"jp2c"
_COD, _COC, _SOT, _SOD = 0x52, 0x53, 0x90, 0x93  # second bytes of markers
_LEAST_TILE_PX = 1024  # pixels of a tile on average; each tile costs 10 KB to decode, however few its pixels
_LEAST_PACKET_PX = 4  # pixels of a packet on average; each packet costs time, however few its bytes
_FEW_PACKETS = 10_000


def decode_jpeg2000(data: memoryview, width: int, height: int, samples: int, *, is_ycbcr: bool) -> NDArray[np.uint8]:
    """Decodes a codestream or a JP2 file in a block of width x height pixels to uint8 [h, w] or [h, w, samples].

    If the directory says that the three samples are Y, Cb and Cr (`is_ycbcr`), the block's own header still takes
    precedence: decoders undo a codestream's colour transform, and convert a JP2 file in sYCC. Raises ValueError if the image
    is larger than the block or has other samples, imagecodecs.Jpeg2kError or OSError if the data is damaged.
    """
    content = bytes(data)
    codestream = _checked_codestream(content, width, height, samples)
    components = codestream[42 : 42 + 3 * samples]  # of each: bits, width and height of a sample in pixels
    # imagecodecs puts the samples of smaller components (chroma) in wrong places; Pillow gives RGB.
    if any(step != 1 for step in components[1::3] + components[2::3]):
        with Image.open(io.BytesIO(content)) as image:  # Pillow reads the size from the boxes of a JP2 file
            if image.width > width or image.height > height:
                raise ValueError(f"a JP2 file of {image.width} x {image.height} px in a block of {width} x {height}")
            return np.asarray(image.convert("RGB"))
    pixels: NDArray[np.uint8] = imagecodecs.jpeg2k_decode(content)
    if pixels.dtype != np.uint8:
        raise ValueError(f"{pixels.dtype} samples")
    is_rgb = not is_ycbcr or samples != 3 or _has_its_colours(content)
    return pixels if is_rgb else _rgb(pixels)


def _rgb(ycbcr: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Returns R, G, B from full-range Y, Cb, Cr in 16-bit fixed point, rounded as libjpeg does. ITU-T T.871, 7."""
    luma, blue, red = np.moveaxis(ycbcr.astype(np.int32), -1, 0)
    blue, red = blue - 128, red - 128
    chroma = np.stack((91881 * red, -22554 * blue - 46802 * red, 116130 * blue), axis=-1)
    rgb: NDArray[np.uint8] = np.clip(luma[..., None] + (chroma + 32768 >> 16), 0, 255).astype(np.uint8)
    return rgb


def _has_its_colours(data: bytes) -> bool:
    is_file = not data.startswith(_START)  # JP2, which names the colour space: ITU-T T.800, I.5.3.3
    # a codestream may have a multiple component transform: A.6.1
    return is_file or next((data[begin + 4] == 1 for marker, begin, _ in _segments(data) if marker == _COD), False)


def _checked_codestream(data: bytes, width: int, height: int, samples: int) -> bytes:
    """Returns the codestream of a block: the block itself, or the first codestream box of a JP2 file.

    Raises ValueError if there is none, or if decoding it would cost more than the block's pixels explain.
    """
    stream = _unboxed(data)
    sizes = struct.unpack_from(">8IH", stream, 8)
    right, bottom, left, top, tile_width, tile_height, tiles_left, tiles_top, components = sizes
    size = f"a codestream of {right - left} x {bottom - top} px"
    if right - left > width or bottom - top > height:
        raise ValueError(f"{size} in a block of {width} x {height}")
    if components != samples:
        raise ValueError(f"a codestream of {components:,} components, a pixel has {samples} samples")
    depths = stream[42 : 42 + 3 * components : 3]  # less 1; the upper bit marks signed samples
    if any(depth != 7 for depth in depths):
        raise ValueError(f"samples of {max(depth % 128 + 1 for depth in depths)} bits, or signed, instead of 8 bits")
    if not tile_width or not tile_height:
        raise ValueError(f"tiles of {tile_width} x {tile_height} px")
    pixels = (right - left) * (bottom - top)
    tiles = -(-(right - tiles_left) // tile_width) * -(-(bottom - tiles_top) // tile_height)
    if tiles > max(1, pixels // _LEAST_TILE_PX):
        raise ValueError(f"{tiles:,} tiles in {size}")
    packets, layers = 0, 1
    for marker, begin, end in _segments(stream):
        if marker == _COD:
            layers = int.from_bytes(stream[begin + 2 : begin + 4], "big")
            packets = layers * samples * _precincts(stream[begin + 5 : end], stream[begin], right, bottom, tiles)
        elif marker == _COC:
            packets += layers * _precincts(stream[begin + 2 : end], stream[begin + 1], right, bottom, tiles)
        if packets > max(_FEW_PACKETS, pixels // _LEAST_PACKET_PX):
            raise ValueError(f"{packets:,} packets in {size}")
    return stream


def _unboxed(data: bytes) -> bytes:
    """Returns the content of the first codestream box. Other boxes may hold bytes that look like a codestream."""
    at = 0
    while not data.startswith(_START) and at + 8 <= len(data):
        length, begin = int.from_bytes(data[at : at + 4], "big"), at + 8
        if length == 1:  # the length follows in 8 bytes
            length, begin = int.from_bytes(data[begin : begin + 8], "big"), begin + 8
        end = at + length if length else len(data)  # 0: up to the end
        kind = data[at + 4 : at + 8]
        if kind == _HEADER_BOX and _PALETTE_BOX in data[begin:end]:
            raise ValueError("a palette, which makes up to 255 components of one")
        if kind == _CODESTREAM_BOX:
            data = data[begin:end]
            break
        if end < begin:
            break
        at = end
    if not data.startswith(_START) or len(data) < 42:
        raise ValueError("no JPEG 2000 codestream")
    return data


def _segments(stream: bytes) -> Iterator[tuple[int, int, int]]:
    """Yields each marker of the main header and the tile-part headers: its second byte, begin and end of its parameters."""
    at, next_tile_part = 2, len(stream)
    while at + 4 <= len(stream) and stream[at] == 0xFF:
        marker = stream[at + 1]
        if marker == _SOD:
            at = next_tile_part
            continue
        begin, end = at + 4, at + 2 + int.from_bytes(stream[at + 2 : at + 4], "big")
        if end < begin:
            return
        if marker == _SOT:
            length = int.from_bytes(stream[at + 6 : at + 10], "big")
            next_tile_part = at + length if length else len(stream)
            if next_tile_part < end:
                return
        if end <= len(stream):
            yield marker, begin, end
        at = end


def _precincts(coding: bytes, style: int, width: int, height: int, tiles: int) -> int:
    """Returns the number of precincts of a component on a grid of width x height pixels.

    `coding` is what follows the style in a COD or COC segment: first the number of decompositions, last, if bit 0 of the
    style says so, the sizes of precincts.
    """
    levels = coding[0]
    sizes = coding[5 : 6 + levels] if style & 1 else b""
    count = 0
    for resolution in range(levels + 1):
        size = sizes[resolution] if resolution < len(sizes) else 0xFF
        x, y = (levels - resolution + n for n in (size & 15, size >> 4))
        count += max(tiles, -(-width >> x) * -(-height >> y))
    return count
