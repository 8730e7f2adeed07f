"""Leica SCN: the directories of the slide and their spacing, from the XML."""

from dataclasses import dataclass
from xml.etree.ElementTree import Element

from udfs.wsi.errors import ErrorCode, SlideError, damaged_header

Box = tuple[int, int, int, int]  # left, top, width and height on the glass, nm

_SAME = 0.01  # of an edge of the glass


@dataclass(frozen=True)
class Area:
    """A rectangle of the glass that was scanned."""

    directories: tuple[int, ...]  # of its first focal plane, the widest first
    focal_planes: int
    mpp: tuple[float | None, float | None]  # um/px of the first directory, along x and y


def scanned_area(scn: Element) -> Area:
    """Returns the one area that was scanned, from the root of the XML, without the macro image of the whole glass.

    Raises SlideError: `unsupported_format` if there are several areas, `header_corrupt` if there is none.
    """
    glass = _box(scn.find("{*}collection"))
    images = [image for image in scn.iterfind(".//{*}image") if _levels(image)]
    areas = [image for image in images if glass is None or not _is_same(_box(image.find("{*}view")), glass)]
    if not areas:  # the whole glass was scanned
        areas = sorted(images, key=lambda image: -_number(_levels(image)[0], "sizeX"))[:1]
    if not areas:
        raise damaged_header("its Leica XML lists no image")
    if len(areas) > 1:
        raise SlideError(
            ErrorCode.UNSUPPORTED_FORMAT,
            f"{len(areas)} areas of the glass were scanned apart, and only slides of one area are read: convert it, for "
            "example with `vips tiffsave in.scn out.tif --tile --pyramid --compression jpeg --bigtiff`",
        )
    levels = _levels(areas[0])
    planes = [level.get("z", "0") for level in levels]
    first = [level for level, plane in zip(levels, planes, strict=True) if plane == planes[0]]
    _, _, width_nm, height_nm = _box(areas[0].find("{*}view")) or (0, 0, 0, 0)
    mpp_x = width_nm / 1000 / (_number(first[0], "sizeX") or 1) or None
    mpp_y = height_nm / 1000 / (_number(first[0], "sizeY") or 1) or None
    return Area(tuple(_number(level, "ifd") for level in first), len(set(planes)), (mpp_x, mpp_y))


def _levels(image: Element) -> list[Element]:
    """Returns the levels of an image, the first focal plane before the others, the widest level of each first."""
    levels = image.iterfind("{*}pixels/{*}dimension")
    return sorted(levels, key=lambda level: (_number(level, "z"), -_number(level, "sizeX")))


def _box(element: Element | None) -> Box | None:
    """Returns the place of an element on the glass; None if the XML gives no size."""
    if element is None or element.get("sizeX") is None:
        return None
    left, top, width, height = (_number(element, name) for name in ("offsetX", "offsetY", "sizeX", "sizeY"))
    return left, top, width, height


def _is_same(box: Box | None, glass: Box) -> bool:
    """Returns whether an image shows the whole glass, to within 1 % of its edges: writers round."""
    return box is not None and all(
        abs(one - other) <= _SAME * edge for one, other, edge in zip(box, glass, 2 * glass[2:], strict=True)
    )


def _number(element: Element, name: str) -> int:
    return int(element.get(name, "0"))
