"""What a slide's directories say: size, levels, vendor, spacing; and whether that can be true."""

import logging
from typing import Any, Literal, cast

import tifffile
from tiffslide import TiffSlide

from udfs.wsi.errors import ErrorCode, SlideError
from udfs.wsi.store import File
from udfs.wsi.store.stream import open_stream
from udfs.wsi.tiff.index import Level, SlideIndex
from udfs.wsi.tiff.levels import level_of

_MAX_EDGE_PX = 1_000_000
_MAX_AREA_PX = 60_000_000_000  # 245,000 px squared; at 1/16 this takes 700 MB
_MAX_PAGES = 200
_MPP_RANGE = (0.02, 20.0)  # um/px; outside lie the 72 and 96 dpi of image editors, not scanners

# tifffile reports what it stumbles over on its logger; here it becomes a SlideError or is of no interest to users.
logging.getLogger("tifffile").setLevel(logging.CRITICAL)


def read_index(file: File) -> SlideIndex:
    """Read the directories of a file.

    Raises:
        SlideError: `not_a_slide`, `header_corrupt`, `file_truncated`, `size_implausible`, `unsupported_format` and what
            reading raises.
    """
    uri, size = file.uri, file.info.size_bytes
    with open_stream(file) as stream:
        _check_magic(stream.read(16), file)
        stream.seek(0)
        try:
            slide = TiffSlide(cast(Any, stream))
            pages = _image_pages(slide.ts_tifffile)
            base = max(pages, key=lambda page: int(page.imagewidth) * int(page.imagelength))
            width, height = int(base.imagewidth), int(base.imagelength)
            if max(width, height) > _MAX_EDGE_PX or width * height > _MAX_AREA_PX:
                raise SlideError(
                    ErrorCode.SIZE_IMPLAUSIBLE,
                    f"{uri}: the header claims {width} x {height} px, over the limit of {_MAX_EDGE_PX} px a side and "
                    f"{_MAX_AREA_PX} px in all: the header is damaged; upload or export the slide again",
                )
            properties = _properties(slide, base)
            vendor = str(properties.get("tiffslide.vendor") or "unknown")
            levels = _pyramid(base, pages)
        except SlideError as error:
            message = error.message if uri in error.message else f"{uri}: {error.message}"
            raise SlideError(error.code, message) from None
        except Exception as error:
            text = file.redact(f"{type(error).__name__}: {error}")
            raise SlideError(
                ErrorCode.HEADER_CORRUPT, f"{uri}: the TIFF directory can't be read ({text}): upload the slide again"
            ) from None
    end = max(int((level.offsets + level.counts).max(initial=0)) for level in levels)
    if end > size:
        raise SlideError(
            ErrorCode.FILE_TRUNCATED, f"{uri} has {size:,} bytes where the header counts on {end:,}: upload it again"
        )
    mpp_x, mpp_y = (_plausible_mpp(properties.get(f"tiffslide.mpp-{axis}")) for axis in "xy")
    return SlideIndex(file.info, width, height, mpp_x, mpp_y, vendor, levels)


def _check_magic(head: bytes, file: File) -> None:
    """Say what the file is where it is no TIFF, and where its first directory lies beyond its end."""
    kinds = {b"\xff\xd8\xff": "a JPEG image", b"\x89PNG": "a PNG image", b"PK": "a zip archive", b"%PDF": "a PDF"}
    order: Literal["little", "big"] = "little" if head[:2] == b"II" else "big"
    version = int.from_bytes(head[2:4], order) if head[:2] in (b"II", b"MM") else 0
    if version not in (42, 43):
        kind = next((name for magic, name in kinds.items() if head.startswith(magic)), "no TIFF")
        if kind == "no TIFF" and head.isascii() and head.decode().isprintable():
            kind = "a text file"
        raise SlideError(
            ErrorCode.NOT_A_SLIDE, f"{file.uri} is {kind}, whatever its name says: upload the slide itself"
        )
    first = int.from_bytes(head[4:8] if version == 42 else head[8:16], order)
    if first + 2 > file.info.size_bytes:
        raise SlideError(
            ErrorCode.FILE_TRUNCATED,
            f"{file.uri} has {file.info.size_bytes:,} bytes, its directory begins at {first:,}: upload it again",
        )


def _image_pages(tiff: Any) -> list[Any]:
    """Every directory that holds an image, those of SubIFDs included."""
    pages: list[Any] = []
    for index, page in enumerate(tiff.pages):
        if index >= _MAX_PAGES:
            break
        full = page.aspage() if isinstance(page, tifffile.TiffFrame) else page
        pages.append(full)
        if full.pages is not None:
            pages.extend(full.pages)
    images = [page for page in pages if page.imagewidth and page.imagelength]
    if not images:
        raise ValueError("no directory holds an image")
    return images


def _pyramid(base: Any, pages: list[Any]) -> tuple[Level, ...]:
    """Level 0 and the pages that are smaller copies of it, told by structure: labels and macro images have other shapes."""
    size = int(base.imagewidth), int(base.imagelength)
    levels = {1.0: level_of(base)}
    for page in pages:
        if page is base or not _is_reduction(base, page):
            continue
        try:
            level = level_of(page, size)
        except SlideError:
            continue  # level 0 is good, which is enough
        levels.setdefault(level.downsample, level)
    return tuple(levels[downsample] for downsample in sorted(levels))


def _is_reduction(base: Any, page: Any) -> bool:
    # A thumbnail has the slide's shape too, but scanners store it in strips beside a tiled level 0.
    if base.is_tiled and not page.is_tiled:
        return False
    if page.samplesperpixel != base.samplesperpixel or page.dtype != base.dtype:
        return False
    downsample = (base.imagewidth / page.imagewidth + base.imagelength / page.imagelength) / 2
    close = max(
        abs(base.imagewidth / downsample - page.imagewidth), abs(base.imagelength / downsample - page.imagelength)
    )
    whole = abs(downsample - round(downsample)) < 0.05 * downsample
    return bool(downsample > 1.5 and close < 2.0 and (page.is_tiled or (whole and page.subfiletype & 1)))


def _properties(slide: TiffSlide, base: Any) -> dict[str, Any]:
    """Vendor and spacing by tiffslide's names; it refuses slides whose colours are stored apart, which are read here."""
    try:
        return slide.properties
    except NotImplementedError:
        if 282 not in base.tags:
            return {}
        per_um = base.get_resolution(tifffile.RESUNIT.MICROMETER)
        return {f"tiffslide.mpp-{axis}": 1 / pixels for axis, pixels in zip("xy", per_um, strict=True) if pixels}


def _plausible_mpp(value: Any) -> float | None:
    try:
        mpp = float(value)
    except (TypeError, ValueError):
        return None
    return mpp if _MPP_RANGE[0] <= mpp <= _MPP_RANGE[1] else None
