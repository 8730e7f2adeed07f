"""Blocks of a level, fetched ahead and each decoded once, in the order asked for."""

from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing

from udfs.wsi.ahead import ReadAhead
from udfs.wsi.errors import SlideError
from udfs.wsi.store import File
from udfs.wsi.tiff.decode import Pixels, decode_block, new_buffer
from udfs.wsi.tiff.index import Level


class BlockReader:
    """Reads blocks of one level. Fetching begins at once, decoding when the blocks are asked for."""

    def __init__(self, file: File, level: Level, blocks: Sequence[int], *, scale: int = 1, threads: int = 1) -> None:
        """See `decode_block` for `scale`; `threads` decode, where there is more than one."""
        self._file, self._level, self._blocks = file, level, blocks
        self._scale, self._threads = scale, threads
        starts, counts = level.byte_ranges(blocks)
        self._ahead = ReadAhead(file, starts.reshape(-1), counts.reshape(-1))

    def __iter__(self) -> Iterator[tuple[int, Pixels | None]]:
        """(block, pixels) in the order of `blocks`; None for background.

        The pixels are good until the next block is asked for: their memory is used again.

        Raises:
            SlideError: `tile_data_corrupt` and what reading raises.
        """
        with closing(self._ahead):
            yield from self._decode_here() if self._threads == 1 else self._decode_in_threads()

    def close(self) -> None:
        """Give up what is on its way."""
        self._ahead.close()

    def _decode_here(self) -> Iterator[tuple[int, Pixels | None]]:
        buffer = new_buffer(self._level)
        for i, block in enumerate(self._blocks):
            yield block, self._decode(block, self._data(i), buffer)

    def _decode_in_threads(self) -> Iterator[tuple[int, Pixels | None]]:
        # One buffer more than blocks under way: the one whose pixels the caller looks at.
        buffers = deque(new_buffer(self._level) for _ in range(2 * self._threads + 1))
        under_way: deque[tuple[int, Future[Pixels | None]]] = deque()
        with ThreadPoolExecutor(self._threads, "slidelake-decode") as pool:
            for i, block in enumerate(self._blocks):
                if len(under_way) == 2 * self._threads:
                    done, future = under_way.popleft()
                    yield done, future.result()
                buffers.rotate()
                under_way.append((block, pool.submit(self._decode, block, self._data(i), buffers[0])))
            for done, future in under_way:
                yield done, future.result()

    def _data(self, i: int) -> list[memoryview]:
        planes = self._level.planes
        return [self._ahead.take(i * planes + plane) for plane in range(planes)]

    def _decode(self, block: int, data: list[memoryview], buffer: Pixels) -> Pixels | None:
        try:
            return decode_block(self._level, block, data, buffer, self._scale)
        except SlideError as error:
            raise SlideError(error.code, f"{self._file.uri}: {error.message}") from None
