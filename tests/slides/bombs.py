"""Slides of a few kilobytes that cost a careless reader gigabytes or hours. Each maker writes one file and returns its path.

Blocks are put together byte by byte, so that a block may claim what no encoder writes.
"""

import io
import struct
import zlib
from collections.abc import Sequence
from pathlib import Path

import imagecodecs
import numpy as np
import tifffile
from PIL import Image

from tests.slides.make import Pixels

JPEG, LZW, DEFLATE, PACKBITS, ZSTD, WEBP, JPEG2000 = 7, 5, 8, 32773, 50000, 50001, 34712
EDGE = 256
"""Of a block, pixels."""

_JP2_SIGNATURE = b"\x00\x00\x00\x0cjP  \r\n\x87\n"


def picture(edge: int = EDGE) -> Pixels:
    """A soft gradient in the colours of tissue: uint8 [edge, edge, 3]."""
    y, x = np.mgrid[:edge, :edge]
    colours: Pixels = np.stack([150 + x % 40, 80 + y % 40, 130 + (x + y) % 40], axis=-1).astype(np.uint8)
    return colours


def write_block(path: Path, data: bytes, compression: int, *, samples: int = 3) -> Path:
    """A slide of one block of EDGE x EDGE px."""
    with tifffile.TiffWriter(path) as writer:
        writer.write(
            iter([data]),
            shape=(EDGE, EDGE, samples) if samples > 1 else (EDGE, EDGE),
            dtype="uint8",
            tile=(EDGE, EDGE),
            compression=compression,
            photometric="rgb" if samples > 1 else "minisblack",
            metadata=None,
            software=False,
        )
    return path


# JPEG 2000


def codestream(pixels: Pixels | None = None) -> bytearray:
    """A good one, without loss."""
    pixels = picture() if pixels is None else pixels
    return bytearray(imagecodecs.jpeg2k_encode(pixels, level=0, reversible=True, codecformat="j2k"))


def with_components(count: int, bits: int = 8) -> bytes:
    """A codestream that claims so many components of so many bits."""
    stream = codestream()
    rest = stream[2 + 2 + struct.unpack(">H", stream[4:6])[0] :]
    size = struct.pack(">H", 38 + 3 * count) + stream[6:40] + struct.pack(">H", count)
    return b"\xff\x4f\xff\x51" + size + bytes([bits - 1, 1, 1]) * count + bytes(rest)


def with_tiles_of(edge: int) -> bytes:
    """A codestream that claims tiles of so many pixels."""
    stream = codestream()
    stream[24:32] = struct.pack(">II", edge, edge)
    return bytes(stream)


def in_tiles_of_64_px() -> bytes:
    """A good codestream of 16 tiles."""
    stream = io.BytesIO()
    Image.fromarray(picture()).save(stream, "JPEG2000", no_jp2=True, tile_size=(64, 64))
    return stream.getvalue()


def with_layers(count: int, precinct: int | None = None, in_tile: bool = False) -> bytes:
    """A codestream that claims so many quality layers, and precincts of 2^precinct px at every resolution.

    The coding style stands in the main header, or in that of the tile, where it wins.
    """
    stream = bytes(codestream())
    at = stream.index(b"\xff\x52")
    end = at + 2 + struct.unpack(">H", stream[at + 2 : at + 4])[0]
    style = bytearray(stream[at + 4 : end])
    style[2:4] = struct.pack(">H", count)
    if precinct is not None:
        style[0] |= 1
        style += bytes([precinct << 4 | precinct]) * (style[5] + 1)
    segment = b"\xff\x52" + struct.pack(">H", len(style) + 2) + bytes(style)
    if not in_tile:
        return stream[:at] + segment + stream[end:]
    tile = stream.index(b"\xff\x90")
    length = struct.unpack(">I", stream[tile + 6 : tile + 10])[0] + len(segment)
    return (
        stream[: tile + 6] + struct.pack(">I", length) + stream[tile + 10 : tile + 12] + segment + stream[tile + 12 :]
    )


def box(kind: bytes, content: bytes, form: str = "short") -> bytes:
    """A box of a JP2 file, its length in 4 bytes ("short"), in 8 ("long"), or not given ("open")."""
    if form == "long":
        return struct.pack(">I4sQ", 1, kind, 16 + len(content)) + content
    return struct.pack(">I4s", 0 if form == "open" else 8 + len(content), kind) + content


def jp2(stream: bytes, before: bytes = b"", form: str = "short", palette: bytes = b"", colours: int = 3) -> bytes:
    """A JP2 file of a codestream, with further boxes before the codestream's."""
    height, width = struct.unpack(">I", stream[12:16])[0], struct.unpack(">I", stream[8:12])[0]
    about = box(b"ihdr", struct.pack(">IIHBBBB", height, width, colours, 7, 7, 0, 0)) + palette
    about += box(b"colr", struct.pack(">BBBI", 1, 0, 0, 16))
    return b"".join(
        (_JP2_SIGNATURE, box(b"ftyp", b"jp2 \0\0\0\0jp2 "), before, box(b"jp2h", about), box(b"jp2c", stream, form))
    )


def large_codestream() -> bytes:
    """Of 12,000 x 12,000 px of one colour, a few kilobytes."""
    stream = codestream(np.zeros((64, 64, 3), np.uint8))
    stream[8:16] = struct.pack(">II", 12_000, 12_000)
    stream[24:32] = struct.pack(">II", 12_000, 12_000)
    return bytes(stream)


# JPEG


def jpeg_of_scans(count: int, *, arithmetic: bool = False) -> bytes:
    """A progressive JPEG with so many further scans, each of some bytes that say that no coefficient changes."""
    stream = io.BytesIO()
    Image.fromarray(picture()).save(stream, "JPEG", progressive=True, subsampling=0, quality=80)
    good = stream.getvalue()
    # One Huffman code of one bit, "end of 2^14 blocks": of luma's coefficient 63, from bit 13 down to bit 13.
    table = b"\xff\xc4" + struct.pack(">HB", 20, 0x13) + bytes([1, *[0] * 15]) + b"\xe0"
    scan = b"\xff\xda" + struct.pack(">HBBBBBB", 8, 1, 1, 0x03, 63, 63, 0) + b"\x00\x00\x00\x00"
    if arithmetic:
        good = good.replace(b"\xff\xc2", b"\xff\xca", 1)
    return good[:-2] + table + scan * count + b"\xff\xd9"


def jpeg_of_planes(count: int, fill: bytes = b"") -> bytes:
    """A sequential JPEG whose colours come in a scan each, the last of them `count` times; `fill` before its first marker."""
    parts = []
    for plane in np.moveaxis(picture(), 2, 0):
        stream = io.BytesIO()
        Image.fromarray(np.ascontiguousarray(plane)).save(stream, "JPEG", quality=80)
        parts.append(stream.getvalue())
    head = parts[0].partition(b"\xff\xda")[0]
    frame = head.index(b"\xff\xc0")
    size = struct.pack(">HB", 17, 8) + head[frame + 5 : frame + 9] + bytes([3, 1, 0x11, 0, 2, 0x11, 0, 3, 0x11, 0])
    head = head[:frame] + b"\xff\xc0" + size + head[frame + 2 + 11 :]
    scans = []
    for number, part in enumerate(parts, 1):
        data = part[part.index(b"\xff\xda") + 10 : -2]
        scans.append(b"\xff\xda" + struct.pack(">HBBB", 8, 1, number, 0) + b"\x00\x3f\x00" + data)
    return head[:2] + fill + head[2:] + b"".join(scans[:2]) + scans[2] * count + b"\xff\xd9"


def sequential_jpeg(further_scans: int) -> bytes:
    """An ordinary JPEG, whose only scan comes some times more."""
    stream = io.BytesIO()
    Image.fromarray(picture()).save(stream, "JPEG", subsampling=0, quality=80)
    good = stream.getvalue()
    return good[:-2] + good[good.index(b"\xff\xda") : -2] * further_scans + b"\xff\xd9"


# Codecs that unpack


def packed(compression: int, n_bytes: int) -> bytes:
    """So many zeros, packed."""
    zeros = bytes(n_bytes)
    if compression == DEFLATE:
        return zlib.compress(zeros, 9)
    if compression == ZSTD:
        return bytes(imagecodecs.zstd_encode(zeros, level=19))
    if compression == LZW:
        return bytes(imagecodecs.lzw_encode(zeros))
    return b"\x81\x00" * (n_bytes // 128)  # PackBits


def webp_of(width: int, height: int) -> bytes:
    """A WebP without loss whose header claims another size than its one colour has."""
    data = bytearray(imagecodecs.webp_encode(np.full((EDGE, EDGE, 3), 99, np.uint8), lossless=True))
    at = data.index(b"VP8L") + 9
    bits = struct.unpack("<I", data[at : at + 4])[0] & ~(2**28 - 1)
    data[at : at + 4] = struct.pack("<I", bits | width - 1 | height - 1 << 14)
    return bytes(data)


# Headers


Values = int | bytes | tuple[int, int]
"""A number, texts as they are, or how many numbers lie where: (count, place)."""


def write_header(
    path: Path, directories: Sequence[dict[int, Values]], *, n_bytes: int = 0, below: Sequence[dict[int, Values]] = ()
) -> Path:
    """A BigTIFF of directories alone, those `below` as SubIFDs of the first; the file is `n_bytes` long, by a hole."""
    places: list[int] = []
    at = 16
    for entries in (*directories, *below):
        places.append(at)
        at += 8 + 20 * (len(entries) + (bool(below) and entries is directories[0])) + 8
    if below:
        directories = [directories[0] | {330: (len(below), at)}, *directories[1:]]
    values = struct.pack(f"<{len(below)}Q", *places[len(directories) :])
    content = [struct.pack("<2sHHHQ", b"II", 43, 8, 0, 16)]
    texts = [values]
    end = at + len(values)
    for number, entries in enumerate((*directories, *below)):
        content.append(struct.pack("<Q", len(entries)))
        for code, value in sorted(entries.items()):
            kind, told = (4, (1, value)) if isinstance(value, int) else (16, value)
            if isinstance(value, bytes):
                kind, told = 7 if code == 347 else 2, (len(value), end)  # JPEG tables are no text
                texts.append(value)
                end += len(value)
            content.append(struct.pack("<HHQQ", code, kind, *told))
        content.append(struct.pack("<Q", places[number + 1] if number + 1 < len(directories) else 0))
    path.write_bytes(b"".join(content + texts))
    with path.open("r+b") as file:
        file.truncate(max(n_bytes, end))
    return path


def image(
    width: int, height: int, block: int, *, offsets: tuple[int, int], compression: int = 1, rows: int = 0
) -> dict[int, Values]:
    """The entries of a grey image in square tiles of `block` px, or in strips of `rows`; `offsets` says how many lie where.

    The sizes of blocks lie in the same place.
    """
    common: dict[int, Values] = {256: width, 257: height, 258: 8, 259: compression, 262: 1, 277: 1}
    if rows:
        return common | {273: offsets, 278: rows, 279: offsets}
    return common | {322: block, 323: block, 324: offsets, 325: offsets}
