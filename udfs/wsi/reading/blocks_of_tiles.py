"""Which blocks, byte ranges and work units tiles need. Pure functions of numbers: nothing is read here."""

import math
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import ArrayLike

from udfs.wsi.tiff.index import Level, Numbers

_MOST_TILES_A_CELL = 16  # along an edge; a larger common multiple of tile and block does not help
_CELL_TILES = 4  # along an edge, if tiles and blocks have no useful common multiple
_MOST_WASTE = 0.1  # of the wanted bytes, read for nothing: networks and bills are shared


@dataclass(frozen=True)
class Span:
    """A stretch of the file that one request reads."""

    start: int  # bytes
    stop: int
    members: tuple[int, ...]  # the ranges in it, by their index


def corners_at(level_downsample: float, xy_px: ArrayLike) -> Numbers:
    """Converts level-0 corners, int [n, 2], to pixels of a level, int64 [n, 2]."""
    corners: Numbers = np.rint(np.asarray(xy_px, np.float64).reshape(-1, 2) / level_downsample).astype(np.int64)
    return corners


def overlaps(level: Level, corners: Numbers, edge: int) -> tuple[Numbers, Numbers]:
    """Returns which tile needs which block: indices of tiles and numbers of blocks, each int64 [pairs].

    Pairs are in the order of reading, those of one block together: patch by patch of the level, so that few tiles are
    incomplete at a time. Corners are int64 [n, 2] of (x, y) and `edge` is that of a tile, both in pixels of the level.
    """
    left, right = _touched(corners[:, 0], edge, level.block_width, level.width_px)
    top, bottom = _touched(corners[:, 1], edge, level.block_height, level.height_px)
    widths, heights = right - left, bottom - top
    counts = widths * heights
    tiles = np.repeat(np.arange(len(corners)), counts)
    within = np.arange(len(tiles)) - np.repeat(np.cumsum(counts) - counts, counts)
    rows, columns = np.divmod(within, np.maximum(widths, 1)[tiles])
    rows, columns = rows + top[tiles], columns + left[tiles]
    blocks = rows * level.columns + columns
    patches = _patches(corners, edge, level.block_width, level.block_height)
    distinct, which = np.unique(blocks, return_inverse=True)
    first = np.full(len(distinct), np.iinfo(np.int64).max)  # the first patch that needs each of them
    np.minimum.at(first, which, patches[tiles])
    order = np.lexsort((tiles, blocks, first[which]))
    return tiles[order], blocks[order]


def needed_blocks(level: Level, xy_px: ArrayLike, edge: int) -> Numbers:
    """Returns the numbers of the blocks under tiles at level-0 corners `xy_px`: int64 [m], ascending."""
    return np.unique(overlaps(level, corners_at(level.downsample, xy_px), edge)[1])


def merge_ranges(starts: Numbers, counts: Numbers, gap_bytes: int, most_bytes: int) -> list[Span]:
    """Returns disjoint spans, one request each, in the order of the file, that hold every byte of every range.

    The bytes of gaps are at most a tenth of the wanted bytes; the smallest gaps are filled first.

    Args:
        starts: int64 [n], bytes, any order; ranges may overlap.
        counts: int64 [n], bytes, none 0.
        gap_bytes: the largest gap that is cheaper to read than a second request.
        most_bytes: size of a span, unless overlapping ranges or a single range are larger.
    """
    order = np.argsort(starts, kind="stable")
    begins, ends = starts[order], np.maximum.accumulate((starts + counts)[order]) if len(order) else starts
    gaps = begins[1:] - ends[:-1]
    wanted = int(np.diff(ends, prepend=0).sum() - np.maximum(gaps, 0).sum() - begins[0]) if len(order) else 0
    by_size = np.argsort(gaps, kind="stable")
    affordable = np.zeros(len(gaps), bool)
    affordable[by_size] = np.maximum(gaps[by_size], 0).cumsum() <= wanted * _MOST_WASTE
    joined = ((gaps <= gap_bytes) & affordable | (gaps <= 0)).tolist()
    overlap = (gaps < 0).tolist()
    spans: list[Span] = []
    first = 0
    begin_list, end_list, members = begins.tolist(), ends.tolist(), order.tolist()
    for i in range(1, len(members) + 1):
        if i < len(members):
            fits = overlap[i - 1] or end_list[i] - begin_list[first] <= most_bytes
            if joined[i - 1] and fits:
                continue
        spans.append(Span(begin_list[first], end_list[i - 1], tuple(members[first:i])))
        first = i
    return spans


def work_units(
    level: Level | None, downsample: float, xy_px: ArrayLike, region_px: int, most_tiles: int
) -> list[Numbers]:
    """Cuts a slide's tiles into work units that share as few blocks as possible.

    Returns the indices of each unit's tiles, int64 [m], in the order of reading: patches from left to right, then down.

    Args:
        level: the level that tiles are read from; None if its blocks are not known.
        downsample: of that level.
        xy_px: int [n, 2], corners of the tiles, level-0 pixels, any order.
        region_px: edge of a tile, pixels of the level.
        most_tiles: the largest number of tiles per unit.
    """
    corners = corners_at(downsample, xy_px)
    block_width, block_height = (level.block_width, level.block_height) if level else (region_px, region_px)
    patches = _patches(corners, region_px, block_width, block_height)
    order = np.lexsort((corners[:, 0], corners[:, 1], patches))
    cuts: list[int] = []
    begin = 0
    edges = [0, *(np.flatnonzero(np.diff(patches[order])) + 1).tolist(), len(order)]
    for patch, after in pairwise(edges):
        if begin < patch and after - begin > most_tiles:  # this patch is too much: the unit ends before it
            cuts.append(patch)
            begin = patch
        while after - begin > most_tiles:  # a patch that is more than a unit
            begin += most_tiles
            cuts.append(begin)
    return [unit.astype(np.int64) for unit in np.split(order, cuts) if len(unit)]


def _touched(at: Numbers, edge: int, block: int, length: int) -> tuple[Numbers, Numbers]:
    """Returns the first block that [at, at + edge) touches along an axis of `length` pixels, and the one after the last."""
    first = np.clip(at, 0, length) // block
    last = -(-np.clip(at + edge, 0, length) // block)
    return first, np.where(np.clip(at, 0, length) < np.clip(at + edge, 0, length), last, first)


def _patches(corners: Numbers, edge: int, block_width: int, block_height: int) -> Numbers:
    """Returns the number of each tile's patch, counted from left to right, then down: int64 [n]."""
    width, height = patch_edge(edge, block_width), patch_edge(edge, block_height)
    columns, rows = corners[:, 0] // width, corners[:, 1] // height
    if not len(corners):
        return columns
    columns, rows = columns - columns.min(), rows - rows.min()
    numbers: Numbers = rows * (columns.max() + 1) + columns
    return numbers


def patch_edge(tile_px: int, block_px: int) -> int:
    """Returns the edge of a patch, pixels of the level: whole tiles and whole blocks if they fit, else some tiles."""
    common = math.lcm(tile_px, block_px)
    return common if common <= _MOST_TILES_A_CELL * tile_px else _CELL_TILES * tile_px
