"""The whole slide at a fraction of its size: the area average, one row of blocks after the other."""

from collections.abc import Sequence

import numpy as np

from udfs.wsi.reading.averaging import MOST_EDGE_OF_MEANS, AreaAverage, means_of_squares
from udfs.wsi.reading.blocks import BlockReader
from udfs.wsi.store import File
from udfs.wsi.tiff.decode import WHITE, Pixels, scale_for
from udfs.wsi.tiff.index import Level, Numbers, PyramidLevel, SlideIndex, lost_blocks

_PATCH_PX = 1024  # blocks side by side are averaged together: fewer calls, and still in the processor's cache


def nearest_finer(levels: Sequence[PyramidLevel], factor: int) -> int:
    """Returns the number of the coarsest level that is finer than 1/factor and divides it; 0 if there is none.

    A level of just this downsample would do, but its own compression would show in every pixel of the result.
    """
    return max((i for i, level in enumerate(levels) if _serves(level, levels[0], factor)), default=0)


def _serves(level: PyramidLevel, base: PyramidLevel, factor: int) -> bool:
    if level.downsample >= factor or level.downsample % 1 or factor % level.downsample:
        return False
    edge = factor // int(level.downsample)
    # a level that a writer cut short may lack the last pixels of the result
    return level.width_px // edge >= base.width_px // factor and level.height_px // edge >= base.height_px // factor


def area_average(file: File, index: SlideIndex, factor: int, *, threads: int = 1) -> Pixels:
    """Returns what `Slide.downsampled` returns."""
    level = index.levels[nearest_finer(index.levels, factor)]
    edge = factor // int(level.downsample)  # level pixels per result pixel
    result = np.full((index.height_px // factor, index.width_px // factor, 3), WHITE, np.uint8)
    if not result.size:  # a slide smaller than one pixel of the result
        return result
    scale = scale_for(level, edge)
    is_each = scale == 1 and edge <= MOST_EDGE_OF_MEANS and not (level.block_width % edge or level.block_height % edge)
    patch_columns = 1 if is_each else max(1, _PATCH_PX * scale // level.block_width)
    finer = index.levels[: index.levels.index(level)]
    blocks = _in_patches(level, finer, patch_columns).tolist()
    reader = BlockReader(file, level, blocks, finer=lambda: finer, scale=scale, threads=threads)
    if is_each:
        _average_each(reader, level, edge, result)
    else:
        _average_patches(reader, level, edge // scale, scale, patch_columns, result)
    return result


def _in_patches(level: Level, finer: Sequence[Level], patch_columns: int) -> Numbers:
    """Returns the blocks, int64 [n], ascending, of each patch that has data here or in a finer level."""
    with_data = np.concatenate([level.stored(), np.array(sorted(lost_blocks(finer, level)), np.int64)])
    rows, columns = np.divmod(with_data, level.columns)
    patches = -(-level.columns // patch_columns)  # of a row
    rows, firsts = np.divmod(np.unique(rows * patches + columns // patch_columns), patches)
    columns = firsts[:, None] * patch_columns + np.arange(patch_columns)
    blocks: Numbers = (rows[:, None] * level.columns + columns)[columns < level.columns]
    return blocks


def _average_each(reader: BlockReader, level: Level, edge: int, result: Pixels) -> None:
    """Averages blocks of which no square spans two."""
    for block, pixels in reader:
        if pixels is None:
            continue
        row, column = divmod(block, level.columns)
        means = means_of_squares(pixels, edge)
        top, left = row * level.block_height // edge, column * level.block_width // edge
        at = result[top : top + means.shape[0], left : left + means.shape[1]]
        at[:] = means[: at.shape[0], : at.shape[1]]


def _average_patches(
    reader: BlockReader, level: Level, edge: int, scale: int, patch_columns: int, result: Pixels
) -> None:
    """Averages blocks of any size, shrunk by `scale`; some side by side at a time."""
    average = AreaAverage(result, edge)
    block_width, block_height = -(-level.block_width // scale), -(-level.block_height // scale)
    width, height = -(-level.width_px // scale), -(-level.height_px // scale)
    patch = np.empty((block_height, min(patch_columns * block_width, width), 3), np.uint8)
    for block, pixels in reader:
        row, column = divmod(block, level.columns)
        in_patch = column % patch_columns
        if not in_patch:
            average.flush(row * block_height)  # all that lies above is added
        left, patch_left = in_patch * block_width, (column - in_patch) * block_width
        right = min(left + block_width, width - patch_left)
        bottom = min(block_height, height - row * block_height)
        patch[:bottom, left:right] = WHITE if pixels is None else pixels
        if column == level.columns - 1 or right == patch.shape[1]:
            average.add(patch[:bottom, :right], row * block_height, patch_left)
    average.flush(height)
