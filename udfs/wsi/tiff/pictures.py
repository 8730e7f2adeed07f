"""Several pictures in one TIFF: which of them is the slide, if that can be known."""

import re
from collections.abc import Iterable, Sequence
from typing import Any
from xml.etree.ElementTree import Element

import numpy as np

from udfs.wsi.errors import ErrorCode, SlideError
from udfs.wsi.tiff.decode import UNCOMPRESSED
from udfs.wsi.tiff.levels import downsample_of
from udfs.wsi.tiff.texts import directory_of

REDUCED = 1  # bit of NewSubfileType
_MAKE = 271
_CLEARLY = 4  # times the pixels of the next picture: label, macro and the like have far fewer than a slide
_ADDED = "label|macro|thumbnail|overview"  # pictures that scanners add to the slide
_ADDED_NAME = re.compile(rf"\s*({_ADDED})( image)?\s*", re.IGNORECASE)  # of OME-XML; others begin so, as Macrophage.svs
_ADDED_LINE = re.compile(rf"\s*({_ADDED}|probability)(?![^\W_])", re.IGNORECASE)
_ADDED_TYPE = re.compile(rf"<ImageType>\s*({_ADDED})\b", re.IGNORECASE)  # of PerkinElmer's XML
_HEAD_CHARS = 4096  # of a description, in which writers name the picture


def is_added(description: str) -> bool:
    """Returns whether a picture's description names it a label, the whole glass slide or the like.

    The name is in the first line, or in the second after Aperio's; further lines may hold fields such as `Label: HE 12`.
    """
    head = description[:_HEAD_CHARS]
    lines = head.splitlines()[: 2 if head.startswith("Aperio") else 1]
    return any(_ADDED_LINE.match(line) for line in lines) or _ADDED_TYPE.search(head) is not None


def directories_added(ome: Element) -> set[int | None]:
    """Returns the numbers of the directories that OME-XML calls label, macro or the like."""
    images = [image for image in ome.iterfind("{*}Image") if _ADDED_NAME.fullmatch(image.get("Name", ""))]
    return {directory_of(part, ome) for image in images for part in image.iterfind(".//{*}TiffData")}


def warnings_of_added(added: Iterable[Any], pages: Iterable[Any]) -> list[str]:
    """Returns a warning if a picture of `added`, left out by its name or mark, is larger than all of `pages`."""
    left_out = max((page for page in added if page.is_tiled), key=_area, default=None)
    if left_out is None or _area(left_out) <= max(_area(page) for page in pages):
        return []
    return [
        f"its picture of {_size(left_out)} is the largest, but is called a label, a macro image, a mask or the like: it is "
        "not read"
    ]


def level_0_of(pages: Sequence[Any]) -> Any:
    """Returns the page that is the slide: the largest in tiles, because scanners store added pictures in strips.

    A larger page in strips is the slide if the page in tiles is a smaller copy of it, or if none is in tiles. Among pages of
    one size, a mask in grey is not the slide.
    """
    base = max(pages, key=lambda page: (page.is_tiled, _area(page), page.samplesperpixel))
    return max((page for page in pages if downsample_of(base, page)), key=_area, default=base)


def check_pictures(tiff: Any, base: Any, pages: Sequence[Any]) -> list[str]:
    """Refuses a file if nothing shows which picture is the slide.

    Sections, series of OME, focal planes, channels and time points are all pictures of about one size: to read one is to
    lose the others silently. A picture that is far larger than all others, or the largest and the only one in tiles, is the
    slide. It is read with a warning, because the others may be sections as well as macro images.

    `base` is the page of level 0, and one of `pages`, which may hold the slide or a level of it. Returns warnings. Raises
    SlideError `unsupported_format` with the number of pictures.
    """
    if (planes := _planes_behind(tiff, base)) > 1:
        raise _unclear(f"{planes} pictures of {_size(base)}", "bfconvert in.tif out_z%z_c%c_t%t.ome.tif")
    others = _others(tiff, base, pages)
    if not others:
        return []
    count, size, following = 1 + len(others), _size(base), _size(others[0])
    rival = next((page for page in others if _may_be_a_slide(page, base)), None)
    if rival and _CLEARLY * _area(rival) > _area(base):
        command = "vips tiffsave 'in.tif[page=0]' out.tif --tile --pyramid --compression jpeg --bigtiff"
        raise _unclear(f"{count} pictures, the largest of {size}, the next of {following}", command)
    if _area(others[0]) > _area(base):
        found = f"the largest in tiles, of {size}, is read, the largest in strips has {following}"
    else:
        found = f"the largest, of {size}, is read, the next is one of {following}"
    return [f"it holds {count} pictures: {found}"]


def _unclear(what: str, command: str) -> SlideError:
    return SlideError(
        ErrorCode.UNSUPPORTED_FORMAT,
        f"it holds {what}: sections, series, focal planes, channels or time points, and nothing shows which is the "
        f"slide. Write each to a file of its own, for example with `{command}`",
    )


def _others(tiff: Any, base: Any, pages: Iterable[Any]) -> list[Any]:
    """Returns the pictures beside the slide, without their smaller copies, the largest first."""
    found: list[Any] = []
    # If OME's levels are SubIFDs, a directory of its own is a picture of its own, whatever its shape.
    originals = [] if tiff.is_ome and base.pages else [base]
    for page in sorted(pages, key=_area, reverse=True):
        if page is base or len(page.treeindex) > 1 or _is_vendors(tiff, base, page):
            continue
        is_marked = bool(page.subfiletype & REDUCED)
        if not any(downsample_of(page, one) or (is_marked and _is_padded(page, one)) for one in originals):
            found.append(page)
            originals.append(page)
    return found


def _may_be_a_slide(page: Any, base: Any) -> bool:
    """Returns whether a picture may be another section: not in strips beside tiles, in grey beside colours, or padded."""
    is_like = (page.is_tiled or not base.is_tiled) and (page.samplesperpixel >= 3 or base.samplesperpixel < 3)
    return is_like and not _is_padded(page, base)


def _is_vendors(tiff: Any, base: Any, page: Any) -> bool:
    """Returns whether a page is one that the vendor adds: in strips, of Aperio and Huron; smaller ones, of Hamamatsu."""
    if page.is_ndpi:
        return _area(page) < _area(base)
    is_known = tiff.is_svs or str(base.tags.valueof(_MAKE, default="")).startswith("Huron")
    return is_known and base.is_tiled and not page.is_tiled


def _is_padded(page: Any, original: Any) -> bool:
    """Returns whether a page has whole tiles and a half, quarter ... of another's edges, to within one tile."""
    edges, full = (np.array([one.imagewidth, one.imagelength], np.int64) for one in (page, original))
    tile = np.array([page.tilewidth, page.tilelength], np.int64)
    if not page.is_tiled or min(*edges, *full, *tile) < 1 or (edges % tile).any():
        return False
    halved = full / 2.0 ** np.arange(1, int(full.max()).bit_length())[:, None]
    return bool((abs(halved - edges) < tile).all(axis=1).any())


def _planes_behind(tiff: Any, base: Any) -> int:
    """Returns the number of pictures behind one directory, as ImageJ and MetaMorph store stacks."""
    if base.compression != UNCOMPRESSED or not (tiff.is_imagej or tiff.is_shaped or tiff.is_stk):
        return 1
    for series in tiff.series:
        planes = series.size // base.size
        if series.keyframe.treeindex == base.treeindex and planes > len(tiff.pages):
            end = int(base.dataoffsets[0]) + int(series.nbytes)
            return int(planes) if end <= tiff.filehandle.size else 1
    return 1


def _size(page: Any) -> str:
    return f"{page.imagewidth} x {page.imagelength} px"


def _area(page: Any) -> int:
    return int(page.imagewidth) * int(page.imagelength)
