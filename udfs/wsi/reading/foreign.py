"""Slides that TIFF cannot express, read by OpenSlide: MIRAX, Hamamatsu VMS and VMU, DICOM, Zeiss CZI, Sakura SVSLIDE.

OpenSlide is an extra (`pip install 'slidelake[openslide]'`) that is imported when the first such slide is opened.
"""

import re
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
from numpy.typing import ArrayLike

from udfs.wsi.errors import ErrorCode, SlideError
from udfs.wsi.plausible import check_size, plausible_spacing
from udfs.wsi.reading.averaging import AreaAverage
from udfs.wsi.reading.blocks_of_tiles import corners_at
from udfs.wsi.reading.companions import beside, path_in
from udfs.wsi.reading.overview import nearest_finer
from udfs.wsi.reading.refused import unread_property
from udfs.wsi.reading.staging import staged
from udfs.wsi.store import File, FileInfo, StorageOptions, Traffic, public_uri
from udfs.wsi.tiff.decode import WHITE, Pixels, on_white
from udfs.wsi.tiff.index import PyramidLevel

_TIFF = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
_BEGINNINGS = {
    b"ZISRAWFILE": "Zeiss CZI",
    b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1": "Zeiss ZVI",  # an OLE2 container
    b"SQLite format 3\0": "Sakura SVSLIDE",
    b"\xff\xd8\xff": "MIRAX",
}
_HAMAMATSU = re.compile(rb"^\s*\[(Uncompressed )?Virtual Microscope Specimen\]", re.MULTILINE)
_CONVERT = "convert it to TIFF, for example with QuPath or Bio-Formats"
_REGION_PX = 1024  # edge of what is read at once: tiles of all the formats are smaller


def sniff(head: bytes) -> str | None:
    """Returns the format that the first 512 bytes of a file show, for `ForeignSlide`. None for a TIFF and everything else.

    "MIRAX" means that the file is a JPEG: only the files beside it show whether it is a slide.
    """
    if head.startswith(_TIFF):  # the file may be DICOM too, which then is the longer way to the same pixels
        return None
    if kind := next((kind for start, kind in _BEGINNINGS.items() if head.startswith(start)), None):
        return kind
    if head[128:132] == b"DICM":
        return "DICOM"
    if found := _HAMAMATSU.search(head.removeprefix(b"\xef\xbb\xbf")):
        return "Hamamatsu VMU" if found[1] else "Hamamatsu VMS"
    return None


@dataclass(frozen=True)
class ForeignLevel(PyramidLevel):
    """A level that OpenSlide reads."""

    scale: float  # its downsample as OpenSlide has it: a fraction if the writer rounded sizes


class ForeignSlide:
    """A slide that OpenSlide reads, open, with the interface of `Slide`. Use it as a context manager.

    A remote slide is copied to this machine first: see `udfs.wsi.reading.staging`.
    """

    warnings: tuple[str, ...] = ()
    index: None = None  # only TIFFs have one

    def __init__(
        self,
        uri: str,
        storage_options: StorageOptions | None,
        file: FileInfo,
        kind: str,
        traffic: Traffic | None = None,
    ) -> None:
        """Opens a slide for `open_slide`. `kind` is from `sniff`; the cost of staging is added to `traffic`.

        Raises SlideError: `not_a_slide`, `unsupported_format` (also if OpenSlide is not installed), `header_corrupt`,
        `size_implausible`, and what staging raises.
        """
        self.file, self.traffic = file, traffic or Traffic()
        self._uri, self._kind = public_uri(uri), kind
        self._check_kind(uri, storage_options)
        try:
            import openslide  # noqa: PLC0415  # an extra
        except ImportError as error:
            raise SlideError(
                ErrorCode.UNSUPPORTED_FORMAT,
                f"{self._uri} is a {kind} slide, which OpenSlide reads, and OpenSlide is not installed here ({error}): "
                "pip install 'slidelake[openslide]'",
            ) from None
        self._library: Any = openslide
        self._handle: Any = None
        with ExitStack() as opened:
            self._path: Path = opened.enter_context(staged(uri, storage_options, kind, self.traffic))
            opened.callback(self._release)
            self._open()
            self._read_header()
            self._opened = opened.pop_all()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """Closes the slide."""
        self._opened.close()

    def downsampled(self, factor: int = 16) -> Pixels:
        """Returns what `Slide.downsampled` returns; raises SlideError `tile_data_corrupt`."""
        result = np.full((self.height_px // factor, self.width_px // factor, 3), WHITE, np.uint8)
        if not result.size:  # a slide smaller than one pixel of the result
            return result
        index = nearest_finer(self.levels, factor)
        level = self.levels[index]
        bands = AreaAverage(result, factor // int(level.downsample))
        for top in range(0, level.height_px, _REGION_PX):
            height = min(_REGION_PX, level.height_px - top)
            for left in range(0, level.width_px, _REGION_PX):
                width = min(_REGION_PX, level.width_px - left)
                bands.add(self._read(index, left, top, width, height), top, left)
            bands.flush(top + height)
        return result

    def read_tiles(self, xy_px: ArrayLike, tile_px: int = 448, level: int = 0) -> Iterator[tuple[int, Pixels]]:
        """Reads what `Slide.read_tiles` reads, by rows of the level, so that neighbours meet in OpenSlide's cache.

        Raises SlideError `tile_data_corrupt`.
        """
        lv = self.levels[level]
        corners = corners_at(lv.downsample, xy_px)
        for i in np.lexsort((corners[:, 0], corners[:, 1])):
            x, y = (int(n) for n in corners[i])
            x0, y0 = max(x, 0), max(y, 0)
            width, height = min(x + tile_px, lv.width_px) - x0, min(y + tile_px, lv.height_px) - y0
            tile = np.full((tile_px, tile_px, 3), WHITE, np.uint8)
            if width > 0 and height > 0:
                tile[y0 - y : y0 - y + height, x0 - x : x0 - x + width] = self._read(level, x0, y0, width, height)
            yield int(i), tile

    def _check_kind(self, uri: str, storage_options: StorageOptions | None) -> None:
        """Refuses what OpenSlide does not read, before the message that OpenSlide is not installed."""
        if self._kind == "Zeiss ZVI":
            raise SlideError(
                ErrorCode.UNSUPPORTED_FORMAT,
                f"{self._uri} is an OLE2 container, as Zeiss ZVI slides are, which OpenSlide does not read: convert it to "
                "TIFF, for example with Bio-Formats",
            )
        if self._kind == "MIRAX" and not self._has_mirax_folder(uri, storage_options):
            raise SlideError(
                ErrorCode.NOT_A_SLIDE,
                f"{self._uri} is a JPEG image, whatever its name says: upload the slide itself; of a MIRAX slide that is "
                f"the .mrxs file and beside it the folder {path_in(uri).stem} with Slidedat.ini",
            )

    def _has_mirax_folder(self, uri: str, storage_options: StorageOptions | None) -> bool:
        path = path_in(uri)
        if path.suffix != ".mrxs":  # as for OpenSlide: a thumbnail may lie beside the folder of the slide that it shows
            return False
        try:
            File(beside(uri, f"{path.stem}/Slidedat.ini"), storage_options, traffic=self.traffic).close()
        except SlideError as error:
            if error.code is not ErrorCode.FILE_MISSING:
                raise
            return False
        return True

    def _open(self) -> None:
        library = self._library
        try:
            self._handle = library.OpenSlide(str(self._path))
        except library.OpenSlideUnsupportedFormatError:
            raise SlideError(
                ErrorCode.UNSUPPORTED_FORMAT,
                f"{self._uri}: OpenSlide {library.__library_version__} does not recognise this {self._kind} file: {_CONVERT}; "
                "if it is not whole, upload it again",
            ) from None
        except library.OpenSlideError as error:
            reason = self._without_path(error)
            if unread := unread_property(self._path, self._kind):
                code = ErrorCode.UNSUPPORTED_FORMAT
                text = f"does not read {self._kind} slides with {unread} ({reason}): {_CONVERT}"
            else:
                code = ErrorCode.HEADER_CORRUPT
                text = (
                    f"cannot open this {self._kind} slide ({reason}): upload it again, with all of its files; "
                    f"if it is whole, {_CONVERT}"
                )
            raise SlideError(code, f"{self._uri}: OpenSlide {library.__library_version__} {text}") from None

    def _release(self) -> None:
        if self._handle is not None:
            self._handle.close()
            self._handle = None

    def _read_header(self) -> None:
        self.width_px, self.height_px = self._handle.dimensions
        check_size(self._uri, self.width_px, self.height_px)
        properties = self._handle.properties
        x, y = (properties.get(f"openslide.mpp-{axis}") for axis in "xy")
        mpp: tuple[float | None, float | None] = plausible_spacing(x, y) or (None, None)
        self.mpp_x, self.mpp_y = mpp
        self.vendor = str(properties.get("openslide.vendor") or "unknown")
        sizes = zip(self._handle.level_dimensions, self._handle.level_downsamples, strict=True)
        self.levels = tuple(self._level(width, height, scale) for (width, height), scale in sizes)

    def _level(self, width: int, height: int, scale: float) -> ForeignLevel:
        nearest = max(round(scale), 1)  # writers halve and drop or pad the odd pixel
        off_by = max(abs(self.width_px / nearest - width), abs(self.height_px / nearest - height))
        return ForeignLevel(width, height, float(nearest) if off_by < 2.0 else scale, scale)

    def _read(self, index: int, x: int, y: int, width: int, height: int) -> Pixels:
        """Returns a rectangle inside a level, its place and size in the level's pixels, composited on white.

        OpenSlide takes places in level-0 pixels. If a level's scale is a fraction, OpenSlide interpolates by up to half a
        pixel.
        """
        scale = self.levels[index].scale
        location = round(x * scale), round(y * scale)
        if self._handle is None:
            self._open()
        try:
            region = self._handle.read_region(location, index, (width, height))
        except self._library.OpenSlideError as error:
            self._release()  # a handle that failed once gives nothing more, while other regions may be good
            raise SlideError(
                ErrorCode.TILE_DATA_CORRUPT,
                f"{self._uri}: the region at x={location[0]}, y={location[1]} (level-0 px) does not decode "
                f"({self._without_path(error)}): upload or scan the slide again",
            ) from None
        rgba = np.asarray(region)
        return rgba[..., :3] if rgba[..., 3].min() == WHITE else on_white(rgba)

    def _without_path(self, error: Exception) -> str:
        """Returns OpenSlide's message, without the folder of the copy."""
        return str(error).replace(f"{self._path.parent}/", "")
