"""From compressed blocks of a level to RGB pixels."""

import struct
from collections.abc import Callable, Sequence

import imagecodecs
import numpy as np
from numpy.typing import NDArray

from udfs.wsi.errors import ErrorCode, SlideError
from udfs.wsi.tiff.index import Coding, Level
from udfs.wsi.tiff.jpeg import DC_SCALE, decode_jpeg, restarted_jpeg, whole_jpeg
from udfs.wsi.tiff.jpeg2000 import decode_jpeg2000

Pixels = NDArray[np.uint8]  # [height, width, 3], RGB

WHITE = 255
JPEG = 7
YCBCR = 6  # photometric
JPEG2000 = (33003, 33004, 33005, 34712)
UNCOMPRESSED = 1
_LZW, _WEBP = 5, 50001
_HORIZONTAL = 2  # predictor
_LONG, _MINISBLACK, _RGB, _CONTIG, _UNASSALPHA = 4, 1, 2, 1, 2  # type of an entry, photometric, planes, extra sample
# Decoders to bytes. They never return more than `out` bytes, whatever the data claims.
_TO_BYTES: dict[int, Callable[..., bytes | bytearray]] = {
    UNCOMPRESSED: lambda data, out: data,
    8: imagecodecs.deflate_decode,
    32946: imagecodecs.deflate_decode,
    32773: imagecodecs.packbits_decode,
    50000: imagecodecs.zstd_decode,
}
SUPPORTED = (JPEG, _LZW, _WEBP, *JPEG2000, *_TO_BYTES)


def new_buffer(level: Level) -> NDArray[np.uint8]:
    """Returns memory for the pixels of one block, for any number of calls of `decode_block`."""
    return np.empty(level.block_height * level.block_width * 3, np.uint8)


def scale_for(level: Level, edge: int) -> int:
    """Returns by how much blocks can shrink while they are decoded, if squares of edge x edge pixels are averaged.

    8 if it divides the square and the blocks: JPEG's DC coefficients are then the means of 8 x 8 pixels; else 1. (At 4 or
    2, libjpeg drops fine detail and smooths chroma in another way: some of a thousand mask pixels would differ.)
    """
    if level.coding.compression != JPEG or level.planes > 1:
        return 1
    sizes = [edge, level.block_height]
    if level.columns > 1:  # nothing stands right of a strip
        sizes.append(level.block_width)
    return DC_SCALE if all(size % DC_SCALE == 0 for size in sizes) else 1


def decode_block(
    level: Level, block: int, data: Sequence[memoryview], out: NDArray[np.uint8], scale: int = 1
) -> Pixels | None:
    """Returns the RGB pixels of a block, cut to the level and shrunk by `scale` (from `scale_for`): uint8 [h, w, 3].

    `data` has the bytes of each plane. Returns None if they are empty: the writer left out white background. `out` is from
    `new_buffer`; the result may be a view of it. Raises SlideError `tile_data_corrupt`, which names the block.
    """
    if not any(len(part) for part in data):
        return None
    row, column = divmod(block, level.columns)
    height = min(level.block_height, level.height_px - row * level.block_height)
    width = min(level.block_width, level.width_px - column * level.block_width)
    stored = level.block_height if level.coding.is_tiled else height  # the last strip is as high as what is left
    try:
        pixels = _decode(level, data, stored, out, scale)
    except MemoryError:  # not the slide's fault
        raise
    except Exception as error:
        raise _corrupt(level, row, column, f"{type(error).__name__}: {error}") from None
    height, width = -(-height // scale), -(-width // scale)
    if pixels.shape[0] < height or pixels.shape[1] < width:
        raise _corrupt(level, row, column, f"decodes to {pixels.shape[1]} x {pixels.shape[0]} px")
    pixels = pixels[:height, :width]
    if pixels.shape[-1] in (2, 4):
        pixels = on_white(pixels, level.coding.premultiplied)
    return np.repeat(pixels, 3, axis=-1) if pixels.shape[-1] == 1 else pixels


def _decode(level: Level, data: Sequence[memoryview], height: int, out: NDArray[np.uint8], scale: int) -> Pixels:
    coding, width = level.coding, level.block_width
    if coding.compression == JPEG and level.planes == 1:
        if coding.jpeg_header:
            stream = restarted_jpeg(data[0], coding.jpeg_header)
        else:
            stream = whole_jpeg(data[0], coding.jpeg_tables, coding.photometric == YCBCR)
        return decode_jpeg(stream, width, level.block_height, out, scale=scale)
    parts = [_decode_plane(coding, part, width, height, coding.samples // level.planes) for part in data]
    return parts[0] if len(parts) == 1 else np.concatenate(parts, axis=-1)


def _decode_plane(coding: Coding, data: memoryview, width: int, height: int, samples: int) -> Pixels:
    if coding.compression == JPEG:  # colours stored apart
        out = np.empty(width * height, np.uint8)
        return decode_jpeg(whole_jpeg(data, coding.jpeg_tables, is_ycbcr=False), width, height, out, grey=True)
    if coding.compression in JPEG2000:
        pixels = decode_jpeg2000(data, width, height, samples, is_ycbcr=coding.photometric == YCBCR)
        return pixels.reshape(*pixels.shape[:2], -1)
    if coding.compression == _WEBP:
        return imagecodecs.webp_decode(bytes(data), out=np.empty((height, width, samples), np.uint8))
    if coding.compression == _LZW:
        return _decode_lzw(bytes(data), width, height, samples, coding.predictor)
    content = _TO_BYTES[coding.compression](bytes(data), out=width * height * samples)
    pixels = np.frombuffer(content, np.uint8).reshape(-1, width, samples)
    if coding.predictor == _HORIZONTAL:
        pixels = pixels.cumsum(axis=1, dtype=np.uint8)
    return pixels


def _decode_lzw(data: bytes, width: int, height: int, samples: int, predictor: int) -> Pixels:
    """Decodes through libtiff: imagecodecs' own LZW decoder crashes the process on some damaged data."""
    # The block becomes a little-endian TIFF of one strip: header, directory, data (TIFF 6.0, section 2).
    entries = {256: width, 257: height, 258: 8, 259: _LZW, 262: _RGB if samples >= 3 else _MINISBLACK, 273: 0}
    entries |= {277: samples, 278: height, 279: len(data), 284: _CONTIG, 317: predictor}
    if samples in (2, 4):
        entries[338] = _UNASSALPHA
    entries[273] = 8 + 2 + 12 * len(entries) + 4  # beginning of the strip
    directory = b"".join(struct.pack("<HHII", code, _LONG, 1, value) for code, value in entries.items())
    tiff = struct.pack("<2sHIH", b"II", 42, 8, len(entries)) + directory + bytes(4) + data
    return imagecodecs.tiff_decode(tiff).reshape(height, width, samples)


def _corrupt(level: Level, row: int, column: int, reason: str) -> SlideError:
    x, y = (round(n * level.downsample) for n in (column * level.block_width, row * level.block_height))
    return SlideError(
        ErrorCode.TILE_DATA_CORRUPT,
        f"the block at x={x}, y={y} (level-0 px) does not decode ({reason}): upload or scan the slide again",
    )


def on_white(pixels: Pixels, premultiplied: bool = False) -> Pixels:
    """Composites uint8 [h, w, 2 or 4], alpha last, on white: uint8 [h, w, 1 or 3], halves rounded up."""
    alpha = pixels[..., -1:].astype(np.uint16)
    colour = pixels[..., :-1].astype(np.uint16) * (255 if premultiplied else alpha)
    blended = (colour.astype(np.uint32) + WHITE * (255 - alpha) + 127) // 255
    return np.minimum(blended, 255).astype(np.uint8)
