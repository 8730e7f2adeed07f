"""Blocks of a level, fetched ahead and decoded once each; a missing or damaged block is made from a finer level."""

import math
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from udfs.wsi.errors import SlideError
from udfs.wsi.reading.averaging import AreaAverage
from udfs.wsi.reading.fetching import Fetcher
from udfs.wsi.store import File
from udfs.wsi.tiff.decode import WHITE, Pixels, decode_block, new_buffer, scale_for
from udfs.wsi.tiff.index import Level, Numbers, lost_blocks

Finer = Callable[[], Sequence[Level]]
_Decoded = Pixels | SlideError | None


class BlockReader:
    """Reads blocks of one level. Fetching begins at once, decoding when the blocks are iterated over."""

    def __init__(
        self, file: File, level: Level, blocks: Sequence[int], *, finer: Finer = tuple, scale: int = 1, threads: int = 1
    ) -> None:
        """Begins to fetch the blocks. `scale` is that of `decode_block`; `threads` is the number of threads that decode.

        `finer` returns the finer levels with all their blocks, level 0 first. It is called if a block is missing or does not
        decode: scanners lose blocks of coarse levels whose pixels level 0 has.
        """
        self._file, self._level, self._blocks = file, level, blocks
        self._finer, self._scale, self._threads = finer, scale, threads
        starts, counts = level.byte_ranges(blocks)
        self._is_repeated = _repeated(level, blocks, starts, counts)
        self._ahead = Fetcher(file, starts.reshape(-1), counts.reshape(-1))

    def __iter__(self) -> Iterator[tuple[int, Pixels | None]]:
        """Yields (block, pixels) in the order of `blocks`; None for background.

        The pixels are valid until the next block: their memory is reused. Raises SlideError `tile_data_corrupt` and what
        reading raises.
        """
        with closing(self._ahead):
            for block, decoded in self._decode_here() if self._threads == 1 else self._decode_in_threads():
                yield block, decoded if isinstance(decoded, np.ndarray) else self._replaced(block, decoded)

    def close(self) -> None:
        """Gives up what is on its way."""
        self._ahead.close()

    def _decode_here(self) -> Iterator[tuple[int, _Decoded]]:
        buffer = new_buffer(self._level)
        decoded: _Decoded = None
        for i, block in enumerate(self._blocks):
            data = self._data(i)
            if not self._is_repeated[i]:
                decoded = self._decode(block, data, buffer)
            yield block, decoded

    def _decode_in_threads(self) -> Iterator[tuple[int, _Decoded]]:
        # One buffer more than blocks under way: the caller uses its pixels.
        buffers = deque(new_buffer(self._level) for _ in range(2 * self._threads + 1))
        under_way: deque[tuple[int, Future[_Decoded]]] = deque()
        with ThreadPoolExecutor(self._threads, "slidelake-decode") as pool:
            for i, block in enumerate(self._blocks):
                if len(under_way) == 2 * self._threads:
                    done, future = under_way.popleft()
                    yield done, future.result()
                data = self._data(i)
                if self._is_repeated[i]:
                    under_way.append((block, under_way[-1][1]))
                    continue
                buffers.rotate()
                under_way.append((block, pool.submit(self._decode, block, data, buffers[0])))
            for done, future in under_way:
                yield done, future.result()

    def _data(self, i: int) -> list[memoryview]:
        planes = self._level.planes
        return [self._ahead.take(i * planes + plane) for plane in range(planes)]

    def _decode(self, block: int, data: list[memoryview], buffer: Pixels) -> _Decoded:
        try:
            return decode_block(self._level, block, data, buffer, self._scale)
        except SlideError as error:
            return SlideError(error.code, f"{self._file.uri}: {error.message}")

    def _replaced(self, block: int, error: SlideError | None) -> Pixels | None:
        if (error or block in self._lost) and self._source:
            source, finer = self._source
            is_whole = self._level.downsample % source.downsample == 0
            return (self._averaged if is_whole else self._resampled)(block, source, finer)
        if error:
            raise error
        return None

    @cached_property
    def _source(self) -> tuple[Level, Sequence[Level]] | None:
        """The nearest finer level, if possible one whose pixels fill a pixel here exactly, and the levels finer than that."""
        levels = self._finer()
        whole = [i for i, finer in enumerate(levels) if self._level.downsample % finer.downsample == 0]
        nearest = whole[-1] if whole else len(levels) - 1
        return (levels[nearest], levels[:nearest]) if levels else None

    @cached_property
    def _lost(self) -> frozenset[int]:
        """The blocks that are missing here and that a finer level has. Blocks that all levels lack are glass."""
        return lost_blocks(self._finer(), self._level) if self._level.lost is None else self._level.lost

    def _averaged(self, block: int, source: Level, finer: Sequence[Level]) -> Pixels:
        """Returns a block as the area average of its region in `source`."""
        level, scale = self._level, self._scale
        edge = round(level.downsample / source.downsample) * scale
        shrunk = scale_for(source, edge)
        edge //= shrunk  # pixels of the source, as they are decoded, that one pixel of the block spans
        row, column = divmod(block, level.columns)
        height = -(-min(level.block_height, level.height_px - row * level.block_height) // scale)
        width = -(-min(level.block_width, level.width_px - column * level.block_width) // scale)
        y, x = row * level.block_height // scale * edge, column * level.block_width // scale * edge
        bottom, right = y + height * edge, x + width * edge
        block_height, block_width = -(-source.block_height // shrunk), -(-source.block_width // shrunk)
        rows = range(y // block_height, min(-(-bottom // block_height), source.rows))
        columns = range(x // block_width, min(-(-right // block_width), source.columns))
        blocks = [r * source.columns + c for r in rows for c in columns]
        result = np.full((height, width, 3), WHITE, np.uint8)
        average = AreaAverage(result, edge)
        for number, pixels in BlockReader(self._file, source, blocks, finer=lambda: finer, scale=shrunk):
            r, c = divmod(number, source.columns)
            top, left = r * block_height, c * block_width
            stored = np.full((block_height, block_width, 3), WHITE, np.uint8) if pixels is None else pixels
            inside = stored[max(y - top, 0) : bottom - top, max(x - left, 0) : right - left]
            top, left = max(top, y), max(left, x)
            # A level whose size was rounded up ends behind the source, whose last pixels then stand for the rest.
            below = bottom - top - inside.shape[0] if r == rows[-1] else 0
            beside = right - left - inside.shape[1] if c == columns[-1] else 0
            average.add(np.pad(inside, ((0, below), (0, beside), (0, 0)), "edge"), top - y, left - x)
            if c == columns[-1]:
                average.flush(top - y + inside.shape[0] + below)
        return result

    def _resampled(self, block: int, source: Level, finer: Sequence[Level]) -> Pixels:
        """Returns a block as the area average of `source`, whose pixels count by the share that a pixel here covers.

        For levels whose downsample is a fraction. No mask is made of them, so they are never shrunk.
        """
        level, ratio = self._level, self._level.downsample / source.downsample
        row, column = divmod(block, level.columns)
        top, left = row * level.block_height, column * level.block_width
        bottom, right = min(top + level.block_height, level.height_px), min(left + level.block_width, level.width_px)
        rows, down = _shares(top, bottom, ratio, source.block_height, source.height_px)
        columns, across = _shares(left, right, ratio, source.block_width, source.width_px)
        region = np.full((down.shape[1], across.shape[1], 3), WHITE, np.uint8)
        blocks = [r * source.columns + c for r in rows for c in columns]
        for number, pixels in BlockReader(self._file, source, blocks, finer=lambda: finer):
            if pixels is not None:
                r, c = divmod(number, source.columns)
                y, x = (r - rows[0]) * source.block_height, (c - columns[0]) * source.block_width
                region[y : y + pixels.shape[0], x : x + pixels.shape[1]] = pixels
        means = np.stack([down @ plane @ across.T for plane in np.moveaxis(region, 2, 0)], axis=2)
        rounded: Pixels = (means + 0.5).astype(np.uint8)
        return rounded


def _shares(start: int, stop: int, ratio: float, block_px: int, length_px: int) -> tuple[range, NDArray[np.float64]]:
    """Returns the weights of source pixels in pixels [start, stop) of a coarser level, along one axis.

    The weights, float64 [stop - start, pixels of the blocks], add up to 1 per row; the blocks are those of the source along
    the axis. The last pixel of the source stands for whatever ends behind it.
    """
    edges = np.arange(start, stop + 1) * ratio
    last = (length_px - 1) // block_px
    blocks = range(min(int(edges[0] // block_px), last), min(math.ceil(edges[-1] / block_px), last + 1))
    pixels = np.arange(blocks.start * block_px, min(blocks.stop * block_px, length_px))
    ends = pixels + 1.0
    ends[-1] = max(ends[-1], edges[-1])
    covered = np.minimum(edges[1:, None], ends) - np.maximum(edges[:-1, None], pixels)
    return blocks, np.maximum(covered, 0.0) / ratio


def _repeated(level: Level, blocks: Sequence[int], starts: Numbers, counts: Numbers) -> list[bool]:
    """Returns which blocks equal the block before them in bytes and size: some writers store one white block for many."""
    rows, columns = np.divmod(np.asarray(blocks, np.int64), level.columns)
    heights = np.minimum(level.block_height, level.height_px - rows * level.block_height)
    widths = np.minimum(level.block_width, level.width_px - columns * level.block_width)
    stored = np.column_stack([starts, counts, heights, widths])
    return [False, *(stored[1:] == stored[:-1]).all(axis=1).tolist()][: len(stored)]
