"""The spacing of level 0, in um/px, from its own directory and the vendor's XML."""

import re
import unicodedata
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any
from xml.etree.ElementTree import Element

from udfs.wsi.plausible import plausible_spacing
from udfs.wsi.tiff.leica import scanned_area
from udfs.wsi.tiff.philips import slide_spacing
from udfs.wsi.tiff.texts import DESCRIPTION, XMP, Texts, directory_of, number_of, text_of, texts_of

_X_RESOLUTION, _Y_RESOLUTION, _RESOLUTION_UNIT = 282, 283, 296
_INCH = 2
_UM_PER_RESOLUTION_UNIT = {_INCH: 25_400.0, 3: 10_000.0, 4: 1_000.0, 5: 1.0}  # 1 is "none"; 4 and 5 are not in TIFF 6.0
_SAME = 0.01  # two spacings that differ by less than this share are the same: mpp is seldom known better

# OME's UnitsLength, of what can be the size of a pixel, and the words of ImageJ.
_UM = {"pm": 1e-6, "\u00c5": 1e-4, "nm": 1e-3, "\u03bcm": 1.0, "um": 1.0, "mm": 1e3, "cm": 1e4, "dm": 1e5, "m": 1e6}
_UM |= {"fm": 1e-9, "am": 1e-12, "zm": 1e-15, "ym": 1e-18, "dam": 1e7, "hm": 1e8, "km": 1e9}
_UM |= {"pt": 25_400 / 72, "thou": 25.4, "li": 25_400 / 12, "in": 25_400.0, "ft": 304_800.0, "yd": 914_400.0}
_UM_BY_WORD = {  # in the singular
    "micron": 1.0,
    "micrometer": 1.0,
    "micrometre": 1.0,
    "inch": 25_400.0,
    "inche": 25_400.0,
    "nanometer": 1e-3,
}
_UM_BY_WORD |= {"nanometre": 1e-3, "millimeter": 1e3, "millimetre": 1e3, "centimeter": 1e4, "centimetre": 1e4}
_UM_BY_WORD |= {"meter": 1e6, "metre": 1e6, "angstrom": 1e-4}

_NUMBER = re.compile(r"\s*[+-]?[\d.,]+(e[+-]?\d+)?", re.IGNORECASE)
_APERIO_MPP = re.compile(r"\|\s*MPP\s*=([^|]*)")
_IMAGEJ_UNIT = re.compile(r"^(y?unit)=([^\r\n]*)", re.MULTILINE)

Pair = tuple[float | None, float | None]  # along x and y; None if unknown


@dataclass(frozen=True)
class Spacing:
    """um/px of level 0; None if the file has no plausible value."""

    mpp_x: float | None
    mpp_y: float | None
    warnings: tuple[str, ...] = ()


def spacing_of(texts: Texts, base: Any) -> Spacing:
    """Returns the spacing of level 0.

    The first source with a plausible value is used. The order is OpenSlide's for the sources that it knows; OME-XML comes
    before the tags, as its specification demands. `base` is the `tifffile.TiffPage` of level 0.
    """
    sources: dict[str, Callable[[Texts, Any], Pair]] = {
        "OME-XML": _ome,
        "the Aperio header": _aperio,
        "the Philips XML": _philips,
        "the Ventana XML": _ventana,
        "the ImageJ header": _imagej,
        "the TIFF tags": _tags,
        "the Leica XML": _leica,
    }
    pairs = {name: read(texts, base) for name, read in sources.items()}
    found = {name: mpp for name, pair in pairs.items() if (mpp := plausible_spacing(*pair))}
    warnings = texts.warnings
    if not found:
        return Spacing(None, None, tuple(warnings))
    (name, mpp), *others = found.items()
    if None in pairs[name]:
        warnings.append(f"{_text(mpp)} um/px by {name}, along one axis only: pixels are taken as square")
    for other, value in others:
        if any(abs(one - two) > _SAME * one for one, two in zip(mpp, value, strict=True)):
            warnings.append(f"{_text(mpp)} um/px by {name}, {_text(value)} by {other}: the first is used")
    return Spacing(*mpp, tuple(warnings))


def _text(pair: tuple[float, float]) -> str:
    x, y = (f"{value:.4g}" for value in pair)
    return x if x == y else f"{x} x {y}"


def _tags(texts: Texts, base: Any) -> Pair:
    x, y = (_ratio(base.tags.valueof(code)) for code in (_X_RESOLUTION, _Y_RESOLUTION))
    if texts.software.startswith("MedScan"):  # Trestle's scanners write um/px there
        return x, y
    per_um = _UM_PER_RESOLUTION_UNIT.get(base.tags.valueof(_RESOLUTION_UNIT, default=_INCH))
    if per_um is None:
        return None, None
    return per_um / x if x else None, per_um / y if y else None


def _aperio(texts: Texts, base: Any) -> Pair:
    description = text_of(base, DESCRIPTION)
    if not description.startswith("Aperio"):
        return None, None
    value = next(iter(_APERIO_MPP.findall(description)[-1:]), "")
    number = _NUMBER.match(value)
    mpp = number_of(number[0]) if number else None
    um = _um_of(value[number.end() :].strip() or "um") if number else None
    mpp = mpp * um if mpp and um else None
    return mpp, mpp


def _imagej(texts: Texts, base: Any) -> Pair:
    """ImageJ's tags are pixels per unit, and its description names the unit; other programs write the same."""
    description = text_of(base, DESCRIPTION)
    if not description.startswith(("ImageJ=", "SCIFIO=")):
        return None, None
    fields = dict(_IMAGEJ_UNIT.findall(description))
    x, y = (_ratio(base.tags.valueof(code)) for code in (_X_RESOLUTION, _Y_RESOLUTION))
    unit = fields.get("unit")
    um = [_um_of(fields.get(name, unit)) for name in ("unit", "yunit")]
    return (um[0] / x if um[0] and x else None), (um[1] / y if um[1] and y else None)


def _philips(texts: Texts, base: Any) -> Pair:
    root = texts.xml.get("DataObject")
    return (root is not None and slide_spacing(root)) or (None, None)


def _ventana(texts: Texts, base: Any) -> Pair:
    scan = texts.xml.get("iScan")
    if scan is None and "iScan" in text_of(base, XMP):  # of level 0, if another picture comes first
        scan = texts_of(base).xml.get("iScan")
    mpp = None if scan is None else number_of(scan.get("ScanRes"))
    return mpp, mpp


def _leica(texts: Texts, base: Any) -> Pair:
    scn = texts.xml.get("scn")
    return (None, None) if scn is None else scanned_area(scn).mpp


def _ome(texts: Texts, base: Any) -> Pair:
    root = texts.xml.get("OME")
    pixels = None if root is None else _pixels_of(root, base)
    if pixels is None:
        return None, None
    x, y = (_physical_size(pixels, axis) for axis in "XY")
    return x, y


def _physical_size(pixels: Element, axis: str) -> float | None:
    size = number_of(pixels.get(f"PhysicalSize{axis}"))
    um = _um_of(pixels.get(f"PhysicalSize{axis}Unit", "um"))
    return size * um if size and um else None


def _pixels_of(root: Element, base: Any) -> Element | None:
    """Returns the OME-XML of level 0: of the image that lists its directory, else of the image of its size."""
    width, height = str(base.imagewidth), str(base.imagelength)
    same_size = [
        pixels
        for pixels in root.iterfind("{*}Image/{*}Pixels")
        if (pixels.get("SizeX", width), pixels.get("SizeY", height)) == (width, height)
    ]
    mine = [
        pixels
        for pixels in same_size
        if any(directory_of(plane, root) == base.index for plane in pixels.iterfind("{*}TiffData"))
    ]
    return next(iter(mine or same_size), None)


def _um_of(unit: str | None) -> float | None:
    """Returns the micrometres in a unit of length; None for other units, such as pixel."""
    if unit is None:
        return None
    # Unicode has two micro signs, ImageJ escapes them, and of UTF-8 that was taken for Latin-1 the first byte is too many.
    text = re.sub(r"\\u00b5", "\u00b5", unit.strip(), flags=re.IGNORECASE).replace("\u00c2\u00b5", "\u00b5")
    plain = unicodedata.normalize("NFKC", text)
    return _UM.get(plain, _UM_BY_WORD.get(plain.lower().removesuffix("s")))


def _ratio(value: Any) -> float | None:
    """Returns a resolution tag as a number: TIFF's rational, or another type that a writer chose."""
    numbers = value if isinstance(value, tuple) else (value, 1)
    try:
        return float(numbers[0]) / float(numbers[1]) or None
    except (IndexError, TypeError, ValueError, ZeroDivisionError):
        return None
