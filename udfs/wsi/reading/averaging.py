"""The area average of an image that is decoded block by block, one row of blocks after the other."""

from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from udfs.wsi.tiff.decode import WHITE, Pixels

MOST_EDGE_EXACT = 256  # float32 counts to 2^24, which 256 x 256 pixels of 255 just do not reach
MOST_EDGE_OF_MEANS = 64


class AreaAverage:
    """Running sums of result rows, so that only the rows under the current row of blocks are in memory.

    Pixels that are never added count as white, so that missing blocks cost nothing: sums begin at those of white pixels,
    and `add` adds differences from white. The numbers are unsigned and may wrap in between.
    """

    def __init__(self, result: Pixels, edge: int) -> None:
        """Averages into `result`, uint8 [h, w, 3], white; each of its pixels stands for edge x edge level pixels."""
        self._result, self._edge = result, edge
        self._white = WHITE * edge * edge
        # with room for the half that rounding adds
        self._kind: np.dtype[Any] = np.dtype(np.uint32 if self._white + edge * edge // 2 < 2**32 else np.uint64)
        self._first = 0  # result row that sums[0] belongs to
        self._sums = np.zeros((0, result.shape[1], 3), self._kind)

    def add(self, pixels: Pixels, top: int, left: int) -> None:
        """Adds a block whose top-left corner is at (left, top) in level pixels."""
        rows, row_starts = _cells(top, pixels.shape[0], self._edge, self._result.shape[0])
        columns, column_starts = _cells(left, pixels.shape[1], self._edge, self._result.shape[1])
        if not len(rows) or not len(columns):
            return
        inside = pixels[: rows.stop * self._edge - top, : columns.stop * self._edge - left]
        whole = inside.shape[:2] == (len(rows) * self._edge, len(columns) * self._edge)
        if whole and self._edge <= MOST_EDGE_EXACT:
            sums = sums_of_squares(inside, self._edge).astype(self._kind)
            sums -= self._white
        else:
            # uint16 holds 257 rows of 255; a coarser average than 1/257 needs more
            narrow = np.uint16 if self._edge <= 257 else np.uint32
            sums = np.add.reduceat(inside, row_starts, axis=0, dtype=narrow)
            sums = np.add.reduceat(sums, column_starts, axis=1, dtype=self._kind)
            heights, widths = (
                np.diff(starts, append=length).astype(self._kind)
                for starts, length in zip((row_starts, column_starts), inside.shape, strict=False)
            )
            sums -= WHITE * np.multiply.outer(heights, widths)[..., None]
        short = rows.stop - self._first - len(self._sums)
        if short > 0:
            white = np.full((short, *self._sums.shape[1:]), self._white, self._kind)
            self._sums = np.concatenate([self._sums, white])
        self._sums[rows.start - self._first : rows.stop - self._first, columns.start : columns.stop] += sums

    def flush(self, bottom: int) -> None:
        """Writes the result rows that end at or above level row `bottom`."""
        done = min(bottom // self._edge, self._result.shape[0]) - self._first
        if done > 0:
            area = self._edge * self._edge
            sums = self._sums[:done]  # fewer if nothing was added to the last rows
            self._result[self._first : self._first + len(sums)] = (sums + area // 2) // area
            self._sums, self._first = self._sums[done:], self._first + done


def means_of_squares(pixels: Pixels, edge: int) -> Pixels:
    """Returns the means of squares: uint8 [>= h * edge, >= w * edge, 3] to uint8 [h, w, 3], halves rounded up; edge up to 64."""
    area = edge * edge
    means = sums_of_squares(pixels, edge)
    means += area // 2
    means /= area  # exact enough to floor: float32 resolves 1/4096 at 255
    return means.astype(np.uint8)


def sums_of_squares(pixels: Pixels, edge: int) -> NDArray[np.float32]:
    """Returns the sums of squares: uint8 [>= h * edge, >= w * edge, 3] to float32 [h, w, 3]; edge up to 256.

    A matrix product along the rows takes a thirtieth of the time of `reduceat`.
    """
    height, width = pixels.shape[0] // edge, pixels.shape[1] // edge
    rows = pixels[: height * edge, : width * edge].reshape(height, edge, width * edge * 3)
    sums = rows[:, 0].astype(np.uint16)
    for i in range(1, edge):  # faster than `sum` along the axis
        sums += rows[:, i]
    product: NDArray[np.float32] = sums.reshape(-1, edge * 3).astype(np.float32) @ _ones(edge)
    return product.reshape(height, width, 3)


@cache
def _ones(edge: int) -> NDArray[np.float32]:
    return np.tile(np.eye(3, dtype=np.float32), (edge, 1))


def _cells(start: int, length: int, edge: int, limit: int) -> tuple[range, NDArray[np.intp]]:
    """Returns the result cells that [start, start + length) touches, and their beginnings, counted from `start`."""
    cells = range(min(start // edge, limit), min(-(-(start + length) // edge), limit))
    return cells, np.maximum(np.asarray(cells, np.intp) * edge - start, 0)
