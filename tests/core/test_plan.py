"""From tiles to blocks to byte ranges to work units: properties that hold for any grid, held against brute force."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from udfs.wsi.reading.blocks_of_tiles import merge_ranges, needed_blocks, overlaps, patch_edge, work_units
from udfs.wsi.tiff.index import Coding, Level

JPEG = Coding(compression=7, photometric=6, samples=3)


def grid(width: int, height: int, block_width: int, block_height: int) -> Level:
    """A level whose block n takes the bytes [100 n + 8, 100 n + 98)."""
    count = -(-width // block_width) * -(-height // block_height)
    offsets = (np.arange(count) * 100 + 8).astype(np.uint64)
    return Level(width, height, 1.0, block_width, block_height, 1, JPEG, offsets, np.full(count, 90, np.uint64))


RANGES = st.lists(st.tuples(st.integers(0, 5000), st.integers(1, 300)), min_size=1, max_size=60)
CORNERS = st.lists(st.tuples(st.integers(-300, 1200), st.integers(-300, 1200)), min_size=1, max_size=30)


@settings(derandomize=True, deadline=None, max_examples=300)
@given(ranges=RANGES, gap=st.integers(0, 400), most=st.integers(1, 2000))
def test_merged_ranges_cover_every_byte_once(ranges: list[tuple[int, int]], gap: int, most: int) -> None:
    starts, counts = np.array(ranges, np.int64).T
    spans = merge_ranges(starts, counts, gap, most)
    wanted, brought = np.zeros(6000, int), np.zeros(6000, int)
    for start, count in ranges:
        wanted[start : start + count] = 1
    for span in spans:
        brought[span.start : span.stop] += 1
        assert span.start == min(starts[i] for i in span.members)
        assert span.stop == max(starts[i] + counts[i] for i in span.members)
    assert brought.max() == 1
    assert (brought >= wanted).all()
    assert sorted(i for span in spans for i in span.members) == list(range(len(ranges)))
    waste = brought - wanted
    assert waste.sum() <= 0.1 * wanted.sum()
    runs = np.flatnonzero(np.diff(np.concatenate([[0], waste, [0]])))
    assert all(stop - start <= gap for start, stop in zip(runs[::2], runs[1::2], strict=True))


def test_a_gap_is_brought_only_where_it_is_cheaper_than_a_request() -> None:
    starts, counts = np.array([0, 1010, 2030]), np.array([1000, 1000, 1000])
    assert [span.members for span in merge_ranges(starts, counts, 20, 10_000)] == [(0, 1, 2)]
    assert [span.members for span in merge_ranges(starts, counts, 19, 10_000)] == [(0, 1), (2,)]
    assert [span.members for span in merge_ranges(starts, counts, 20, 2500)] == [(0, 1), (2,)]
    assert merge_ranges(starts[:0], counts[:0], 20, 2500) == []


@settings(derandomize=True, deadline=None, max_examples=150)
@given(
    width=st.integers(1, 1000),
    height=st.integers(1, 1000),
    block_width=st.integers(1, 300),
    block_height=st.integers(1, 300),
    corners=CORNERS,
    edge=st.integers(1, 400),
)
def test_a_tile_needs_the_blocks_that_it_shares_a_pixel_with(
    width: int, height: int, block_width: int, block_height: int, corners: list[tuple[int, int]], edge: int
) -> None:
    level = grid(width, height, block_width, block_height)
    tiles, blocks = overlaps(level, np.array(corners, np.int64), edge)
    expected = {
        (i, row * level.columns + column)
        for i, (x, y) in enumerate(corners)
        for row in range(level.rows)
        for column in range(level.columns)
        if max(x, column * block_width) < min(x + edge, (column + 1) * block_width, width)
        and max(y, row * block_height) < min(y + edge, (row + 1) * block_height, height)
    }
    found = list(zip(tiles.tolist(), blocks.tolist(), strict=True))
    assert len(found) == len(set(found))
    assert set(found) == expected
    assert needed_blocks(level, corners, edge).tolist() == sorted({block for _, block in expected})
    changes = np.flatnonzero(np.diff(blocks)) + 1  # a block's pairs stand together: it is decoded once
    assert len(changes) + (len(blocks) > 0) == len(set(blocks.tolist()))


@settings(derandomize=True, deadline=None, max_examples=100)
@given(
    corners=st.lists(st.tuples(st.integers(0, 40), st.integers(0, 40)), max_size=200, unique=True),
    most=st.integers(1, 64),
    block=st.sampled_from([240, 256, 512, 1000]),
)
def test_units_hold_every_tile_once_and_no_more_than_they_may(
    corners: list[tuple[int, int]], most: int, block: int
) -> None:
    xy = np.array(corners, np.int64).reshape(-1, 2) * 448
    units = work_units(grid(20_000, 20_000, block, block), 1.0, xy, 448, most)
    assert sorted(i for unit in units for i in unit.tolist()) == list(range(len(xy)))
    assert all(1 <= len(unit) <= most for unit in units)
    shuffled = np.random.default_rng(len(xy)).permutation(len(xy))
    again = work_units(grid(20_000, 20_000, block, block), 1.0, xy[shuffled], 448, most)
    assert [xy[shuffled][unit].tolist() for unit in again] == [xy[unit].tolist() for unit in units]


def test_units_share_no_block_where_the_grids_allow_it() -> None:
    """256 px blocks and 448 px tiles meet every 1792 px, 240 px blocks every 6720."""
    xy = np.stack(np.meshgrid(np.arange(40), np.arange(40)), axis=-1).reshape(-1, 2) * 448
    for block in (240, 256, 448, 512):
        level = grid(40 * 448, 40 * 448, block, block)
        units = work_units(level, 1.0, xy, 448, 256)
        blocks = [set(needed_blocks(level, xy[unit], 448).tolist()) for unit in units]
        assert len(units) >= len(xy) // 256
        assert sum(map(len, blocks)) == len(set().union(*blocks))


def test_units_of_unknown_blocks_are_patches_too() -> None:
    xy = np.array([(x * 448, 0) for x in range(10)])
    units = work_units(None, 1.0, xy, 448, 4)
    assert [len(unit) for unit in units] == [4, 4, 2]


def test_a_patch_ends_where_tiles_and_blocks_both_do() -> None:
    assert (patch_edge(448, 256), patch_edge(448, 240), patch_edge(448, 448)) == (1792, 6720, 448)
    assert patch_edge(448, 1000) == 4 * 448  # their common multiple, 56,000, would be no patch
