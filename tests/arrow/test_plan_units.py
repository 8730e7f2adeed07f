"""Work units and tasks: what is cut from a slide on plain record batches, and how tasks even out over slots."""

import heapq
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from tests.slides.make import write_mosaic
from udfs.plan_units import pack_tasks, plan_units
from udfs.schemas import UNITS
from udfs.wsi import Slide, open_slide
from udfs.wsi.reading.blocks_of_tiles import needed_blocks
from udfs.wsi.tiff.index import SlideIndex

TILE_PX = 448
Row = dict[str, Any]


@pytest.fixture(scope="module")
def slide(pixels: NDArray[Any], tmp_path_factory: pytest.TempPathFactory) -> Slide:
    """14 x 14 tiles of 448 px over blocks of 256 px: every 4 tiles, borders of tiles and of blocks are one."""
    path = tmp_path_factory.mktemp("planned") / "mosaic.tif"
    opened = open_slide(str(write_mosaic(path, pixels[1408:2944, 768:2048], width=448 * 14, height=448 * 14)))
    assert isinstance(opened, Slide)
    return opened


def grid(columns: int, rows: int) -> NDArray[np.int64]:
    return np.array([(x * TILE_PX, y * TILE_PX) for y in range(rows) for x in range(columns)])


def row_of(slide: Slide, xy_px: NDArray[np.int64], *, known: bool = True, **reading: Any) -> Row:
    row: Row = {
        "image_id": "m",
        "patient_id": "007",
        "uri": "/m.tif",
        "encoders": [{"encoder": "e", "params_hash": "p"}],
        "tile_px": TILE_PX,
    }
    row |= {"level_read": 0, "downsample": 1.0, "x_px": xy_px[:, 0].tolist(), "y_px": xy_px[:, 1].tolist()}
    return row | {"index": slide.index.to_bytes() if known else None} | reading


def plan(unit_tiles: int, *rows: Row) -> list[Row]:
    """What the UDF gives; every batch must have the schema to the letter, for Spark checks nothing."""
    batches = list(plan_units(unit_tiles)([pa.RecordBatch.from_pylist(list(rows))]))
    assert all(batch.schema.equals(UNITS) for batch in batches)
    for batch in batches:
        batch.validate(full=True)
    planned: list[Row] = pa.Table.from_batches(batches, UNITS).to_pylist()
    return planned


def tiles_of(unit: Row) -> list[tuple[int, int]]:
    return list(zip(unit["x_px"], unit["y_px"], strict=True))


@settings(derandomize=True, deadline=None, max_examples=60)
@given(
    places=st.sets(st.tuples(st.integers(0, 13), st.integers(0, 13)), min_size=1),
    unit_tiles=st.integers(1, 60),
    known=st.booleans(),
    reading=st.sampled_from([(0, 1.0, 448), (0, 1.6, 448), (1, 4.0, 112)]),
)
def test_every_tile_is_in_one_unit_and_no_unit_is_too_large(
    slide: Slide, places: set[tuple[int, int]], unit_tiles: int, known: bool, reading: tuple[int, float, int]
) -> None:
    level, downsample, tile_px = reading
    xy_px = np.array(sorted(places)) * TILE_PX
    row = row_of(slide, xy_px, known=known, level_read=level, downsample=downsample, tile_px=tile_px)
    units = plan(unit_tiles, row)
    assert sorted(tile for unit in units for tile in tiles_of(unit)) == sorted(map(tuple, xy_px.tolist()))
    assert [unit["unit"] for unit in units] == list(range(len(units)))
    assert all(1 <= unit["n_tiles"] == len(unit["x_px"]) <= unit_tiles for unit in units)
    constant = ("image_id", "patient_id", "uri", "encoders", "tile_px", "level_read", "downsample")
    assert all(unit[name] == row[name] for unit in units for name in constant)
    assert all(unit["cost"] > 0 for unit in units)
    assert all((unit["index"] is None) == (unit["n_bytes"] is None) == (not known) for unit in units)


def test_units_do_not_depend_on_the_order_of_tiles_nor_on_other_slides(slide: Slide) -> None:
    xy_px = grid(14, 14)
    alone = plan(20, row_of(slide, xy_px))
    shuffled = row_of(slide, np.random.default_rng(0).permutation(xy_px))
    other = row_of(slide, grid(5, 3), image_id="other")
    planned = plan(20, other, shuffled)
    assert [unit for unit in planned if unit["image_id"] == "m"] == alone


def test_the_index_of_a_unit_lists_the_blocks_under_its_tiles_and_no_other(slide: Slide) -> None:
    level = slide.levels[0]
    units = plan(16, row_of(slide, grid(14, 14)))
    for unit in units:
        index = SlideIndex.from_bytes(unit["index"])
        assert index is not None and index.file == slide.index.file
        blocks = needed_blocks(level, tiles_of(unit), TILE_PX)
        assert np.array_equal(index.levels[0].listed, blocks)  # type: ignore[arg-type]
        assert unit["n_bytes"] == level.byte_ranges(blocks)[1].sum()
        assert len(unit["index"]) < 4096
    # Patches of 4 x 4 tiles end where blocks do: no block belongs to two units.
    assert sum(unit["n_bytes"] for unit in units) == level.byte_ranges(np.arange(level.columns * level.rows))[1].sum()


def test_cost_grows_with_tiles_and_with_their_bytes(slide: Slide) -> None:
    [four] = plan(100, row_of(slide, grid(2, 2)))
    [sixteen] = plan(100, row_of(slide, grid(4, 4)))
    assert 3 * four["cost"] < sixteen["cost"] < 5 * four["cost"]
    [unknown] = plan(100, row_of(slide, grid(4, 4), known=False))
    assert sixteen["cost"] / 2 < unknown["cost"] < sixteen["cost"] * 2
    [elsewhere] = plan(100, row_of(slide, grid(4, 4) + 10**6))  # glass off the slide: nothing to fetch
    assert elsewhere["n_bytes"] == 0 and elsewhere["cost"] < sixteen["cost"]


UNIT = tuple[str, int, float]
slides_of_units = st.lists(st.lists(st.floats(0.5, 100), min_size=1, max_size=30), min_size=1, max_size=12)


@settings(derandomize=True, deadline=None, max_examples=100)
@given(costs=slides_of_units, slots=st.integers(1, 8), seed=st.integers(0, 99))
def test_a_task_is_consecutive_units_of_one_slide_and_the_costliest_is_the_first(
    costs: list[list[float]], slots: int, seed: int
) -> None:
    units: list[UNIT] = [(f"s{i}", k, cost) for i, of_slide in enumerate(costs) for k, cost in enumerate(of_slide)]
    order = np.random.default_rng(seed).permutation(len(units))
    shuffled = [units[i] for i in order]
    tasks: dict[int, list[UNIT]] = {}
    for unit, task in sorted(zip(shuffled, pack_tasks(shuffled, slots), strict=True)):
        tasks.setdefault(task, []).append(unit)
    assert sorted(tasks) == list(range(len(tasks)))
    for members in tasks.values():
        assert len({image_id for image_id, _, _ in members}) == 1
        assert [k for _, k, _ in members] == list(range(members[0][1], members[0][1] + len(members)))
    totals = [sum(cost for _, _, cost in tasks[task]) for task in range(len(tasks))]
    assert totals == pytest.approx(sorted(totals, reverse=True))
    if len(units) <= slots:
        assert len(tasks) == len(units)
    largest = max(cost for _, _, cost in units)
    assert totals[0] <= max(largest, sum(totals) / slots) + 1e-6


def test_few_units_are_a_task_each_and_many_share_one() -> None:
    few = [("a", k, 1.0) for k in range(8)]
    assert sorted(pack_tasks(few, slots=2)) == list(range(8))
    many = [(f"s{i}", k, 1.0) for i in range(16) for k in range(80)]
    assert 16 <= len(set(pack_tasks(many, slots=2))) <= 64
    assert pack_tasks([], slots=4) == []


def seconds_until_done(units: list[UNIT], tasks: list[int], slots: int) -> float:
    """Tasks start in order, each on the slot that is free first."""
    busy = [0.0] * slots
    for task in sorted(set(tasks)):
        cost = sum(cost for (_, _, cost), number in zip(units, tasks, strict=True) if number == task)
        heapq.heapreplace(busy, busy[0] + cost)
    return max(busy)


def test_cost_evens_tasks_out_better_than_counting_tiles() -> None:
    # A tile in JPEG is some 20 kB; one without compression, read at twice its resolution, 2.4 MB. Units are as large.
    light, heavy = (256 * (8.3 + n_bytes * 1.2 / 37_000) for n_bytes in (20_000, 2_400_000))
    slots = 8
    units = [(f"{i:02}", k, heavy if i == 11 else light) for i in range(12) for k in range(24)]
    counted = [(image_id, k, 256.0) for image_id, k, _ in units]
    least = sum(cost for _, _, cost in units) / slots
    by_cost = seconds_until_done(units, pack_tasks(units, slots), slots) / least
    by_count = seconds_until_done(units, pack_tasks(counted, slots), slots) / least
    assert by_cost < 1.05 and by_count > 1.1
