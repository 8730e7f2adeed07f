"""Slides that TIFF can't express, read by OpenSlide: MIRAX, Hamamatsu VMS and VMU, DICOM, Zeiss CZI, Sakura SVSLIDE.

OpenSlide is an extra (`pip install 'slidelake[openslide]'`) that is imported when the first such slide is opened.
"""

import re
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
from numpy.typing import ArrayLike

from udfs.wsi.errors import ErrorCode, SlideError
from udfs.wsi.reading.averaging import AreaAverage
from udfs.wsi.reading.blocks_of_tiles import corners_at
from udfs.wsi.reading.plausible import check_size, plausible_spacing
from udfs.wsi.reading.refused import unread_property
from udfs.wsi.reading.staging import Companions, beside, path_in, staged
from udfs.wsi.store import File, FileInfo, StorageOptions, Traffic, public_uri
from udfs.wsi.tiff.decode import WHITE, Pixels, on_white

_TIFF = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
_HAMAMATSU = re.compile(rb"^\s*\[(Uncompressed )?Virtual Microscope Specimen\]", re.MULTILINE)
_COMPANIONS = {
    "MIRAX": Companions.MIRAX,
    "Hamamatsu VMS": Companions.HAMAMATSU,
    "Hamamatsu VMU": Companions.HAMAMATSU,
    "DICOM": Companions.DICOM,
}

_CONVERT = "convert it to TIFF, for example with QuPath or Bio-Formats"
_REGION_PX = 1024  # edge of what is read at once: tiles of all the formats are smaller


def sniff(head: bytes) -> str | None:
    """Which of these formats a file shows by its first bytes, whatever its name; None for a TIFF and all else.

    Args:
        head: the first 512 bytes; all bytes of a shorter file.

    Returns:
        The format's name, for `ForeignSlide`. A JPEG may be "MIRAX": whether it is, only the files beside it tell.
    """
    if head.startswith(_TIFF):  # a file may be DICOM as well, which then is the longer way to the same pixels
        return None
    starts = {
        b"ZISRAWFILE": "Zeiss CZI",
        b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1": "Zeiss ZVI",  # an OLE2 container
        b"SQLite format 3\0": "Sakura SVSLIDE",
        b"\xff\xd8\xff": "MIRAX",
    }
    for start, kind in starts.items():
        if head.startswith(start):
            return kind
    if head[128:132] == b"DICM":
        return "DICOM"
    if found := _HAMAMATSU.search(head.removeprefix(b"\xef\xbb\xbf")):
        return "Hamamatsu VMU" if found[1] else "Hamamatsu VMS"
    return None


@dataclass(frozen=True)
class ForeignLevel:
    """A level of the pyramid."""

    width_px: int
    height_px: int
    downsample: float  # level-0 pixels a pixel, along an edge
    scale: float  # the same as OpenSlide takes it, which is no whole number where writers round sizes


class ForeignSlide:
    """A slide that OpenSlide reads, open, with the interface of `Slide`. Use it as a context manager.

    A remote slide is copied to this machine first: see `udfs.wsi.reading.staging`.
    """

    file: FileInfo
    width_px: int
    height_px: int
    mpp_x: float | None  # um/px of level 0; None if the header has no plausible value
    mpp_y: float | None
    vendor: str
    levels: tuple[ForeignLevel, ...]  # level 0 first
    warnings: tuple[str, ...] = ()  # what to know about the slide, a sentence each
    index: None = None  # of TIFFs only: OpenSlide reads its own
    traffic: Traffic  # what reading its head and staging it has cost, if it is remote

    def __init__(
        self,
        uri: str,
        storage_options: StorageOptions | None,
        file: FileInfo,
        kind: str,
        traffic: Traffic | None = None,
    ) -> None:
        """Open it.

        Args:
            uri: a path or any fsspec URI.
            storage_options: for fsspec.
            file: size and version of the file at the URI.
            kind: from `sniff`.
            traffic: what finding that out has cost; what staging costs is added to it.

        Raises:
            SlideError: `not_a_slide`, `unsupported_format` (also where OpenSlide is not installed), `header_corrupt`,
                `size_implausible`, and what staging raises.
        """
        self.file, self.traffic = file, traffic or Traffic()
        self._uri, self._kind = public_uri(uri), kind
        self._check_kind(uri, storage_options)
        self._library = self._import()
        with ExitStack() as opened:
            self._path: Path = opened.enter_context(
                staged(uri, storage_options, _COMPANIONS.get(kind, Companions.NONE), self.traffic)
            )
            self._handle: Any = None
            opened.callback(self._release)
            self._read_header()
            self._opened = opened.pop_all()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the slide."""
        self._opened.close()

    def downsampled(self, factor: int = 16) -> Pixels:
        """The slide at 1/factor: each pixel the mean over factor x factor level-0 pixels, rounded half up.

        Averaged from the nearest finer level whose downsample divides `factor`. Streams, so memory does not grow with
        the slide but for the result.

        Args:
            factor: a positive integer.

        Returns:
            uint8 [height_px // factor, width_px // factor, 3]; the rest of an edge that fills no whole pixel is dropped.

        Raises:
            SlideError: `tile_data_corrupt`.
        """
        result = np.full((self.height_px // factor, self.width_px // factor, 3), WHITE, np.uint8)
        if not result.size:  # a slide smaller than one pixel of the result
            return result
        index = max((i for i in range(len(self.levels)) if self._serves(i, factor)), default=0)
        level = self.levels[index]
        edge = factor // int(level.downsample)  # level pixels a result pixel
        bands = AreaAverage(result, edge)
        for top in range(0, level.height_px, _REGION_PX):
            height = min(_REGION_PX, level.height_px - top)
            for left in range(0, level.width_px, _REGION_PX):
                width = min(_REGION_PX, level.width_px - left)
                bands.add(self._read(index, left, top, width, height), top, left)
            bands.flush(top + height)
        return result

    def read_tiles(self, xy_px: ArrayLike, tile_px: int = 448, level: int = 0) -> Iterator[tuple[int, Pixels]]:
        """Read square tiles.

        Args:
            xy_px: int [n, 2], top-left corners in level-0 pixels, in any order and any place.
            tile_px: edge of a tile in pixels of `level`.
            level: index into `levels`.

        Yields:
            (i, pixels): the index into `xy_px` and uint8 [tile_px, tile_px, 3]; white outside the slide. The order is
            by rows of the level, whatever the order of `xy_px`: neighbours then meet in OpenSlide's cache.

        Raises:
            SlideError: `tile_data_corrupt`.
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
        """Refuse what no OpenSlide reads, before anybody installs one for it."""
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
        if (
            path.suffix != ".mrxs"
        ):  # nor does OpenSlide take other names; a thumbnail may lie beside the folder of the slide that it shows
            return False
        try:
            File(beside(uri, f"{path.stem}/Slidedat.ini"), storage_options, traffic=self.traffic).close()
        except SlideError as error:
            if error.code is ErrorCode.FILE_MISSING:
                return False
            raise
        return True

    def _import(self) -> Any:
        try:
            import openslide  # noqa: PLC0415  # an extra
        except ImportError as error:
            raise SlideError(
                ErrorCode.UNSUPPORTED_FORMAT,
                f"{self._uri} is a {self._kind} slide, which OpenSlide reads, and that is not installed here ({error}): "
                "pip install 'slidelake[openslide]'",
            ) from None
        return openslide

    def _open(self) -> None:
        library = self._library
        try:
            self._handle = library.OpenSlide(str(self._path))
        except library.OpenSlideUnsupportedFormatError:
            raise SlideError(
                ErrorCode.UNSUPPORTED_FORMAT,
                f"{self._uri}: OpenSlide {library.__library_version__} does not know this {self._kind} file for a slide: "
                f"{_CONVERT}; if it is not whole, upload it again",
            ) from None
        except library.OpenSlideError as error:
            said = self._without_path(error)
            if unread := unread_property(self._path, self._kind):
                raise SlideError(
                    ErrorCode.UNSUPPORTED_FORMAT,
                    f"{self._uri}: OpenSlide {library.__library_version__} does not read {self._kind} slides with {unread} "
                    f"({said}): {_CONVERT}",
                ) from None
            raise SlideError(
                ErrorCode.HEADER_CORRUPT,
                f"{self._uri}: OpenSlide can't open this {self._kind} slide ({said}): upload it again, with all of its "
                f"files; if it is whole, {_CONVERT}",
            ) from None

    def _release(self) -> None:
        if self._handle is not None:
            self._handle.close()
            self._handle = None

    def _read_header(self) -> None:
        self._open()
        self.width_px, self.height_px = self._handle.dimensions
        check_size(self._uri, self.width_px, self.height_px)
        properties = self._handle.properties
        said = [properties.get(f"openslide.mpp-{axis}") for axis in "xy"]
        self.mpp_x, self.mpp_y = plausible_spacing(*said) or (None, None)
        self.vendor = str(properties.get("openslide.vendor") or "unknown")
        self.levels = tuple(
            ForeignLevel(width, height, self._downsample(width, height, scale), scale)
            for (width, height), scale in zip(
                self._handle.level_dimensions, self._handle.level_downsamples, strict=True
            )
        )

    def _downsample(self, width: int, height: int, scale: float) -> float:
        """Writers halve and drop or pad the odd pixel, so a near-integer scale is that integer."""
        nearest = max(round(scale), 1)
        off_by = max(abs(self.width_px / nearest - width), abs(self.height_px / nearest - height))
        return float(nearest) if off_by < 2.0 else scale

    def _serves(self, index: int, factor: int) -> bool:
        """Whether a level can be averaged to 1/factor; one that a writer cut short may lack the last pixels."""
        level = self.levels[index]
        if level.downsample >= factor or level.downsample % 1 or factor % level.downsample:
            return False
        edge = factor // int(level.downsample)
        return level.width_px // edge >= self.width_px // factor and level.height_px // edge >= self.height_px // factor

    def _read(self, index: int, x: int, y: int, width: int, height: int) -> Pixels:
        """A rectangle inside a level, its place and size in the level's pixels, composited on white.

        OpenSlide takes places in level-0 pixels: where a level's scale is no whole number, it interpolates by up to half
        of one.
        """
        scale = self.levels[index].scale
        location = round(x * scale), round(y * scale)
        if self._handle is None:
            self._open()
        try:
            region = self._handle.read_region(location, index, (width, height))
        except self._library.OpenSlideError as error:
            self._release()  # a handle that failed once gives nothing more, what lies elsewhere may be good
            raise SlideError(
                ErrorCode.TILE_DATA_CORRUPT,
                f"{self._uri}: the region at x={location[0]}, y={location[1]} (level-0 px) does not decode "
                f"({self._without_path(error)}): upload or scan the slide again",
            ) from None
        rgba = np.asarray(region)
        return rgba[..., :3] if rgba[..., 3].min() == WHITE else on_white(rgba)

    def _without_path(self, error: Exception) -> str:
        """What OpenSlide said, without where the copy lies."""
        return str(error).replace(f"{self._path.parent}/", "")
