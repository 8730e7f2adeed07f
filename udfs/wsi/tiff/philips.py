"""Philips TIFF: the spacing of the slide and the sizes of its levels, from the XML."""

import re
from typing import Any
from xml.etree.ElementTree import Element

from udfs.wsi.tiff.texts import DESCRIPTION, number_of, text_of

_LEVELS = "./Attribute[@Name='PIIM_PIXEL_DATA_REPRESENTATION_SEQUENCE']/Array/DataObject"


def slide_spacing(root: Element) -> tuple[float, float] | tuple[None, None]:
    """Returns um/px of the slide along x and y. The same XML has the spacing of the label and macro images."""
    candidates = [*_slides(root), *(level for slide in _slides(root) for level in slide.iterfind(_LEVELS)), root]
    return next((spacing for part in candidates if (spacing := _spacing(part))), (None, None))


def level_pages(tiff: Any, root: Element) -> list[Any]:
    """Returns the `tifffile.TiffPage` of each level, the finest first; none if the XML lists other levels than the file.

    The sizes of the pages are cut to the slide: in the file they include the padding to whole tiles.
    """
    pages = [page.aspage() for page in tiff.pages]
    pages = [page for page in pages if page.is_tiled and not text_of(page, DESCRIPTION).startswith(("Macro", "Label"))]
    spacings = [_spacing(level) for slide in _slides(root)[:1] for level in slide.iterfind(_LEVELS)]
    if len(pages) != len(spacings) or not spacings or spacings[0] is None:
        return []
    first, (x, y) = pages[0], spacings[0]
    for page, spacing in zip(pages[1:], spacings[1:], strict=True):
        if spacing is None:
            return []
        page.imagewidth = _cut(first.imagewidth, spacing[0] / x, page.imagewidth, page.tilewidth)
        page.imagelength = _cut(first.imagelength, spacing[1] / y, page.imagelength, page.tilelength)
    return pages


def _cut(full_px: int, downsample: float, padded_px: int, tile_px: int) -> int:
    """Returns the edge of a level without padding, but long enough for the level to keep all of its tiles."""
    return int(min(padded_px, max(full_px // max(round(downsample), 1), padded_px - tile_px + 1)))


def _slides(root: Element) -> list[Element]:
    """Returns the elements of whole slides among the scanned images."""
    images = root.iterfind("./Attribute[@Name='PIM_DP_SCANNED_IMAGES']/Array/DataObject")
    return [image for image in images if _text(image, "PIM_DP_IMAGE_TYPE").strip() == "WSI"]


def _spacing(part: Element) -> tuple[float, float] | None:
    """Returns the spacing in an element, um/px along x and y. The XML has that of rows first, in mm."""
    values = (number_of(value) for value in re.split(r'[\s"\\]+', _text(part, "DICOM_PIXEL_SPACING")))
    mm = [value for value in values if value]
    return (mm[1] * 1000, mm[0] * 1000) if len(mm) == 2 else None


def _text(part: Element, name: str) -> str:
    return part.findtext(f"./Attribute[@Name='{name}']") or ""
