"""The spacing of level 0, in um/px, from its own directory and the vendor's XML."""

import re
import unicodedata
from typing import Any
from xml.etree.ElementTree import Element

from udfs.wsi.plausible import plausible_spacing
from udfs.wsi.tiff.leica import scanned_area
from udfs.wsi.tiff.philips import slide_spacing
from udfs.wsi.tiff.texts import DESCRIPTION, XMP, Texts, directory_of, number_of, text_of, texts_of

_X_RESOLUTION, _Y_RESOLUTION, _RESOLUTION_UNIT = 282, 283, 296
_RESOLUTION_UNITS = {2: "in", 3: "cm", 4: "mm", 5: "um"}  # 1 is "none"; 4 and 5 are not in TIFF 6.0
_SAME = 0.01  # two spacings that differ by less than this share are the same: mpp is seldom known better

# OME's UnitsLength, of what can be the size of a pixel, and the words of ImageJ, in the singular.
_UM = {"pm": 1e-6, "\u00c5": 1e-4, "nm": 1e-3, "\u03bcm": 1.0, "um": 1.0, "mm": 1e3, "cm": 1e4, "dm": 1e5, "m": 1e6}
_UM |= {"fm": 1e-9, "am": 1e-12, "zm": 1e-15, "ym": 1e-18, "dam": 1e7, "hm": 1e8, "km": 1e9}
_UM |= {"pt": 25_400 / 72, "thou": 25.4, "li": 25_400 / 12, "in": 25_400.0, "ft": 304_800.0, "yd": 914_400.0}
_UM_BY_PREFIX = {"nano": 1e-3, "micro": 1.0, "milli": 1e3, "centi": 1e4, "": 1e6}
_UM_BY_WORD = {f"{prefix}{word}": um for prefix, um in _UM_BY_PREFIX.items() for word in ("meter", "metre")}
_UM_BY_WORD |= {"micron": 1.0, "inch": 25_400.0, "inche": 25_400.0, "angstrom": 1e-4}

_APERIO_MPP = re.compile(r"\|\s*MPP\s*=\s*([+-]?[\d.,]+(?:[eE][+-]?\d+)?)?([^|]*)")  # number and unit
_IMAGEJ_UNIT = re.compile(r"^(y?unit)=([^\r\n]*)", re.MULTILINE)

Pair = tuple[float | None, float | None]  # um/px along x and y; None if unknown


def spacing_of(texts: Texts, base: Any, warnings: list[str]) -> Pair:
    """Returns the spacing of level 0, and adds what is doubtful about it to `warnings`.

    The first source with a plausible value is used. The order is OpenSlide's for the sources that it knows; OME-XML comes
    before the tags, as its specification demands. `base` is the `tifffile.TiffPage` of level 0.
    """
    pairs = {
        "OME-XML": _ome(texts, base),
        "the Aperio header": _aperio(base),
        "the Philips XML": slide_spacing(texts.xml["DataObject"]) if "DataObject" in texts.xml else (None, None),
        "the Ventana XML": _ventana(texts, base),
        "the ImageJ header": _imagej(base),
        "the TIFF tags": _tags(texts, base),
        "the Leica XML": scanned_area(texts.xml["scn"]).mpp if "scn" in texts.xml else (None, None),
    }
    found = {name: mpp for name, pair in pairs.items() if (mpp := plausible_spacing(*pair))}
    warnings += texts.warnings
    if not found:
        return None, None
    (name, mpp), *others = found.items()
    if None in pairs[name]:
        warnings.append(f"{_text(mpp)} um/px by {name}, along one axis only: pixels are taken as square")
    for other, value in others:
        if any(abs(one - two) > _SAME * one for one, two in zip(mpp, value, strict=True)):
            warnings.append(f"{_text(mpp)} um/px by {name}, {_text(value)} by {other}: the first is used")
    return mpp


def _text(pair: tuple[float, float]) -> str:
    x, y = (f"{value:.4g}" for value in pair)
    return x if x == y else f"{x} x {y}"


def _tags(texts: Texts, base: Any) -> Pair:
    x, y = _resolution(base)
    if texts.software.startswith("MedScan"):  # Trestle's scanners write um/px there
        return x, y
    um = _um_of(_RESOLUTION_UNITS.get(base.tags.valueof(_RESOLUTION_UNIT, default=2)))
    return _divided(um, x), _divided(um, y)


def _imagej(base: Any) -> Pair:
    """Returns the spacing by ImageJ: its tags are pixels per unit of the description. Other programs write the same."""
    description = text_of(base, DESCRIPTION)
    if not description.startswith(("ImageJ=", "SCIFIO=")):
        return None, None
    fields = dict(_IMAGEJ_UNIT.findall(description))
    x, y = _resolution(base)
    unit = fields.get("unit")
    return _divided(_um_of(unit), x), _divided(_um_of(fields.get("yunit", unit)), y)


def _resolution(base: Any) -> Pair:
    """Returns the resolution tags as numbers: TIFF's rationals, or another type that a writer chose."""
    found: list[float | None] = []
    for code in (_X_RESOLUTION, _Y_RESOLUTION):
        value = base.tags.valueof(code)
        numbers = value if isinstance(value, tuple) else (value, 1)
        try:
            found.append(float(numbers[0]) / float(numbers[1]) or None)
        except (IndexError, TypeError, ValueError, ZeroDivisionError):
            found.append(None)
    return found[0], found[1]


def _divided(um: float | None, pixels: float | None) -> float | None:
    return um / pixels if um and pixels else None


def _aperio(base: Any) -> Pair:
    description = text_of(base, DESCRIPTION)
    fields = _APERIO_MPP.findall(description) if description.startswith("Aperio") else []
    mpp = _in_um(fields[-1][0], fields[-1][1].strip() or "um") if fields else None
    return mpp, mpp


def _ventana(texts: Texts, base: Any) -> Pair:
    scan = texts.xml.get("iScan")
    if scan is None and "iScan" in text_of(base, XMP):  # of level 0, if another picture comes first
        scan = texts_of(base).xml.get("iScan")
    mpp = None if scan is None else number_of(scan.get("ScanRes"))
    return mpp, mpp


def _ome(texts: Texts, base: Any) -> Pair:
    """Returns the spacing of the image that lists the directory of level 0, else of the first image of its size."""
    root = texts.xml.get("OME")
    if root is None:
        return None, None
    width, height = str(base.imagewidth), str(base.imagelength)
    pixels = [
        image
        for image in root.iterfind("{*}Image/{*}Pixels")
        if (image.get("SizeX", width), image.get("SizeY", height)) == (width, height)
    ]
    if not pixels:
        return None, None
    mine = next((image for image in pixels if _lists(image, base.index, root)), pixels[0])
    x, y = (_in_um(mine.get(f"PhysicalSize{axis}"), mine.get(f"PhysicalSize{axis}Unit", "um")) for axis in "XY")
    return x, y


def _lists(pixels: Element, directory: int, root: Element) -> bool:
    return any(directory_of(plane, root) == directory for plane in pixels.iterfind("{*}TiffData"))


def _in_um(size: str | None, unit: str) -> float | None:
    number, um = number_of(size), _um_of(unit)
    return number * um if number and um else None


def _um_of(unit: str | None) -> float | None:
    """Returns the micrometres in a unit of length; None for other units, such as pixel."""
    if unit is None:
        return None
    # Unicode has two micro signs, ImageJ escapes them, and of UTF-8 that was taken for Latin-1 the first byte is too many.
    text = re.sub(r"\\u00b5", "\u00b5", unit.strip(), flags=re.IGNORECASE).replace("\u00c2\u00b5", "\u00b5")
    plain = unicodedata.normalize("NFKC", text)
    return _UM.get(plain, _UM_BY_WORD.get(plain.lower().removesuffix("s")))
