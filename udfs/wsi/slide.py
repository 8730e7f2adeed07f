"""Open a slide from any fsspec URI and read it: the whole at 1/16, or tiles anywhere, each block decoded once."""

import logging
from collections import Counter
from collections.abc import Iterator
from types import TracebackType
from typing import Any, Literal, Self, cast

import numpy as np
import tifffile
from numpy.typing import ArrayLike, NDArray
from tiffslide import TiffSlide

from udfs.wsi.errors import ErrorCode, SlideError
from udfs.wsi.level import Level, Pixels, level_of
from udfs.wsi.storage import File, FileInfo, StorageOptions

_MAX_EDGE_PX = 1_000_000
_MAX_AREA_PX = 60_000_000_000  # 245,000 px squared; at 1/16 this takes 700 MB
_MAX_PAGES = 200
_MPP_RANGE = (0.02, 20.0)  # um/px; outside lie the 72 and 96 dpi of image editors, not scanners
_TILES_A_FETCH = 16  # tiles whose blocks are asked for in one call
_BLOCKS_A_FETCH = 64

# tifffile reports what it stumbles over on its logger; here it becomes a SlideError or is of no interest to users.
logging.getLogger("tifffile").setLevel(logging.CRITICAL)


def open_slide(uri: str, storage_options: StorageOptions | None = None) -> "Slide":
    """Open a slide.

    Args:
        uri: a path or any fsspec URI of a TIFF-based slide (TIFF, SVS, NDPI, SCN, BIF).
        storage_options: for fsspec.

    Raises:
        SlideError: with the code and remedy for what is wrong with the file.
    """
    return Slide(File(uri, storage_options))


class Slide:
    """A slide that is open. Use it as a context manager."""

    width_px: int
    height_px: int
    mpp_x: float | None  # micrometres a level-0 pixel as the header says, None where it does not or can't be true
    mpp_y: float | None
    vendor: str
    levels: tuple[Level, ...]  # level 0 first

    def __init__(self, file: File) -> None:
        """Read the directories of the file; see `open_slide`."""
        self._file = file
        self._stream = file.open()
        try:
            _check_magic(self._stream.read(16), file)
            self._stream.seek(0)
            self._read_header()
        except BaseException:
            self._stream.close()
            raise

    @property
    def file(self) -> FileInfo:
        """Size and version of the file that was opened."""
        return self._file.info

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the file."""
        self._stream.close()

    def downsampled(self, factor: int = 16) -> Pixels:
        """The slide at 1/factor: each pixel the mean over factor x factor level-0 pixels, rounded half up.

        Averaged from the nearest finer level whose downsample divides `factor`. Streams a row of blocks at a time, so
        memory does not grow with the slide but for the result.

        Args:
            factor: a positive integer.

        Returns:
            uint8 [height_px // factor, width_px // factor, 3]; the rest of an edge that fills no whole pixel is dropped.

        Raises:
            SlideError: `tile_data_corrupt` and what reading raises.
        """
        # A level of just this downsample would do, but its own compression would show in every pixel of the result.
        finer = [lv for lv in self.levels if lv.downsample < factor and not factor % lv.downsample]
        level = max(finer, key=lambda lv: lv.downsample, default=self.levels[0])
        edge = factor // int(level.downsample)  # level pixels a result pixel
        result = np.full((self.height_px // factor, self.width_px // factor, 3), 255, np.uint8)
        bands = _Bands(result, edge)
        for row in range(level.rows):
            top = row * level.block_height
            for start in range(0, level.columns, _BLOCKS_A_FETCH):
                stop = min(start + _BLOCKS_A_FETCH, level.columns)
                numbers = [row * level.columns + column for column in range(start, stop)]
                for number, pixels in zip(numbers, self._decode(level, numbers), strict=True):
                    bands.add(pixels, top, (number - row * level.columns) * level.block_width)
            bands.flush(min(top + level.block_height, level.height_px))
        return result

    def read_tiles(
        self, xy_px: ArrayLike, tile_px: int = 448, level: int = 0
    ) -> Iterator[tuple[int, NDArray[np.uint8]]]:
        """Read square tiles.

        Each block is fetched and decoded once however many tiles share it, and dropped after the last of them.

        Args:
            xy_px: int [n, 2], top-left corners in level-0 pixels, in any order and any place.
            tile_px: edge of a tile in pixels of `level`.
            level: index into `levels`.

        Yields:
            (i, pixels): the index into `xy_px` and uint8 [tile_px, tile_px, 3]; white outside the slide. The order is
            by rows of the level, whatever the order of `xy_px`.

        Raises:
            SlideError: `tile_data_corrupt` and what reading raises.
        """
        lv = self.levels[level]
        corners = np.rint(np.asarray(xy_px, np.float64).reshape(-1, 2) / lv.downsample).astype(np.int64)
        order = np.lexsort((corners[:, 0], corners[:, 1]))
        blocks_of = {int(i): _blocks_under(lv, corners[i], tile_px) for i in order}
        uses = Counter(block for blocks in blocks_of.values() for block in blocks)
        decoded: dict[int, Pixels] = {}
        for start in range(0, len(order), _TILES_A_FETCH):
            chunk = [int(i) for i in order[start : start + _TILES_A_FETCH]]
            missing = sorted({block for i in chunk for block in blocks_of[i]} - decoded.keys())
            decoded.update(zip(missing, self._decode(lv, missing), strict=True))
            for i in chunk:
                yield i, _assemble(lv, corners[i], tile_px, {block: decoded[block] for block in blocks_of[i]})
                for block in blocks_of[i]:
                    uses[block] -= 1
                    if not uses[block]:
                        del decoded[block]

    def _decode(self, level: Level, blocks: list[int]) -> Iterator[Pixels]:
        """Fetch the blocks in one call, then decode them one by one."""
        ranges = [level.byte_ranges(block) for block in blocks]
        wanted = [pair for planes in ranges for pair in planes if pair[1]]
        data = iter(self._file.ranges([s for s, _ in wanted], [c for _, c in wanted]) if wanted else [])
        for block, planes in zip(blocks, ranges, strict=True):
            try:
                yield level.decode(block, [next(data) if count else b"" for _, count in planes])
            except SlideError as error:
                raise SlideError(error.code, f"{self._file.uri}: {error.message}") from None

    def _read_header(self) -> None:
        uri, size = self._file.uri, self._file.info.size_bytes
        try:
            slide = TiffSlide(cast(Any, self._stream))
            pages = _image_pages(slide.ts_tifffile)
            base = max(pages, key=lambda page: int(page.imagewidth) * int(page.imagelength))
            width, height = int(base.imagewidth), int(base.imagelength)
            if max(width, height) > _MAX_EDGE_PX or width * height > _MAX_AREA_PX:
                raise SlideError(
                    ErrorCode.SIZE_IMPLAUSIBLE,
                    f"{uri}: the header claims {width} x {height} px, over the limit of {_MAX_EDGE_PX} px a side and "
                    f"{_MAX_AREA_PX} px in all: the header is damaged; upload or export the slide again",
                )
            self.levels = _pyramid(base, pages)
            properties = slide.properties
        except SlideError as error:
            message = error.message if uri in error.message else f"{uri}: {error.message}"
            raise SlideError(error.code, message) from None
        except Exception as error:
            text = self._file.redact(f"{type(error).__name__}: {error}")
            raise SlideError(
                ErrorCode.HEADER_CORRUPT, f"{uri}: the TIFF directory can't be read ({text}): upload the slide again"
            ) from None
        end = max(level.end_byte for level in self.levels)
        if end > size:
            raise SlideError(
                ErrorCode.FILE_TRUNCATED,
                f"{uri} has {size:,} bytes where the header counts on {end:,}: upload it again",
            )
        self.width_px, self.height_px = width, height
        self.vendor = str(properties.get("tiffslide.vendor") or "unknown")
        self.mpp_x = _plausible_mpp(properties.get("tiffslide.mpp-x"))
        self.mpp_y = _plausible_mpp(properties.get("tiffslide.mpp-y"))


class _Bands:
    """Running sums of result rows, so that only the rows under the current row of blocks are in memory."""

    def __init__(self, result: Pixels, edge: int) -> None:
        self._result, self._edge = result, edge
        self._first = 0  # result row that sums[0] belongs to
        self._sums = np.zeros((0, result.shape[1], 3), np.uint32)

    def add(self, pixels: Pixels, top: int, left: int) -> None:
        """Add a block whose top-left corner is at (left, top) in level pixels."""
        rows, row_starts = _cells(top, pixels.shape[0], self._edge, self._result.shape[0])
        columns, column_starts = _cells(left, pixels.shape[1], self._edge, self._result.shape[1])
        if not len(rows) or not len(columns):
            return
        inside = pixels[: rows.stop * self._edge - top, : columns.stop * self._edge - left]
        # uint16 holds 257 rows of 255; a coarser average than 1/257 needs more
        narrow = np.uint16 if self._edge <= 257 else np.uint32
        sums = np.add.reduceat(inside, row_starts, axis=0, dtype=narrow)
        sums = np.add.reduceat(sums, column_starts, axis=1, dtype=np.uint32)
        short = rows.stop - self._first - len(self._sums)
        if short > 0:
            self._sums = np.concatenate([self._sums, np.zeros((short, *self._sums.shape[1:]), np.uint32)])
        self._sums[rows.start - self._first : rows.stop - self._first, columns.start : columns.stop] += sums

    def flush(self, bottom: int) -> None:
        """Write the result rows that end at or above level row `bottom`."""
        done = min(bottom // self._edge, self._result.shape[0]) - self._first
        if done > 0:
            area = self._edge * self._edge
            self._result[self._first : self._first + done] = (self._sums[:done] + area // 2) // area
            self._sums, self._first = self._sums[done:], self._first + done


def _cells(start: int, length: int, edge: int, limit: int) -> tuple[range, NDArray[np.intp]]:
    """The result cells that [start, start + length) touches, and where each begins, counted from `start`."""
    cells = range(min(start // edge, limit), min(-(-(start + length) // edge), limit))
    return cells, np.maximum(np.asarray(cells, np.intp) * edge - start, 0)


def _blocks_under(level: Level, corner: NDArray[np.int64], tile_px: int) -> list[int]:
    x, y = int(corner[0]), int(corner[1])
    columns = range(max(x // level.block_width, 0), min(-(-(x + tile_px) // level.block_width), level.columns))
    rows = range(max(y // level.block_height, 0), min(-(-(y + tile_px) // level.block_height), level.rows))
    return [row * level.columns + column for row in rows for column in columns]


def _assemble(level: Level, corner: NDArray[np.int64], tile_px: int, blocks: dict[int, Pixels]) -> Pixels:
    tile = np.full((tile_px, tile_px, 3), 255, np.uint8)
    for number, pixels in blocks.items():
        row, column = divmod(number, level.columns)
        left, top = column * level.block_width - int(corner[0]), row * level.block_height - int(corner[1])
        x0, y0 = max(left, 0), max(top, 0)
        x1, y1 = min(left + pixels.shape[1], tile_px), min(top + pixels.shape[0], tile_px)
        if x1 > x0 and y1 > y0:
            tile[y0:y1, x0:x1] = pixels[y0 - top : y1 - top, x0 - left : x1 - left]
    return tile


def _check_magic(head: bytes, file: File) -> None:
    """Say what the file is where it is no TIFF, and where its first directory lies beyond its end."""
    kinds = {b"\xff\xd8\xff": "a JPEG image", b"\x89PNG": "a PNG image", b"PK": "a zip archive", b"%PDF": "a PDF"}
    order: Literal["little", "big"] = "little" if head[:2] == b"II" else "big"
    version = int.from_bytes(head[2:4], order) if head[:2] in (b"II", b"MM") else 0
    if version not in (42, 43):
        kind = next((name for magic, name in kinds.items() if head.startswith(magic)), "no TIFF")
        if kind == "no TIFF" and head.isascii() and head.decode().isprintable():
            kind = "a text file"
        raise SlideError(
            ErrorCode.NOT_A_SLIDE, f"{file.uri} is {kind}, whatever its name says: upload the slide itself"
        )
    first = int.from_bytes(head[4:8] if version == 42 else head[8:16], order)
    if first + 2 > file.info.size_bytes:
        raise SlideError(
            ErrorCode.FILE_TRUNCATED,
            f"{file.uri} has {file.info.size_bytes:,} bytes, its directory begins at {first:,}: upload it again",
        )


def _image_pages(tiff: Any) -> list[Any]:
    """Every directory that holds an image, those of SubIFDs included."""
    pages: list[Any] = []
    for index, page in enumerate(tiff.pages):
        if index >= _MAX_PAGES:
            break
        full = page.aspage() if isinstance(page, tifffile.TiffFrame) else page
        pages.append(full)
        if full.pages is not None:
            pages.extend(full.pages)
    images = [page for page in pages if page.imagewidth and page.imagelength]
    if not images:
        raise ValueError("no directory holds an image")
    return images


def _pyramid(base: Any, pages: list[Any]) -> tuple[Level, ...]:
    """Level 0 and the pages that are smaller copies of it, told by structure: labels and macro images have other shapes."""
    size = int(base.imagewidth), int(base.imagelength)
    levels = {1.0: level_of(base)}
    for page in pages:
        if page is base or not _is_reduction(base, page):
            continue
        try:
            level = level_of(page, size)
        except SlideError:
            continue  # level 0 is good, which is enough
        levels.setdefault(level.downsample, level)
    return tuple(levels[downsample] for downsample in sorted(levels))


def _is_reduction(base: Any, page: Any) -> bool:
    # A thumbnail has the slide's shape too, but scanners store it in strips beside a tiled level 0.
    if base.is_tiled and not page.is_tiled:
        return False
    if page.samplesperpixel != base.samplesperpixel or page.dtype != base.dtype:
        return False
    downsample = (base.imagewidth / page.imagewidth + base.imagelength / page.imagelength) / 2
    close = max(
        abs(base.imagewidth / downsample - page.imagewidth), abs(base.imagelength / downsample - page.imagelength)
    )
    whole = abs(downsample - round(downsample)) < 0.05 * downsample
    return bool(downsample > 1.5 and close < 2.0 and (page.is_tiled or (whole and page.subfiletype & 1)))


def _plausible_mpp(value: Any) -> float | None:
    try:
        mpp = float(value)
    except (TypeError, ValueError):
        return None
    return mpp if _MPP_RANGE[0] <= mpp <= _MPP_RANGE[1] else None
