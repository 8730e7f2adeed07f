"""From a page of a TIFF to a level: its grid of blocks, or the reason why it can't be read."""

import math
from dataclasses import replace
from typing import Any

import numpy as np
import tifffile
from numpy.typing import NDArray

from udfs.wsi.errors import ErrorCode, SlideError
from udfs.wsi.tiff.decode import JPEG, JPEG2000, SUPPORTED, UNCOMPRESSED
from udfs.wsi.tiff.index import Coding, Level

_MAX_BLOCK_BYTES = 256 * 1024 * 1024  # decoded; a larger one can't be read in bounded memory
_MANY_BLOCKS = 65_536  # more of them have at least so many pixels each:
_LEAST_BLOCK_PX = 1024  # reading a block takes as long as this many pixels do
_MOST_BYTES_PER_SAMPLE = 4  # of a block as it is stored; no codec makes noise so large
_MOST_EXTRA_BYTES = 1024 * 1024  # of a block, beside its pixels: colour profiles and the like
_MOST_TABLES_BYTES = 64 * 1024  # put before every block; encoders write about 1 KB
_RAW_ROWS_BYTES = 4 * 1024 * 1024  # uncompressed strips are cut into pieces of about this size
_RGB_PHOTOMETRICS = (tifffile.PHOTOMETRIC.RGB, tifffile.PHOTOMETRIC.MINISBLACK)
_ALPHA = (tifffile.EXTRASAMPLE.ASSOCALPHA, tifffile.EXTRASAMPLE.UNASSALPHA)
_COMPRESSIONS = "NONE, JPEG, JPEG 2000, LZW, DEFLATE, PACKBITS, ZSTD and WEBP are read"
_YCBCR_COMPRESSIONS = (JPEG, *JPEG2000)  # whose decoders give RGB
# Aperio says RGB of all its JPEG 2000; what a block holds, the compression says, as OpenSlide reads it. Others use these
# compressions, too, and mean the photometric tag (Bio-Formats: 33003 for RGB).
_APERIO_PHOTOMETRICS = {33003: tifffile.PHOTOMETRIC.YCBCR, 33005: tifffile.PHOTOMETRIC.RGB}

Offsets = NDArray[np.uint64]


def level_of(page: Any, downsample: float = 1.0) -> Level:
    """Returns the level that a `tifffile.TiffPage` holds. `downsample` is from `downsample_of`.

    Raises:
        SlideError: `unsupported_format` for sample formats that are not read, `header_corrupt` if the directory contradicts
            itself, `size_implausible` and `tile_data_corrupt` for blocks that are too many or too large.
    """
    _check_samples(page)
    width, height = int(page.imagewidth), int(page.imagelength)
    planes = int(page.samplesperpixel) if page.planarconfig == tifffile.PLANARCONFIG.SEPARATE else 1
    if page.is_tiled:
        block_width, block_height = int(page.tilewidth), int(page.tilelength)
    else:
        block_width, block_height = width, min(int(page.rowsperstrip) or height, height)
    if min(width, height, block_width, block_height) < 1:
        raise SlideError(
            ErrorCode.HEADER_CORRUPT,
            f"{width} x {height} px in blocks of {block_width} x {block_height}: the header is damaged; upload the slide again",
        )
    offsets: Offsets = np.asarray(page.dataoffsets, np.uint64)
    counts: Offsets = np.asarray(page.databytecounts, np.uint64)
    samples = int(page.samplesperpixel)
    coding = _coding(page)
    if coding.jpeg_header and len(offsets) != -(-width // block_width) * -(-height // block_height):
        # Restart intervals that run on over the end of a row are no blocks.
        block_width, block_height = width, height
        offsets, counts = (np.asarray(page.tags[code].value[:1], np.uint64) for code in (273, 279))
        coding = replace(coding, jpeg_header=b"", is_tiled=False)
    if page.compression == UNCOMPRESSED and not page.is_tiled and planes == 1 and _is_contiguous(offsets, counts):
        block_height = max(1, min(height, _RAW_ROWS_BYTES // (width * samples)))
        row_bytes = width * samples
        tops = np.arange(0, height, block_height)
        offsets = (int(offsets[0]) + tops * row_bytes).astype(np.uint64)
        counts = (np.minimum(block_height, height - tops) * row_bytes).astype(np.uint64)
    if block_width * block_height * samples > _MAX_BLOCK_BYTES:
        raise SlideError(
            ErrorCode.UNSUPPORTED_FORMAT,
            f"{width} x {height} px, {_name(page.compression)}, are stored in blocks of {block_width} x {block_height}: too "
            "large to read in parts; "
            "convert it, for example with `vips tiffsave in out.tif --tile --pyramid --compression jpeg`",
        )
    level = Level(
        width,
        height,
        downsample,
        block_width,
        block_height,
        planes,
        coding,
        offsets,
        counts,
    )
    expected = level.columns * level.rows * planes
    if len(offsets) != expected or len(counts) != expected:
        raise SlideError(
            ErrorCode.HEADER_CORRUPT,
            f"{width} x {height} px in blocks of {block_width} x {block_height} need {expected} blocks, "
            f"the directory lists {len(offsets)}: upload the slide again",
        )
    _check_blocks(level)
    return level


def downsample_of(width: int, height: int, full_size_px: tuple[int, int]) -> float | None:
    """Returns the downsample of an image; None if its shape is not that of level 0.

    Writers halve repeatedly and drop or pad the odd pixel. So the downsample is a power of 2 if that explains the size,
    however far the ratios of a small level's edges are from it; else a near-integer ratio is rounded.
    """
    ratios = full_size_px[0] / width, full_size_px[1] / height
    ratio = ratios[0] if full_size_px[0] > full_size_px[1] else ratios[1]  # the longer edge is the more exact
    for downsample in (2.0 ** round(math.log2(ratio)), float(round(ratio)), sum(ratios) / 2):
        if (
            downsample
            and max(abs(full_size_px[0] / downsample - width), abs(full_size_px[1] / downsample - height)) < 2
        ):
            return downsample
    return None


def _check_blocks(level: Level) -> None:
    """Refuse blocks that cost more to read than their pixels explain."""
    block_px = level.block_width * level.block_height
    n_blocks = level.columns * level.rows
    if n_blocks > _MANY_BLOCKS and block_px < _LEAST_BLOCK_PX:
        raise SlideError(
            ErrorCode.SIZE_IMPLAUSIBLE,
            f"{level.width_px} x {level.height_px} px are stored in {n_blocks:,} blocks of {level.block_width} x "
            f"{level.block_height} px, too small to be read one by one: upload the slide again, or export it in tiles of 256 px",
        )
    most_bytes = _MOST_BYTES_PER_SAMPLE * block_px * level.coding.samples + _MOST_EXTRA_BYTES
    largest = int(level.counts.max(initial=0, where=level.offsets > 0))
    if largest > most_bytes:
        raise SlideError(
            ErrorCode.TILE_DATA_CORRUPT,
            f"a block of {level.block_width} x {level.block_height} px that takes {largest:,} bytes, over the limit of "
            f"{most_bytes:,}: upload the slide again",
        )


def _coding(page: Any) -> Coding:
    tables = page.jpegtables or b""
    if not isinstance(tables, bytes):
        raise SlideError(
            ErrorCode.HEADER_CORRUPT,
            f"its JPEG tables are {tables!r:.40}: the header is damaged; upload the slide again",
        )
    n_bytes = max(len(tables), len(page.jpegheader or b""))
    if n_bytes > _MOST_TABLES_BYTES:
        raise SlideError(
            ErrorCode.HEADER_CORRUPT,
            f"its JPEG tables take {n_bytes:,} bytes, over the limit of {_MOST_TABLES_BYTES:,}: the header is damaged; upload "
            "the slide again",
        )
    photometric = page.photometric
    if page.parent.is_svs:
        photometric = _APERIO_PHOTOMETRICS.get(page.compression, photometric)
    return Coding(
        compression=int(page.compression),
        photometric=int(photometric),
        samples=int(page.samplesperpixel),
        predictor=int(page.predictor),
        premultiplied=tifffile.EXTRASAMPLE.ASSOCALPHA in (page.extrasamples or ()),
        is_tiled=bool(page.is_tiled) or bool(page.jpegheader),
        jpeg_tables=tables,
        jpeg_header=page.jpegheader or b"",
    )


def _check_samples(page: Any) -> None:
    """Refuse a page by the first of its properties that is not read."""
    samples, bits = int(page.samplesperpixel), page.bitspersample
    compression, photometric = _name(page.compression), _name(page.photometric)
    is_jpeg = page.compression == JPEG
    is_ycbcr = page.photometric == tifffile.PHOTOMETRIC.YCBCR
    is_apart = page.planarconfig == tifffile.PLANARCONFIG.SEPARATE and samples > 1
    extra = page.extrasamples or ()
    # Grey has one sample. Others are channels, except alpha, and except RGB under grey's number: its three samples are
    # none of them extra.
    is_channels = page.photometric == tifffile.PHOTOMETRIC.MINISBLACK and (
        samples > 3 or (samples == 3 and len(extra) > 0) or (samples == 2 and not set(extra) & set(_ALPHA))
    )
    checks = (
        (page.compression in SUPPORTED, f"its compression is {compression}", _COMPRESSIONS),
        (bits == 8, f"it has {bits} bits per sample", "8 are read"),
        (page.dtype == np.uint8, f"its sample format is {_name(page.sampleformat)}", "unsigned integers are read"),
        (
            page.photometric in _RGB_PHOTOMETRICS or is_ycbcr,
            f"its photometric interpretation is {photometric}",
            "RGB, YCBCR and MINISBLACK (grey) are read",
        ),
        (
            not is_ycbcr or page.compression in _YCBCR_COMPRESSIONS,
            f"its photometric interpretation is YCBCR with {compression} compression",
            "YCBCR is read of JPEG and JPEG 2000",
        ),
        (
            not (is_ycbcr and is_apart),
            "its planar configuration is SEPARATE with YCBCR",
            "YCBCR is read with the planar configuration CONTIG",
        ),
        (
            not is_channels,
            f"it has {samples} channels, {photometric} samples of one pixel",
            "one channel or RGB is read",
        ),
        (1 <= samples <= 4, f"it has {samples} samples per pixel", "1 to 4 are read"),
        (
            samples >= 3 or page.photometric != tifffile.PHOTOMETRIC.RGB,
            f"it has {samples} samples per pixel in RGB",
            "3 and 4 are read of RGB",
        ),
        (not is_jpeg or samples in (1, 3), f"it has {samples} samples per pixel in JPEG", "1 and 3 are read of JPEG"),
        (page.imagedepth == 1, f"it has {page.imagedepth} focal planes in one directory (ImageDepth)", "1 is read"),
        (page.fillorder == 1, f"its fill order is {_name(page.fillorder)}", "MSB2LSB is read"),
        (int(page.predictor) in (1, 2), f"its predictor is {_name(page.predictor)}", "NONE and HORIZONTAL are read"),
    )
    for is_read, fault, what in checks:
        if not is_read:
            raise SlideError(
                ErrorCode.UNSUPPORTED_FORMAT, f"{fault}; {what}: convert it, for example with QuPath or libvips"
            )


def _name(code: Any) -> str:
    """TIFF's name of one of its numbers, if tifffile knows it."""
    return str(getattr(code, "name", code))


def _is_contiguous(offsets: Offsets, counts: Offsets) -> bool:
    return len(offsets) == len(counts) > 0 and offsets[0] > 0 and bool((offsets[1:] == (offsets + counts)[:-1]).all())
