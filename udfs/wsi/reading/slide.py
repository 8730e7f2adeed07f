"""Opening a slide at any fsspec URI and reading it: the whole at 1/16, or tiles anywhere."""

from collections.abc import Callable, Iterator
from functools import cached_property
from typing import Self

from numpy.typing import ArrayLike

from udfs.wsi.reading.foreign import ForeignSlide, sniff
from udfs.wsi.reading.overview import area_average
from udfs.wsi.reading.tiles import TileReader
from udfs.wsi.store import File, StorageOptions
from udfs.wsi.store.stream import open_stream
from udfs.wsi.tiff.decode import Pixels
from udfs.wsi.tiff.header import read_index
from udfs.wsi.tiff.index import Level, SlideIndex

_HEAD_BYTES = 512  # show which format a file is in


def open_slide(
    uri: str, storage_options: StorageOptions | None = None, *, index: SlideIndex | None = None, threads: int = 1
) -> "Slide | ForeignSlide":
    """Opens a slide; raises SlideError with the code and remedy for what is wrong with the file.

    Args:
        uri: a path or any fsspec URI. TIFF-based slides (TIFF, SVS, NDPI, SCN, BIF) are read in place; those that OpenSlide
            reads (MIRAX, VMS, DICOM, CZI and more) are copied to this machine first. The first bytes decide, not the name.
        storage_options: for fsspec. A slide waits for its store for at most `StoreOptions.timeout_s` in all, 180 s if they
            are a plain dict, plus one second per MB received; then it is `read_failed`.
        index: of this file, from `Slide.index`, whole or cut down: then no header is read. The first read checks that the
            file is still the one that the index was made of.
        threads: number of threads that decode.
    """
    file = File(uri, storage_options, index.file if index else None)
    try:
        if index:
            return Slide(file, index, file.check_unchanged(), threads)
        with open_stream(file) as stream:
            kind = sniff(stream.read(_HEAD_BYTES))
            if kind is None:
                return Slide(file, read_index(file, stream), None, threads)
    except BaseException:
        file.close()
        raise
    file.close()
    return ForeignSlide(uri, storage_options, file.info, kind, file.traffic)


class Slide:
    """An open slide. Use it as a context manager.

    Its sizes, spacing, vendor, levels and warnings are those of its `index`, which explains them. `file` has size and version
    of the file that was opened, `traffic` the cost of reading so far.
    """

    def __init__(self, file: File, index: SlideIndex, unchanged: Callable[[], None] | None, threads: int) -> None:
        """Takes the parts from `open_slide`. `unchanged` raises if the file is not the one of the index any more."""
        self._file, self._unchanged, self._threads = file, unchanged, threads
        self._readers: list[TileReader] = []
        self.index, self.file, self.traffic = index, file.info, file.traffic
        self.width_px, self.height_px = index.width_px, index.height_px
        self.mpp_x, self.mpp_y = index.mpp_x, index.mpp_y
        self.vendor, self.levels, self.warnings = index.vendor, index.levels, index.warnings

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """Gives up what is on its way and closes the file."""
        for reader in self._readers:
            reader.close()
        self._file.close()

    def downsampled(self, factor: int = 16) -> Pixels:
        """Returns the slide at 1/factor: each pixel is the mean over factor x factor level-0 pixels, rounded half up.

        The result is uint8 [height_px // factor, width_px // factor, 3]; the rest of an edge that fills no whole pixel is
        dropped. It is averaged from the nearest finer level whose downsample divides `factor`. If a result pixel stands for
        whole 8 x 8 squares of JPEG blocks, their means are those that JPEG stores, off by a grey level now and then; everything
        else is exact. Streams block by block: only the result grows with the slide. Raises SlideError `tile_data_corrupt` and
        what reading raises.
        """
        self._check_unchanged()
        return area_average(self._file, self.index, factor, threads=self._threads)

    def read_tiles(self, xy_px: ArrayLike, tile_px: int = 448, level: int = 0) -> Iterator[tuple[int, Pixels]]:
        """Reads square tiles.

        Each block is fetched and decoded once, however many tiles share it. The call itself requests the first bytes, so
        that they are on their way while the caller does something else.

        Args:
            xy_px: int [n, 2], top-left corners in level-0 pixels, in any order and any place.
            tile_px: edge of a tile in pixels of `level`.
            level: index into `levels`.

        Returns:
            An iterator of (i, pixels): the index into `xy_px` and uint8 [tile_px, tile_px, 3]; white outside the slide.
            The order is patch by patch of the level, whatever the order of `xy_px`.

        Raises:
            SlideError: `tile_data_corrupt` and what reading raises, `file_changed` if an index is out of date.
        """
        finer = (lambda: self._whole_levels[:level]) if level else tuple
        reader = TileReader(self._file, self.levels[level], xy_px, tile_px, finer=finer, threads=self._threads)
        self._readers.append(reader)
        return self._tiles(reader)

    def _tiles(self, reader: TileReader) -> Iterator[tuple[int, Pixels]]:
        try:
            self._check_unchanged()
            yield from reader
        finally:
            reader.close()
            self._readers.remove(reader)

    @cached_property
    def _whole_levels(self) -> tuple[Level, ...]:
        """Levels with all their blocks; read from the header if the index was cut down."""
        if all(level.listed is None for level in self.levels):
            return self.levels
        with open_stream(self._file) as stream:
            return read_index(self._file, stream).levels

    def _check_unchanged(self) -> None:
        if self._unchanged:
            self._unchanged()
            self._unchanged = None
