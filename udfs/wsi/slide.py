"""Open a slide from any fsspec URI and read it: the whole at 1/16, or tiles anywhere, each block decoded once."""

from collections import Counter
from collections.abc import Iterator
from types import TracebackType
from typing import Self

import numpy as np
from numpy.typing import ArrayLike, NDArray

from udfs.wsi.averaging import AreaAverage
from udfs.wsi.errors import SlideError
from udfs.wsi.header import read_header
from udfs.wsi.level import Level, Pixels
from udfs.wsi.storage import File, FileInfo, StorageOptions

_TILES_A_FETCH = 16  # tiles whose blocks are asked for in one call
_BLOCKS_A_FETCH = 64


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
            header = read_header(file, self._stream)
        except BaseException:
            self._stream.close()
            raise
        self.width_px, self.height_px = header.width_px, header.height_px
        self.mpp_x, self.mpp_y = header.mpp_x, header.mpp_y
        self.vendor, self.levels = header.vendor, header.levels

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
        if not result.size:  # a slide smaller than one pixel of the result
            return result
        bands = AreaAverage(result, edge)
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
