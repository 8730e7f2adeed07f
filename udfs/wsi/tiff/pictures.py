"""Several pictures in one TIFF: which of them is the slide, or that nothing tells."""

import re
from collections.abc import Iterable, Sequence
from typing import Any
from xml.etree.ElementTree import Element

from udfs.wsi.errors import ErrorCode, SlideError
from udfs.wsi.tiff.levels import downsample_of

REDUCED = 1  # bit of NewSubfileType
_UNCOMPRESSED = 1
_MAKE = 271
_CLEARLY = 4  # times the pixels of the next picture: label, macro and the like have far fewer than a slide
# How descriptions and names of pictures begin that scanners add to the slide, or Aperio's second line; PerkinElmer's XML.
_ADDED = re.compile(
    r"^(label|macro|thumbnail|overview|probability)|<ImageType>\s*(thumbnail|overview|label|macro)",
    re.IGNORECASE | re.MULTILINE,
)


def is_added(text: str) -> bool:
    """Whether a picture's description or name says that it is a label, the whole glass slide or the like."""
    return _ADDED.search(text) is not None


def directories_added(ome: Element | None) -> frozenset[int]:
    """The numbers of the directories that OME-XML calls label, macro or the like."""
    images = [] if ome is None else ome.iterfind("{*}Image")
    data = [part for image in images if is_added(image.get("Name", "")) for part in image.iterfind(".//{*}TiffData")]
    return frozenset(int(part.get("IFD", "0")) for part in data)


def check_pictures(tiff: Any, base: Any, pages: Sequence[Any]) -> list[str]:
    """Refuse a file of which nothing tells which picture is the slide.

    Sections, series of OME, focal planes, channels and time points all come as pictures of about one size: to read one is
    to lose the others without a word. A picture that is far larger than all others, or the largest and the only one in
    tiles, is the slide: it is read, and a warning says so, for the others may be sections as well as macro images.

    Args:
        tiff: a `tifffile.TiffFile`.
        base: its largest `tifffile.TiffPage`.
        pages: that may hold the slide or a level of it; what scanners are known to add is not among them.

    Returns:
        Warnings.

    Raises:
        SlideError: `unsupported_format`, with the number of pictures.
    """
    planes = _planes_behind(tiff, base)
    others = _others(tiff, base, pages)
    size = f"{base.imagewidth} x {base.imagelength} px"
    if planes > 1:
        raise _unclear(f"{planes} pictures of {size}", "bfconvert in.tif out_z%z_c%c_t%t.ome.tif")
    if not others:
        return []
    following = f"{others[0].imagewidth} x {others[0].imagelength} px"
    count = 1 + len(others)
    # Scanners store in strips what they add to a slide in tiles.
    rivals = [page for page in others if page.is_tiled or not base.is_tiled]
    if rivals and _CLEARLY * _area(rivals[0]) > _area(base):
        page = "vips tiffsave 'in.tif[page=0]' out.tif --tile --pyramid --compression jpeg --bigtiff"
        raise _unclear(f"{count} pictures, the largest of {size}, the next of {following}", page)
    return [f"it holds {count} pictures: the largest, of {size}, is read, the next is one of {following}"]


def _unclear(what: str, command: str) -> SlideError:
    return SlideError(
        ErrorCode.UNSUPPORTED_FORMAT,
        f"it holds {what}: sections, series, focal planes, channels or time points, of which nothing tells which is the "
        f"slide. Write each to a file of its own, for example with `{command}`",
    )


def _others(tiff: Any, base: Any, pages: Iterable[Any]) -> list[Any]:
    """The pictures beside the slide, each without its smaller copies, the largest first."""
    found: list[Any] = []
    # Where OME's levels are SubIFDs, what has a directory of its own is a picture of its own, whatever its shape.
    originals = [] if tiff.is_ome and base.pages else [base]
    for page in sorted(pages, key=_area, reverse=True):
        is_copy = len(page.treeindex) > 1 or page.subfiletype & REDUCED or _is_vendors(tiff, base, page)
        if page is not base and not is_copy and not any(_is_smaller(page, one) for one in originals):
            found.append(page)
            originals.append(page)
    return found


def _is_vendors(tiff: Any, base: Any, page: Any) -> bool:
    """Whether a page is one that the vendor adds: in strips, of Aperio and Huron; all that are smaller, of Hamamatsu."""
    if page.is_ndpi:
        return _area(page) < _area(base)
    is_known = tiff.is_svs or str(base.tags.valueof(_MAKE, default="")).startswith("Huron")
    return is_known and base.is_tiled and not page.is_tiled


def _is_smaller(page: Any, original: Any) -> bool:
    """Whether a page has the shape of another and fewer pixels: a level of it or a thumbnail."""
    full_size_px = int(original.imagewidth), int(original.imagelength)
    downsample = downsample_of(int(page.imagewidth), int(page.imagelength), full_size_px)
    return downsample is not None and downsample > 1.5


def _planes_behind(tiff: Any, base: Any) -> int:
    """How many pictures lie behind one another where only the first has a directory, as ImageJ and MetaMorph store stacks."""
    if base.compression != _UNCOMPRESSED or not (tiff.is_imagej or tiff.is_shaped or tiff.is_stk):
        return 1
    for series in tiff.series:
        planes = series.size // base.size
        if series.keyframe.treeindex == base.treeindex and planes > len(tiff.pages):
            end = int(base.dataoffsets[0]) + int(series.nbytes)
            return int(planes) if end <= tiff.filehandle.size else 1
    return 1


def _area(page: Any) -> int:
    return int(page.imagewidth) * int(page.imagelength)
