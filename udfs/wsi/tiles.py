"""Square tiles at any place, cut out of blocks that are each decoded once."""

import sys
from collections import deque
from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import ArrayLike

from udfs.wsi.blocks import BlockReader
from udfs.wsi.plan import Numbers, corners_at, overlaps
from udfs.wsi.store import File
from udfs.wsi.tiff.decode import WHITE, Pixels
from udfs.wsi.tiff.index import Level

_REFERENCES_OF_MINE = 2  # a name, and the argument of getrefcount
_Cut = tuple[int, slice, slice, slice, slice]  # tile; rows and columns of the block; rows and columns of the tile


class TileReader:
    """Reads the tiles that it is made with. Fetching begins at once; iterate once for the pixels."""

    def __init__(self, file: File, level: Level, xy_px: ArrayLike, tile_px: int, *, threads: int = 1) -> None:
        """See `Slide.read_tiles`."""
        self._level, self._tile_px = level, tile_px
        self._corners = corners_at(level.downsample, xy_px)
        pairs = overlaps(level, self._corners, tile_px)
        blocks, begins = np.unique(pairs.blocks, return_index=True)
        order = np.argsort(begins)
        self._begins = [*begins[order].tolist(), len(pairs.blocks)]  # of each block's pairs
        self._cuts = self._cuts_of(pairs.tiles, pairs.blocks)
        self._uses = np.bincount(pairs.tiles, minlength=len(self._corners)).tolist()
        self._yielded: deque[Pixels] = deque()
        self._blocks = BlockReader(file, level, blocks[order].tolist(), threads=threads)

    def __iter__(self) -> Iterator[tuple[int, Pixels]]:
        left = self._uses
        for i, uses in enumerate(left):
            if not uses:  # all of it outside the slide
                yield i, self._new_tile(i)
        tiles: dict[int, Pixels] = {}
        for n, (_, pixels) in enumerate(self._blocks):
            for i, block_rows, block_columns, tile_rows, tile_columns in self._cuts[
                self._begins[n] : self._begins[n + 1]
            ]:
                tile = tiles.get(i)
                if tile is None:
                    tile = tiles[i] = self._new_tile(i)
                tile[tile_rows, tile_columns] = WHITE if pixels is None else pixels[block_rows, block_columns]
                left[i] -= 1
                if not left[i]:
                    self._yielded.append(tile)
                    del tile, tiles[i]
                    yield i, self._yielded[-1]

    def close(self) -> None:
        """Give up what is on its way."""
        self._blocks.close()

    def _new_tile(self, i: int) -> Pixels:
        x, y = self._corners[i]
        edge, level = self._tile_px, self._level
        tile = self._used_again() if self._yielded else None
        if tile is None:
            tile = np.empty((edge, edge, 3), np.uint8)
        if x < 0 or y < 0 or x + edge > level.width_px or y + edge > level.height_px:
            tile[:] = WHITE  # what no block covers
        return tile

    def _used_again(self) -> Pixels | None:
        """The oldest tile's memory, if nobody holds the tile any more: new pages cost more than what is put on them."""
        tile = self._yielded.popleft()
        return tile if sys.getrefcount(tile) == _REFERENCES_OF_MINE else None

    def _cuts_of(self, tiles: Numbers, blocks: Numbers) -> Sequence[_Cut]:
        """Where each pair of block and tile overlaps."""
        level = self._level
        rows, columns = np.divmod(blocks, level.columns)
        cuts = [
            _overlap(at * size, np.minimum((at + 1) * size, limit), self._corners[tiles, axis], self._tile_px)
            for axis, at, size, limit in (
                (1, rows, level.block_height, level.height_px),
                (0, columns, level.block_width, level.width_px),
            )
        ]
        (block_rows, tile_rows), (block_columns, tile_columns) = cuts
        return list(zip(tiles.tolist(), block_rows, block_columns, tile_rows, tile_columns, strict=True))


def _overlap(
    begin: Numbers,
    end: Numbers,
    corner: Numbers,
    edge: int,
) -> tuple[list[slice], list[slice]]:
    """Along one axis, what a block [begin, end) and a tile [corner, corner + edge) share, in the frame of each."""
    first, last = np.maximum(begin, corner), np.minimum(end, corner + edge)
    of_block = map(slice, (first - begin).tolist(), (last - begin).tolist())
    of_tile = map(slice, (first - corner).tolist(), (last - corner).tolist())
    return list(of_block), list(of_tile)
