"""One resolution of a slide as a grid of compressed blocks: where each lies in the file, and how it becomes RGB."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import simplejpeg
import tifffile
from numpy.typing import NDArray

from udfs.wsi.errors import ErrorCode, SlideError
from udfs.wsi.lzw import decode_lzw

Pixels = NDArray[np.uint8]  # [height, width, 3], RGB

_WHITE = 255
_MAX_BLOCK_BYTES = 256 * 1024 * 1024  # decoded; a larger one can't be read in bounded memory
_RAW_ROWS_BYTES = 4 * 1024 * 1024  # uncompressed strips are cut into pieces of about this size
_JPEG, _LZW, _UNCOMPRESSED = 7, 5, 1
_RGB_PHOTOMETRICS = (tifffile.PHOTOMETRIC.RGB, tifffile.PHOTOMETRIC.MINISBLACK)


@dataclass(frozen=True)
class Level:
    """A level of the pyramid. Its blocks are numbered row by row; `planes` > 1 where colours are stored apart."""

    width_px: int
    height_px: int
    downsample: float  # level-0 pixels a pixel, along an edge
    block_width: int
    block_height: int
    planes: int
    _offsets: Sequence[int] = field(repr=False)
    _counts: Sequence[int] = field(repr=False)
    _page: Any = field(repr=False)  # tifffile.TiffPage, untyped there

    @property
    def columns(self) -> int:
        """Blocks a row."""
        return -(-self.width_px // self.block_width)

    @property
    def rows(self) -> int:
        """Rows of blocks."""
        return -(-self.height_px // self.block_height)

    @property
    def end_byte(self) -> int:
        """The end of the last block in the file."""
        return max((o + c for o, c in zip(self._offsets, self._counts, strict=True)), default=0)

    def byte_ranges(self, block: int) -> list[tuple[int, int]]:
        """(start, count) of each plane of a block; count 0 where the writer left it out (sparse: background)."""
        step = self.columns * self.rows
        indices = range(block, block + step * self.planes, step)
        return [(int(self._offsets[i]), int(self._counts[i]) if self._offsets[i] else 0) for i in indices]

    def decode(self, block: int, data: Sequence[bytes]) -> Pixels:
        """RGB pixels of a block, cut to what lies inside the level.

        Args:
            block: the block's number.
            data: its bytes, one item a plane, empty where sparse.

        Raises:
            SlideError: `tile_data_corrupt`, naming the block.
        """
        row, column = divmod(block, self.columns)
        height = min(self.block_height, self.height_px - row * self.block_height)
        width = min(self.block_width, self.width_px - column * self.block_width)
        if not any(data):
            return np.full((height, width, 3), _WHITE, np.uint8)
        try:
            pixels = self._decode_jpeg(data[0]) if self._is_plain_jpeg else self._decode_any(block, data)
        except Exception as error:
            raise self._corrupt(row, column, f"{type(error).__name__}: {error}") from None
        if pixels.shape[0] < height or pixels.shape[1] < width:
            raise self._corrupt(row, column, f"decodes to {pixels.shape[1]} x {pixels.shape[0]} px")
        premultiplied = tifffile.EXTRASAMPLE.ASSOCALPHA in (self._page.extrasamples or ())
        return _to_rgb(pixels[:height, :width], premultiplied)

    def _corrupt(self, row: int, column: int, reason: str) -> SlideError:
        x, y = (round(n * self.downsample) for n in (column * self.block_width, row * self.block_height))
        return SlideError(
            ErrorCode.TILE_DATA_CORRUPT,
            f"the block at x={x}, y={y} (level-0 px) does not decode ({reason}): upload or scan the slide again",
        )

    @property
    def _is_plain_jpeg(self) -> bool:
        # NDPI (with a header of its own a level) and planar JPEG go the general way.
        return self._page.compression == _JPEG and self.planes == 1 and not self._page.jpegheader

    def _decode_jpeg(self, data: bytes) -> NDArray[np.uint8]:
        stream = _whole_jpeg(data, self._page.jpegtables, self._page.photometric == tifffile.PHOTOMETRIC.YCBCR)
        height, width, _, _ = simplejpeg.decode_jpeg_header(stream)
        if height > self.block_height or width > self.block_width:  # before it can ask for gigabytes
            raise ValueError(f"a JPEG of {width} x {height} px in a block of {self.block_width} x {self.block_height}")
        # strict: what libjpeg would patch over with grey is an error here, for nobody would ever see it
        pixels: NDArray[np.uint8] = simplejpeg.decode_jpeg(stream, colorspace="RGB", strict=True)
        return pixels

    def _decode_any(self, block: int, data: Sequence[bytes]) -> NDArray[np.uint8]:
        if self._page.compression == _UNCOMPRESSED:
            samples = self._page.samplesperpixel // self.planes
            parts = [np.frombuffer(part, np.uint8).reshape(-1, self.block_width, samples) for part in data]
            return np.concatenate(parts, axis=-1)
        step = self.columns * self.rows
        parts = []
        for plane, part in enumerate(data):
            if self._page.compression == _LZW:
                parts.append(self._decode_lzw(block, part))
                continue
            _check_jpeg2000(part, self.block_width, self.block_height)
            decoded, _, _ = self._page.decode(
                part,
                block + plane * step,
                jpegtables=self._page.jpegtables,
                jpegheader=self._page.jpegheader,
                _fullsize=False,
            )
            parts.append(decoded[0])
        return np.concatenate(parts, axis=-1)

    def _decode_lzw(self, block: int, data: bytes) -> NDArray[np.uint8]:
        height = self.block_height
        if not self._page.is_tiled:  # the last strip is as high as what is left
            height = min(height, self.height_px - block * height)
        samples = self._page.samplesperpixel // self.planes
        return decode_lzw(data, self.block_width, height, samples, int(self._page.predictor))


def level_of(page: Any, full_size_px: tuple[int, int] | None = None) -> Level:
    """The level that a page of a TIFF holds.

    Args:
        page: a `tifffile.TiffPage`.
        full_size_px: width and height of level 0; None for level 0 itself.

    Raises:
        SlideError: `unsupported_format` for sample formats that are not read, `header_corrupt` where the directory
            contradicts itself.
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
    offsets: Sequence[int] = page.dataoffsets
    counts: Sequence[int] = page.databytecounts
    samples = int(page.samplesperpixel)
    if page.compression == _UNCOMPRESSED and not page.is_tiled and planes == 1 and _is_contiguous(offsets, counts):
        block_height = max(1, min(height, _RAW_ROWS_BYTES // (width * samples)))
        row_bytes = width * samples
        starts = range(0, height, block_height)
        base = offsets[0]
        offsets = [base + row * row_bytes for row in starts]
        counts = [min(block_height, height - row) * row_bytes for row in starts]
    if block_width * block_height * samples > _MAX_BLOCK_BYTES:
        raise SlideError(
            ErrorCode.UNSUPPORTED_FORMAT,
            f"{width} x {height} px are stored in blocks of {block_width} x {block_height}: too large to read in parts; "
            "convert it, for example with `vips tiffsave in out.tif --tile --pyramid --compression jpeg`",
        )
    level = Level(
        width,
        height,
        _downsample(width, height, full_size_px),
        block_width,
        block_height,
        planes,
        offsets,
        counts,
        page,
    )
    expected = level.columns * level.rows * planes
    if len(offsets) != expected or len(counts) != expected:
        raise SlideError(
            ErrorCode.HEADER_CORRUPT,
            f"{width} x {height} px in blocks of {block_width} x {block_height} need {expected} blocks, "
            f"the directory lists {len(offsets)}: upload the slide again",
        )
    return level


def _downsample(width: int, height: int, full_size_px: tuple[int, int] | None) -> float:
    """Level-0 pixels a pixel. Writers halve and drop or pad the odd pixel, so a near-integer ratio is that integer."""
    if full_size_px is None:
        return 1.0
    ratio_x, ratio_y = full_size_px[0] / width, full_size_px[1] / height
    nearest = round((ratio_x + ratio_y) / 2)
    off_by = max(abs(full_size_px[0] / nearest - width), abs(full_size_px[1] / nearest - height)) if nearest else 2.0
    return float(nearest) if off_by < 2.0 else (ratio_x + ratio_y) / 2


def _check_samples(page: Any) -> None:
    compression = getattr(page.compression, "name", page.compression)
    photometric = getattr(page.photometric, "name", page.photometric)
    what = f"{page.bitspersample} bit, {page.samplesperpixel} samples a pixel, {photometric}, {compression}"
    remedy = "only 8-bit grey, RGB or RGBA are read; convert it, for example with QuPath or libvips"
    is_colour = page.photometric in _RGB_PHOTOMETRICS or (
        page.photometric == tifffile.PHOTOMETRIC.YCBCR and page.compression == _JPEG
    )
    samples = int(page.samplesperpixel)
    ok = page.dtype == np.uint8 and page.bitspersample == 8 and samples in (1, 2, 3, 4) and is_colour
    if not ok or (page.compression == _JPEG and samples in (2, 4)):
        raise SlideError(ErrorCode.UNSUPPORTED_FORMAT, f"{what}: {remedy}")


def _is_contiguous(offsets: Sequence[int], counts: Sequence[int]) -> bool:
    ends = [offset + count for offset, count in zip(offsets, counts, strict=False)]
    return bool(offsets) and offsets[0] > 0 and all(end == start for end, start in zip(ends, offsets[1:], strict=False))


def _whole_jpeg(data: bytes, tables: bytes | None, is_ycbcr: bool) -> bytes:
    """A stream that any decoder reads as the TIFF means it.

    TIFF keeps tables that blocks share in the directory, and says by its photometric tag whether the samples are RGB or
    YCbCr, where decoders look for an Adobe marker (transform 0 or 1) in the stream. A marker of the stream's own follows
    and so wins. TIFF Technical Note 2; ITU-T T.872, 6.5.3.
    """
    if data[:2] != b"\xff\xd8":
        raise ValueError("not a JPEG stream")
    adobe = b"\xff\xee\x00\x0eAdobe\x00\x64\x00\x00\x00\x00" + (b"\x01" if is_ycbcr else b"\x00")
    return b"\xff\xd8" + adobe + (tables[2:-2] if tables else b"") + data[2:]


def _check_jpeg2000(data: bytes, width: int, height: int) -> None:
    """Refuse a codestream that claims more pixels than its block, before OpenJPEG allocates them. ITU-T T.800, A.5.1."""
    at = data.find(b"\xff\x4f\xff\x51", 0, 256)  # start of codestream, image and tile size
    if at >= 0:
        right, bottom, left, top = (int.from_bytes(data[at + i : at + i + 4], "big") for i in (8, 12, 16, 20))
        if right - left > width or bottom - top > height:
            raise ValueError(f"a codestream of {right - left} x {bottom - top} px in a block of {width} x {height}")


def _to_rgb(pixels: NDArray[np.uint8], premultiplied: bool) -> Pixels:
    """[h, w, 1 to 4] to [h, w, 3]: grey repeated, alpha (2 or 4 samples) composited on white."""
    if pixels.ndim == 2:
        pixels = pixels[..., None]
    samples = pixels.shape[-1]
    if samples in (2, 4):
        alpha = pixels[..., -1:].astype(np.uint16)
        colour = pixels[..., :-1].astype(np.uint16) * (255 if premultiplied else alpha)
        blended = (colour.astype(np.uint32) + _WHITE * (255 - alpha) + 127) // 255
        pixels = np.minimum(blended, 255).astype(np.uint8)
    return np.repeat(pixels, 3, axis=-1) if pixels.shape[-1] == 1 else pixels
