"""From a page of a TIFF to a level: its grid of blocks, or the reason why it cannot be read."""

import math
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tifffile import EXTRASAMPLE, PHOTOMETRIC, PLANARCONFIG

from udfs.wsi.errors import ErrorCode, SlideError, damaged_header
from udfs.wsi.tiff.decode import JPEG, JPEG2000, SUPPORTED, UNCOMPRESSED
from udfs.wsi.tiff.index import Coding, Level

_MAX_BLOCK_BYTES = 256 * 1024 * 1024  # decoded; a larger one cannot be read in bounded memory
_MANY_BLOCKS = 65_536  # more of them have at least so many pixels each:
_LEAST_BLOCK_PX = 1024  # reading a block takes as long as this many pixels do
_MOST_BYTES_PER_SAMPLE = 4  # of a block as it is stored; no codec makes noise so large
_MOST_EXTRA_BYTES = 1024 * 1024  # of a block, beside its pixels: colour profiles and the like
_MOST_TABLES_BYTES = 64 * 1024  # put before every block; encoders write about 1 KB
_RAW_ROWS_BYTES = 4 * 1024 * 1024  # uncompressed strips are cut into pieces of about this size
# Aperio marks all its JPEG 2000 as RGB; the compression decides what a block holds, as in OpenSlide. Others use these
# compressions, too, and mean the photometric tag (Bio-Formats: 33003 for RGB).
_APERIO_PHOTOMETRICS = {33003: PHOTOMETRIC.YCBCR, 33005: PHOTOMETRIC.RGB}

Offsets = NDArray[np.uint64]


def level_of(page: Any, file_bytes: int, downsample: float = 1.0) -> Level:
    """Returns the level that a `tifffile.TiffPage` holds in a file of `file_bytes`. `downsample` is from `downsample_of`.

    Raises SlideError: `unsupported_format` for sample formats that are not read, `header_corrupt` if the directory contradicts
    itself, `size_implausible` and `tile_data_corrupt` for blocks that are too many or too large, `file_truncated` if the file
    ends before the last block.
    """
    if fault := next(_faults(page), None):
        raise SlideError(ErrorCode.UNSUPPORTED_FORMAT, f"{fault}: convert it, for example with QuPath or libvips")
    width, height, samples = int(page.imagewidth), int(page.imagelength), int(page.samplesperpixel)
    planes = samples if page.planarconfig == PLANARCONFIG.SEPARATE else 1
    if page.is_tiled:
        block_width, block_height = int(page.tilewidth), int(page.tilelength)
    else:
        block_width, block_height = width, min(int(page.rowsperstrip) or height, height)
    if min(width, height, block_width, block_height) < 1:
        raise damaged_header(f"{width} x {height} px in blocks of {block_width} x {block_height}")
    offsets: Offsets = np.asarray(page.dataoffsets, np.uint64)
    counts: Offsets = np.asarray(page.databytecounts, np.uint64)
    coding = _coding(page)
    if coding.jpeg_header and len(offsets) != -(-width // block_width) * -(-height // block_height):
        # Restart intervals that run on over the end of a row are no blocks.
        block_width, block_height = width, height
        offsets, counts = (np.asarray(page.tags[code].value[:1], np.uint64) for code in (273, 279))
        coding = replace(coding, jpeg_header=b"", is_tiled=False)
    if page.compression == UNCOMPRESSED and not page.is_tiled and planes == 1 and _is_contiguous(offsets, counts):
        row_bytes = width * samples
        block_height = max(1, min(height, _RAW_ROWS_BYTES // row_bytes))
        tops = np.arange(0, height, block_height)
        offsets = (int(offsets[0]) + tops * row_bytes).astype(np.uint64)
        counts = (np.minimum(block_height, height - tops) * row_bytes).astype(np.uint64)
    level = Level(width, height, downsample, block_width, block_height, planes, coding, offsets, counts)
    _check_blocks(level, _name(page.compression))
    end = int((offsets.astype(np.float64) + counts).max(initial=0))  # integers would wrap
    if end > file_bytes:
        raise SlideError(
            ErrorCode.FILE_TRUNCATED,
            f"the file has {file_bytes:,} bytes, but its directory refers to {end:,}: upload it again",
        )
    return level


def downsample_of(page: Any, full: Any) -> float | None:
    """Returns the downsample of a `tifffile.TiffPage`; None if it is no smaller copy of the page `full`.

    Writers halve repeatedly and drop or pad the odd pixel. So the downsample is a power of 2 if that explains the size,
    however far the ratios of a small level's edges are from it; else a near-integer ratio is rounded.
    """
    edges = int(page.imagewidth), int(page.imagelength)
    full_edges = int(full.imagewidth), int(full.imagelength)
    ratios = [full_edge / edge for full_edge, edge in zip(full_edges, edges, strict=True)]
    ratio = ratios[0] if full_edges[0] > full_edges[1] else ratios[1]  # the longer edge is the more exact
    for downsample in (2.0 ** round(math.log2(ratio)), float(round(ratio)), sum(ratios) / 2):
        if downsample and all(abs(n / downsample - edge) < 2 for n, edge in zip(full_edges, edges, strict=True)):
            return downsample if downsample > 1.5 else None
    return None


def _check_blocks(level: Level, compression: str) -> None:
    """Refuses a wrong number of blocks, and blocks that cost more to read than their pixels explain."""
    size = f"{level.width_px} x {level.height_px} px"
    block_size = f"{level.block_width} x {level.block_height}"
    block_px, n_blocks = level.block_width * level.block_height, level.columns * level.rows
    expected = n_blocks * level.planes
    if block_px * level.coding.samples > _MAX_BLOCK_BYTES:
        raise SlideError(
            ErrorCode.UNSUPPORTED_FORMAT,
            f"{size}, {compression}, are stored in blocks of {block_size}: too large to read in parts; convert it, for "
            "example with `vips tiffsave in out.tif --tile --pyramid --compression jpeg`",
        )
    found = len(level.offsets)
    if found != expected or len(level.counts) != expected:
        raise damaged_header(f"{size} in blocks of {block_size} need {expected} blocks, the directory lists {found}")
    if n_blocks > _MANY_BLOCKS and block_px < _LEAST_BLOCK_PX:
        raise SlideError(
            ErrorCode.SIZE_IMPLAUSIBLE,
            f"{size} are stored in {n_blocks:,} blocks of {block_size} px, too small to be read one by one: upload the slide "
            "again, or export it in tiles of 256 px",
        )
    most_bytes = _MOST_BYTES_PER_SAMPLE * block_px * level.coding.samples + _MOST_EXTRA_BYTES
    largest = int(level.counts.max(initial=0, where=level.offsets > 0))
    if largest > most_bytes:
        raise SlideError(
            ErrorCode.TILE_DATA_CORRUPT,
            f"a block of {block_size} px takes {largest:,} bytes, over the limit of {most_bytes:,}: upload the slide again",
        )


def _coding(page: Any) -> Coding:
    tables, header = page.jpegtables or b"", page.jpegheader or b""
    if not isinstance(tables, bytes):
        raise damaged_header(f"its JPEG tables are {tables!r:.40}")
    if (n_bytes := max(len(tables), len(header))) > _MOST_TABLES_BYTES:
        raise damaged_header(f"its JPEG tables take {n_bytes:,} bytes, over the limit of {_MOST_TABLES_BYTES:,}")
    photometric = page.photometric
    if page.parent.is_svs:
        photometric = _APERIO_PHOTOMETRICS.get(page.compression, photometric)
    return Coding(
        compression=int(page.compression),
        photometric=int(photometric),
        samples=int(page.samplesperpixel),
        predictor=int(page.predictor),
        premultiplied=EXTRASAMPLE.ASSOCALPHA in (page.extrasamples or ()),
        is_tiled=bool(page.is_tiled or header),
        jpeg_tables=tables,
        jpeg_header=header,
    )


def _faults(page: Any) -> Iterator[str]:
    """Yields each property of a page that is not read, and what is read instead."""
    samples, extra = int(page.samplesperpixel), set(page.extrasamples or ())
    compression, photometric = _name(page.compression), _name(page.photometric)
    is_jpeg, is_grey = page.compression == JPEG, page.photometric == PHOTOMETRIC.MINISBLACK
    is_rgb, is_ycbcr = page.photometric == PHOTOMETRIC.RGB, page.photometric == PHOTOMETRIC.YCBCR
    if page.compression not in SUPPORTED:
        readable = "NONE, JPEG, JPEG 2000, LZW, DEFLATE, PACKBITS, ZSTD and WEBP are read"
        yield f"its compression is {compression}; {readable}"
    if page.bitspersample != 8:
        yield f"it has {page.bitspersample} bits per sample; 8 are read"
    if page.dtype != np.uint8:
        yield f"its sample format is {_name(page.sampleformat)}; unsigned integers are read"
    if not (is_grey or is_rgb or is_ycbcr):
        yield f"its photometric interpretation is {photometric}; RGB, YCBCR and MINISBLACK (grey) are read"
    if is_ycbcr and not is_jpeg and page.compression not in JPEG2000:  # whose decoders give RGB
        yield f"its photometric interpretation is YCBCR with {compression} compression; YCBCR is read of JPEG and JPEG 2000"
    if is_ycbcr and samples > 1 and page.planarconfig == PLANARCONFIG.SEPARATE:
        yield "its planar configuration is SEPARATE with YCBCR; YCBCR is read with the planar configuration CONTIG"
    # Further samples of grey are channels, except alpha, and except RGB under grey's number, without extra samples.
    is_alpha = samples == 2 and extra & {EXTRASAMPLE.ASSOCALPHA, EXTRASAMPLE.UNASSALPHA}
    if is_grey and samples > 1 and not is_alpha and (samples != 3 or extra):
        yield f"it has {samples} channels, {photometric} samples of one pixel; one channel or RGB is read"
    if not 1 <= samples <= 4:
        yield f"it has {samples} samples per pixel; 1 to 4 are read"
    if is_rgb and samples < 3:
        yield f"it has {samples} samples per pixel in RGB; 3 and 4 are read of RGB"
    if is_jpeg and samples not in (1, 3):
        yield f"it has {samples} samples per pixel in JPEG; 1 and 3 are read of JPEG"
    if page.imagedepth != 1:
        yield f"it has {page.imagedepth} focal planes in one directory (ImageDepth); 1 is read"
    if page.fillorder != 1:
        yield f"its fill order is {_name(page.fillorder)}; MSB2LSB is read"
    if int(page.predictor) not in (1, 2):
        yield f"its predictor is {_name(page.predictor)}; NONE and HORIZONTAL are read"


def _name(code: Any) -> str:
    """Returns TIFF's name of one of its numbers, if tifffile knows it."""
    return str(getattr(code, "name", code))


def _is_contiguous(offsets: Offsets, counts: Offsets) -> bool:
    return len(offsets) == len(counts) > 0 and offsets[0] > 0 and bool((offsets[1:] == (offsets + counts)[:-1]).all())
