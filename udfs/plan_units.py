"""Work units: which tiles of a slide are read and encoded together, and which units make a task (mapInArrow).

Nothing is read here: a unit is planned from coordinates and from the slide's index.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from udfs.schemas import UNITS
from udfs.wsi.reading.blocks_of_tiles import needed_blocks, work_units
from udfs.wsi.reading.spacing import region_edge
from udfs.wsi.tiff.index import SlideIndex

# Estimates, measured on one core of 2023 with an EfficientNet-B0; only the ratio of two units' costs is used.
_ENCODE_MS_PER_TILE = 8.3
_DECODE_MS_PER_BYTE = 1.2 / 37_000
_BYTES_PER_TILE = 37_000  # compressed, of a 448 px tile in JPEG, if a slide's blocks are not known

_TASKS_PER_SLOT = 16  # so that no slot waits long at the end of a wave, and a worker that dies loses little


def plan_units(unit_tiles: int) -> Callable[[Iterable[pa.RecordBatch]], Iterable[pa.RecordBatch]]:
    """Returns the mapInArrow function that cuts slides into work units of at most `unit_tiles` tiles.

    Input columns, one row per slide and set of encoders, all of a slide in one partition: image_id, patient_id, uri, encoders,
    tile_px, level_read, downsample, x_px and y_px (arrays, level-0 pixels), index (of the whole slide, or null). Output:
    `udfs.schemas.UNITS`.

    A unit's tiles share their blocks with as few tiles of other units as possible, so that hardly a byte is fetched or
    decoded twice. The units of a slide depend on its tiles and blocks alone, so its batches, and with them the last bit of
    every embedding, are the same however a run is cut into waves and tasks. (If only some tiles of a slide are new, its
    units hold these alone, and a last bit may differ from a run that encodes all tiles.)
    """

    def run(batches: Iterable[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        n_units = Counter[str]()  # of each slide, which has a row for each set of encoders
        for batch in batches:
            for row in range(batch.num_rows):
                [slide] = batch.slice(row, 1).to_pylist()
                units = list(_units_of(slide, unit_tiles, n_units[slide["image_id"]]))
                n_units[slide["image_id"]] += len(units)
                yield pa.RecordBatch.from_pylist(units, UNITS)

    return run


def _units_of(slide: dict[str, Any], unit_tiles: int, first: int) -> Iterator[dict[str, Any]]:
    xy_px = np.stack([slide["x_px"], slide["y_px"]], axis=1)
    read = slide["level_read"]
    index = SlideIndex.from_bytes(slide["index"]) if slide["index"] else None
    level = index.levels[read] if index else None
    downsample = level.downsample if level else slide["downsample"]
    region_px = region_edge(slide["tile_px"] * slide["downsample"], downsample)
    for number, members in enumerate(work_units(level, downsample, xy_px, region_px, unit_tiles), first):
        corners = xy_px[members]
        unit = slide | {"unit": number, "n_tiles": len(members), "x_px": corners[:, 0], "y_px": corners[:, 1]}
        unit["index"] = None
        n_bytes = len(members) * _BYTES_PER_TILE
        if index and level:
            blocks = needed_blocks(level, corners, region_px)
            n_bytes = int(level.byte_ranges(blocks)[1].sum())
            unit |= {"index": index.only(read, blocks).to_bytes(), "n_bytes": n_bytes}
        encode_ms = len(members) * len(slide["encoders"]) * _ENCODE_MS_PER_TILE
        yield unit | {"cost": encode_ms + n_bytes * _DECODE_MS_PER_BYTE}


def pack_tasks(units: Sequence[tuple[str, int, float]], slots: int) -> list[int]:
    """Returns the number of each unit's task: one or more consecutive units of one slide make a task.

    With many units per slot, a task has several, so that the bytes of the next come while one is encoded; with few, it has
    one, so that every slot has work.

    Args:
        units: image_id, number of the unit and cost, in any order.
        slots: number of tasks that run at once.

    Returns:
        One number per unit. Task 0 costs the most: Spark starts tasks in order, and the last should be short.
    """
    limit = sum(cost for _, _, cost in units) / (slots * _TASKS_PER_SLOT)
    tasks: list[list[int]] = []
    costs: list[float] = []
    of_image: str | None = None
    for i in sorted(range(len(units)), key=lambda i: units[i][:2]):
        image_id, _, cost = units[i]
        if image_id != of_image or costs[-1] + cost > limit:
            tasks.append([])
            costs.append(0.0)
        tasks[-1].append(i)
        costs[-1] += cost
        of_image = image_id
    numbers = [0] * len(units)
    for number, task in enumerate(sorted(range(len(tasks)), key=lambda task: -costs[task])):
        for i in tasks[task]:
            numbers[i] = number
    return numbers
