"""Makers of one bad slide each, the same bytes every time. What a reader should say to them is for the tests.

Each takes a good tiled TIFF with tissue on it, the folder to write into and the stem of the new file, and returns the
path of the bad slide. `BAD_SLIDES` names them all.
"""

import shutil
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import simplejpeg
import tifffile
from numpy.typing import NDArray
from PIL import Image

from tests.slides.make import Pixels, write_slide
from tests.slides.oracle import TILE_PX, kept_tiles, on_white

BadSlide = Callable[[Path, Path, str], Path]

_LONG = 4  # TIFF type: unsigned 32 bits
_DAMAGED_BLOCKS = 5
_DAMAGED_BYTES = 64
_IMAGE_WIDTH, _IMAGE_LENGTH, _TILE_OFFSETS = 256, 257, 324


def missing(good: Path, folder: Path, stem: str) -> Path:
    """A path with nothing there."""
    return folder / f"{stem}{good.suffix}"


def zero_bytes(good: Path, folder: Path, stem: str) -> Path:
    """An upload that never began."""
    return _write(folder / f"{stem}{good.suffix}", b"")


def truncated(good: Path, folder: Path, stem: str) -> Path:
    """An upload cut half-way: the first directory reads well, the second half of the pixels is not there.

    Where the slide's first directory comes after its pixels, a flat copy with the directory in front is cut.
    """
    path = folder / f"{stem}{good.suffix}"
    with tifffile.TiffFile(good) as tiff:
        page = _first(tiff)
        directory_first = page.offset < min(page.dataoffsets)
    if directory_first:
        shutil.copyfile(good, path)
    else:
        _flat_copy(good, path)
    return _write(path, path.read_bytes()[: path.stat().st_size // 2])


def truncated_directory(good: Path, folder: Path, stem: str) -> Path:
    """The same cut of a file whose directories come last: the header points beyond the end."""
    content = bytearray(good.read_bytes())
    with tifffile.TiffFile(good) as tiff:
        order, big = tiff.byteorder, tiff.is_bigtiff
    struct.pack_into(f"{order}Q" if big else f"{order}I", content, 8 if big else 4, len(content) - 8)
    return _write(folder / f"{stem}{good.suffix}", bytes(content[: len(content) // 2]))


def flipped_header(good: Path, folder: Path, stem: str) -> Path:
    """Every bit of bytes 0 to 15 flipped: a slide by its name only."""
    content = good.read_bytes()
    return _write(folder / f"{stem}{good.suffix}", _flipped(content[:16]) + content[16:])


def flipped_tile_data(good: Path, folder: Path, stem: str) -> Path:
    """Header and directories whole; 64 bytes flipped in the middle of each of several JPEG blocks under kept tiles.

    A lenient decoder gives grey or shifted pixels here and no error; a strict one refuses each of these blocks.
    """
    content = bytearray(good.read_bytes())
    for start, size in damaged_blocks(good):
        content[start : start + size] = _flipped_in_the_middle(bytes(content[start : start + size]))
    return _write(folder / f"{stem}{good.suffix}", bytes(content))


def text_as_svs(good: Path, folder: Path, stem: str) -> Path:
    """A note that someone named like a slide."""
    return _write(folder / f"{stem}.svs", b"The slide is on the other drive.\n" * 200)


def jpeg_as_tif(good: Path, folder: Path, stem: str) -> Path:
    """A plain JPEG photograph named .tif."""
    path = folder / f"{stem}.tif"
    Image.fromarray(on_white(_tissue(good, 1024))).save(path, format="JPEG", quality=90)
    return path


def bad_directory_entry(good: Path, folder: Path, stem: str) -> Path:
    """TileOffsets says that it holds 2^31 - 1 values, beyond the end of the file: a trap for who allocates first."""
    path = folder / f"{stem}.tif"
    write_slide(path, _tissue(good, 1024))
    return _edit_entries(path, {_TILE_OFFSETS: (2**31 - 1, 2**32 - 16)})


def sixteen_bit(good: Path, folder: Path, stem: str) -> Path:
    """A whole and valid slide of 16 bits a channel, as fluorescence scanners write them."""
    pixels = on_white(_tissue(good, 1024)).astype(np.uint16) * 257
    return write_slide(folder / f"{stem}.tif", pixels, compression="deflate")


def huge_header(good: Path, folder: Path, stem: str) -> Path:
    """A small file whose directory claims 2^31 pixels a side: 12 EiB of RGB if believed."""
    path = folder / f"{stem}.tif"
    write_slide(path, _tissue(good, 512))
    return _edit_entries(path, {_IMAGE_WIDTH: (1, 2**31), _IMAGE_LENGTH: (1, 2**31)})


def no_tissue(good: Path, folder: Path, stem: str) -> Path:
    """A whole and valid slide of glass: the good slide's own glass colour, with a camera's noise."""
    pixels = on_white(_level_0(good)[::8, ::8])
    glass = pixels[(pixels > 220).all(axis=2)]
    colour = np.median(glass, axis=0) if len(glass) else np.full(3, 243.0)
    noise = np.random.default_rng(0).normal(0, 2, (1792, 2240, 3))
    return write_slide(folder / f"{stem}.tif", np.clip(colour + noise, 200, 255).astype(np.uint8), pyramid=True)


BAD_SLIDES: dict[str, BadSlide] = {
    maker.__name__: maker
    for maker in (
        missing,
        zero_bytes,
        truncated,
        truncated_directory,
        flipped_header,
        flipped_tile_data,
        text_as_svs,
        jpeg_as_tif,
        bad_directory_entry,
        sixteen_bit,
        huge_header,
        no_tissue,
    )
}


def damaged_blocks(good: Path) -> list[tuple[int, int]]:
    """(offset, size) in bytes of the blocks that `flipped_tile_data` damages: spread over the kept tissue tiles.

    Each lies whole within one kept tile of the 448 px grid, so that the tile cannot be read without it. Now and then
    flipped bytes make another valid stream, which no decoder can tell from a picture: such blocks are passed over.
    """
    with tifffile.TiffFile(good) as tiff:
        page = _first(tiff)
        if page.compression != tifffile.COMPRESSION.JPEG:
            raise ValueError(f"{good.name} is not a JPEG slide")
        tables = page.jpegtables or b""
        columns = -(-page.imagewidth // page.tilewidth)
        edge = np.array([page.tilewidth, page.tilelength])
        pixels = on_white(page.asarray())
        ranges = list(zip(page.dataoffsets, page.databytecounts, strict=True))
    inside = set()
    for corner in kept_tiles(pixels):
        first, last = -(-corner // edge), (corner + TILE_PX) // edge
        inside |= {int(y * columns + x) for y in range(first[1], last[1]) for x in range(first[0], last[0])}
    content = good.read_bytes()
    noticed = [ranges[i] for i in sorted(inside) if _is_noticed(content, ranges[i], tables)]
    if not noticed:
        raise ValueError(f"{good.name} has no block within a kept tissue tile whose damage a decoder would notice")
    spread = np.linspace(0, len(noticed) - 1, min(_DAMAGED_BLOCKS, len(noticed))).astype(int)
    return [noticed[i] for i in spread]


def _is_noticed(content: bytes, block: tuple[int, int], tables: bytes) -> bool:
    start, size = block
    stream = _flipped_in_the_middle(content[start : start + size])
    if tables:  # an abbreviated stream: the tables, less their end marker, go where its start marker was
        stream = tables[:-2] + stream[2:]
    try:
        simplejpeg.decode_jpeg(stream, strict=True)
    except ValueError:
        return True
    return False


def _first(tiff: tifffile.TiffFile) -> tifffile.TiffPage:
    page = tiff.pages.first
    if not page.is_tiled:
        raise ValueError(f"{tiff.filename} is not tiled")
    return page


def _level_0(good: Path) -> Pixels:
    """uint8 [h, w, c], c of 1, 3 or 4."""
    pixels: NDArray[Any] = tifffile.imread(good, key=0)
    return pixels if pixels.ndim == 3 else pixels[:, :, None]


def _tissue(good: Path, edge: int) -> Pixels:
    """A square of the good slide with tissue in it: uint8 [edge, edge, c], smaller where the slide ends."""
    pixels = _level_0(good)
    kept = kept_tiles(pixels)
    x_px, y_px = kept[0] if len(kept) else (0, 0)
    return pixels[y_px : y_px + edge, x_px : x_px + edge]


def _flat_copy(good: Path, path: Path) -> None:
    """Level 0 alone, its blocks as they are, the directory in front of them (tifffile writes it there)."""
    with tifffile.TiffFile(good) as tiff:
        page = _first(tiff)

        def blocks() -> Iterator[bytes]:
            for offset, size in zip(page.dataoffsets, page.databytecounts, strict=True):
                tiff.filehandle.seek(offset)
                yield tiff.filehandle.read(size)

        stored = {"outcolorspace": tifffile.PHOTOMETRIC(page.photometric).name} if page.compression == 7 else None
        with tifffile.TiffWriter(path, bigtiff=tiff.is_bigtiff) as writer:
            writer.write(
                blocks(),
                shape=page.shape,
                dtype=page.dtype,
                tile=(page.tilelength, page.tilewidth),
                photometric=page.photometric,
                planarconfig=page.planarconfig,
                extrasamples=page.extrasamples or None,
                predictor=page.predictor,
                compression=page.compression,
                compressionargs=stored,
                subsampling=page.subsampling,
                jpegtables=page.jpegtables,
                description=page.description or None,
                metadata=None,
                software=False,
            )


def _edit_entries(path: Path, entries: dict[int, tuple[int, int]]) -> Path:
    """Overwrite (count, value or offset) of entries in the first directory of a little-endian classic TIFF."""
    content = bytearray(path.read_bytes())
    with tifffile.TiffFile(path) as tiff:
        places = {code: tiff.pages.first.tags[code].offset for code in entries}
    for code, (count, value) in entries.items():
        struct.pack_into("<HHII", content, places[code], code, _LONG, count, value)
    return _write(path, bytes(content))


def _flipped_in_the_middle(block: bytes) -> bytes:
    start = len(block) // 2 - _DAMAGED_BYTES // 2
    end = start + _DAMAGED_BYTES
    return block[:start] + _flipped(block[start:end]) + block[end:]


def _flipped(content: bytes) -> bytes:
    return bytes(byte ^ 0xFF for byte in content)


def _write(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path
