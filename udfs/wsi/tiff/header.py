"""Size, levels, vendor and spacing of a slide from its directories, and whether they can be true."""

import logging
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, BinaryIO, Literal

import tifffile

from udfs.wsi.errors import ErrorCode, SlideError, damaged_header
from udfs.wsi.plausible import check_size
from udfs.wsi.store import File
from udfs.wsi.tiff.chain import check_chain
from udfs.wsi.tiff.index import Level, SlideIndex
from udfs.wsi.tiff.leica import scanned_area
from udfs.wsi.tiff.levels import downsample_of, level_of
from udfs.wsi.tiff.mpp import spacing_of
from udfs.wsi.tiff.philips import level_pages
from udfs.wsi.tiff.pictures import REDUCED, check_pictures, directories_added, is_added, level_0_of, warnings_of_added
from udfs.wsi.tiff.texts import DESCRIPTION, XMP, Texts, text_of, texts_of

_MASK, _MACRO = 4, 8  # bits of NewSubfileType; the latter is Aperio's
_LENS, _FOCAL_PLANE = 65421, 65424  # Hamamatsu's tags
_OVERLAP = re.compile(r"""<TileJointInfo [^<>]*?Overlap[XY]=["']-?0*[1-9]""")  # Ventana's XMP
_OVERLAPS = re.compile(r"\bOverlapsXY\s*=[\s0]*[^\s0;]")  # Trestle's description: pixels along x and y, level by level


@contextmanager
def _without_tifffile_logs() -> Iterator[None]:
    """Drops what tifffile logs in this thread: a fault in a header becomes a SlideError, a warning or nothing here."""
    log, thread = tifffile.logger(), threading.get_ident()

    def is_of_others(record: logging.LogRecord) -> bool:
        return record.thread != thread

    log.addFilter(is_of_others)
    try:
        yield
    finally:
        log.removeFilter(is_of_others)


@_without_tifffile_logs()
def read_index(file: File, stream: BinaryIO) -> SlideIndex:
    """Reads the directories of a file through a stream of its bytes.

    Raises SlideError: `not_a_slide`, `header_corrupt`, `file_truncated`, `size_implausible`, `unsupported_format` and what
    reading raises.
    """
    uri = file.uri
    stream.seek(0)
    _check_magic(stream.read(16), file)
    vendor, warnings = "unknown", list[str]()
    try:
        is_ndpi = check_chain(stream)
        tiff = tifffile.TiffFile(stream, is_ndpi=is_ndpi)
        texts = texts_of(tiff.pages.first)
        vendor = "hamamatsu" if is_ndpi else texts.vendor or vendor
        pages = _image_pages(tiff, texts, warnings)
        base = level_0_of(pages)
        width, height = int(base.imagewidth), int(base.imagelength)
        check_size(uri, width, height)
        _check_grid(texts, base)
        warnings += check_pictures(tiff, base, pages)
        levels = _pyramid(base, pages, file.info.size_bytes, warnings)
        mpp = spacing_of(texts, base, warnings)
    except SlideError as error:
        if uri in error.message:
            raise
        raise SlideError(error.code, f"{uri} (vendor: {vendor}): {error.message}") from None
    except MemoryError:  # not the slide's fault
        raise
    except Exception as error:
        text = file.redact(f"{type(error).__name__}: {error}")
        raise damaged_header(f"{uri}: the TIFF directory cannot be read ({text})") from None
    return SlideIndex(file.info, width, height, *mpp, vendor, levels, tuple(warnings))


def _check_magic(head: bytes, file: File) -> None:
    """Refuses a file that is not a TIFF, and one that ends before its first directory."""
    order: Literal["little", "big"] = "little" if head[:2] == b"II" else "big"
    version = int.from_bytes(head[2:4], order)
    if head[:2] not in (b"II", b"MM") or version not in (42, 43):
        kinds = {b"\xff\xd8\xff": "a JPEG image", b"\x89PNG": "a PNG image", b"PK": "a zip archive", b"%PDF": "a PDF"}
        unknown = "a text file" if head.isascii() and head.decode().isprintable() else "no TIFF"
        kind = next((name for magic, name in kinds.items() if head.startswith(magic)), unknown)
        text = f"{file.uri} is {kind}, whatever its name says: upload the slide itself"
        raise SlideError(ErrorCode.NOT_A_SLIDE, text)
    first = int.from_bytes(head[4:8] if version == 42 else head[8:16], order)
    if first + 2 > file.info.size_bytes:
        text = f"{file.uri} has {file.info.size_bytes:,} bytes, its directory begins at {first:,}: upload it again"
        raise SlideError(ErrorCode.FILE_TRUNCATED, text)


def _image_pages(tiff: Any, texts: Texts, warnings: list[str]) -> list[Any]:
    """Returns every directory that may hold the slide or a level of it, those of SubIFDs after their parent."""
    if texts.vendor == "leica":
        if "scn" in texts.broken:
            raise damaged_header(f"its Leica XML cannot be parsed ({texts.broken['scn']})")
        area = scanned_area(texts.xml["scn"])
        if area.focal_planes > 1:
            warnings.append(f"it has {area.focal_planes} focal planes: the first is read")
        return [tiff.pages[number].aspage() for number in area.directories]
    if "DataObject" in texts.xml and (levels := level_pages(tiff, texts.xml["DataObject"])):
        return levels
    pages: list[Any] = []
    for page in tiff.pages:
        full = page.aspage()
        pages += [full, *(full.pages or ())]
    images = [page for page in pages if page.imagewidth and page.imagelength]
    if not images:
        raise ValueError("no directory holds an image")
    planes = {_focal_plane(page) for page in images} - {None}
    if len(planes) > 1:
        warnings.append(f"it has {len(planes)} focal planes: the middle one is read")
    numbers = directories_added(texts.xml["OME"]) if "OME" in texts.xml else set()
    kept: list[Any] = []
    added: list[Any] = []
    for page in images:
        (added if _is_added(page) or page.treeindex[0] in numbers else kept).append(page)
    if kept:
        warnings += warnings_of_added(added, kept)
    return kept or images


def _is_added(page: Any) -> bool:
    """Returns whether a page is marked as a label, the whole glass slide, a mask or another focal plane."""
    is_marked = _focal_plane(page) != 0 or page.subfiletype & (_MASK | _MACRO)
    return is_marked or is_added(text_of(page, DESCRIPTION))


def _focal_plane(page: Any) -> float | None:
    """Returns the distance of a page of Hamamatsu's from the middle plane; None for a macro image or a map."""
    if not page.is_ndpi:
        return 0
    return page.tags.valueof(_FOCAL_PLANE, default=0) if page.tags.valueof(_LENS, default=1) > 0 else None


def _pyramid(base: Any, pages: list[Any], file_bytes: int, warnings: list[str]) -> tuple[Level, ...]:
    """Returns level 0 and its smaller copies, which are found by their structure; if it has SubIFDs, only these count."""
    levels = {1.0: level_of(base, file_bytes)}
    for page in base.pages or pages:
        downsample = _reduction(base, page)
        if downsample is None:
            continue
        try:
            level = level_of(page, file_bytes, downsample)
        except SlideError as error:  # level 0 suffices
            size = f"{page.imagewidth} x {page.imagelength} px"
            warnings.append(f"its level of {size} is not read: {error.message}")
        else:
            levels.setdefault(downsample, level)
    return tuple(levels[downsample] for downsample in sorted(levels))


def _reduction(base: Any, page: Any) -> float | None:
    """Returns the downsample of a page that is a level below level 0, else None."""
    is_alike = page.samplesperpixel == base.samplesperpixel and page.dtype == base.dtype
    downsample = downsample_of(page, base) if is_alike else None
    if downsample is None:
        return None
    # A thumbnail has the slide's shape too, but scanners store it in strips beside a tiled level 0. Hamamatsu stores all
    # in strips, and marks what is no level.
    is_marked = not base.is_tiled and downsample.is_integer() and page.subfiletype & REDUCED
    return downsample if page.is_tiled or page.is_ndpi or is_marked else None


def _check_grid(texts: Texts, base: Any) -> None:
    """Refuses slides whose tiles overlap: side by side they would show pixels twice."""
    descriptions = texts.description, text_of(base, DESCRIPTION)
    if _OVERLAP.search(text_of(base, XMP)) or any(_OVERLAPS.search(text) for text in descriptions):
        raise SlideError(
            ErrorCode.UNSUPPORTED_FORMAT,
            "its tiles overlap, as older scanners of Ventana and Trestle write them, and are no grid: convert it with a "
            "program that stitches them, for example `vips tiffsave in.bif out.tif --tile --pyramid --compression jpeg`",
        )
