"""Philips TIFF: the slide's spacing and the sizes of its levels, as the XML says."""

import re
from typing import Any
from xml.etree.ElementTree import Element

from udfs.wsi.tiff.texts import DESCRIPTION, number_of, text_of

_LEVELS = "./Attribute[@Name='PIIM_PIXEL_DATA_REPRESENTATION_SEQUENCE']/Array/DataObject"


def slide_spacing(root: Element) -> tuple[float, float] | None:
    """um/px of the slide along x and y; that of the label or macro image stands in the same XML.

    Args:
        root: of the XML.
    """
    candidates = [*_slides(root), *(level for slide in _slides(root) for level in slide.iterfind(_LEVELS)), root]
    return next((spacing for part in candidates if (spacing := _spacing(part))), None)


def level_pages(tiff: Any, root: Element) -> list[Any]:
    """The slide's directories, cut to it: they count in what pads a level to whole tiles.

    Args:
        tiff: a `tifffile.TiffFile`.
        root: of the XML.

    Returns:
        Of each level the `tifffile.TiffPage`, the finest first; none if the XML lists other levels than there are.
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
    """Edge of a level without padding; with so much of it that the level keeps all of its tiles."""
    return int(min(padded_px, max(full_px // max(round(downsample), 1), padded_px - tile_px + 1)))


def _slides(root: Element) -> list[Element]:
    """What the XML says of whole slides among the scanned images."""
    images = root.iterfind("./Attribute[@Name='PIM_DP_SCANNED_IMAGES']/Array/DataObject")
    return [image for image in images if (_text(image, "PIM_DP_IMAGE_TYPE")).strip() == "WSI"]


def _spacing(part: Element) -> tuple[float, float] | None:
    """The spacing of what an element is about: in the XML that of rows first, in mm."""
    values = (number_of(value) for value in re.split(r'[\s"\\]+', _text(part, "DICOM_PIXEL_SPACING")))
    mm = [value for value in values if value]
    return (mm[1] * 1000, mm[0] * 1000) if len(mm) == 2 else None


def _text(part: Element, name: str) -> str:
    return part.findtext(f"./Attribute[@Name='{name}']") or ""
