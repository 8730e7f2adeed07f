"""Square tiles at any place, cut out of blocks that are decoded once each."""

from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import ArrayLike

from udfs.wsi.reading.blocks import BlockReader, Finer
from udfs.wsi.reading.blocks_of_tiles import corners_at, overlaps
from udfs.wsi.store import File
from udfs.wsi.tiff.decode import WHITE, Pixels
from udfs.wsi.tiff.index import Level, Numbers

# Index of the tile; top, bottom, left and right in the block; the same in the tile. Columns are samples, three per pixel.
# Plain numbers, because the garbage collector walks through everything else again and again.
_Cut = tuple[int, int, int, int, int, int, int, int, int]


class TileReader:
    """Reads the tiles that it is made with. Fetching begins at once; iterate once for the pixels."""

    def __init__(self, file: File, level: Level, xy_px: ArrayLike, tile_px: int, *, finer: Finer, threads: int) -> None:
        """Begins to fetch. The arguments are those of `Slide.read_tiles`, and `finer` is that of `BlockReader`."""
        self._level, self._tile_px = level, tile_px
        self._corners = corners_at(level.downsample, xy_px)
        of_tiles, of_blocks = overlaps(level, self._corners, tile_px)
        blocks, begins = np.unique(of_blocks, return_index=True)
        order = np.argsort(begins)
        self._begins = [*begins[order].tolist(), len(of_blocks)]  # of each block's pairs
        self._cuts = self._cuts_of(of_tiles, of_blocks)
        self._uses = np.bincount(of_tiles, minlength=len(self._corners)).tolist()
        self._blocks = BlockReader(file, level, blocks[order].tolist(), finer=finer, threads=threads)

    def __iter__(self) -> Iterator[tuple[int, Pixels]]:
        uses = self._uses
        for i, blocks in enumerate(uses):
            if not blocks:  # all of it outside the slide
                yield i, self._new_tile(i)
        tiles: dict[int, tuple[Pixels, Pixels]] = {}  # and the same memory as rows of samples, which are copied faster
        for n, (_, pixels) in enumerate(self._blocks):
            rows = None if pixels is None else pixels.reshape(pixels.shape[0], -1)
            cuts = self._cuts[self._begins[n] : self._begins[n + 1]]
            for i, top, bottom, left, right, to_top, to_bottom, to_left, to_right in cuts:
                if i not in tiles:
                    tile = self._new_tile(i)
                    tiles[i] = tile, tile.reshape(self._tile_px, -1)
                cut = WHITE if rows is None else rows[top:bottom, left:right]
                tiles[i][1][to_top:to_bottom, to_left:to_right] = cut
                uses[i] -= 1
                if not uses[i]:
                    yield i, tiles.pop(i)[0]

    def close(self) -> None:
        """Gives up what is on its way."""
        self._blocks.close()

    def _new_tile(self, i: int) -> Pixels:
        x, y = self._corners[i]
        edge, level = self._tile_px, self._level
        tile = np.empty((edge, edge, 3), np.uint8)
        if x < 0 or y < 0 or x + edge > level.width_px or y + edge > level.height_px:
            tile[:] = WHITE  # what no block covers
        return tile

    def _cuts_of(self, tiles: Numbers, blocks: Numbers) -> Sequence[_Cut]:
        """Returns the overlap of each pair of block and tile."""
        level = self._level
        rows, columns = np.divmod(blocks, level.columns)
        numbers = [tiles]
        for axis, at, size, limit, samples in (
            (1, rows, level.block_height, level.height_px, 1),
            (0, columns, level.block_width, level.width_px, 3),
        ):
            corner = self._corners[tiles, axis]
            first = np.maximum(at * size, corner)
            last = np.minimum(np.minimum((at + 1) * size, limit), corner + self._tile_px)
            numbers += [(n - origin) * samples for origin in (at * size, corner) for n in (first, last)]
        order = (0, 1, 2, 5, 6, 3, 4, 7, 8)  # numbers of the block before those of the tile
        return list(zip(*(numbers[k].tolist() for k in order), strict=True))
