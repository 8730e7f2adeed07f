"""The spacing of a slide: every way to write it, held against the right value, and OpenSlide's where it has one."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import openslide
import pytest
import tifffile

from tests.slides.make import position_pixels
from tests.slides.ndpi import MACRO, NdpiImage, write_ndpi
from tests.slides.spacings import (
    EDGE_PX,
    RESOLUTION_UNIT,
    X_RESOLUTION,
    Y_RESOLUTION,
    ScnImage,
    ome_image,
    ome_xml,
    philips_xml,
    physical_size,
    write_described,
    write_scn,
)
from udfs.wsi import open_slide

Write = Callable[[Path], Path]
Pair = tuple[float | None, float | None]

UNKNOWN: Pair = (None, None)
CM, INCH = (40_000.0, 40_000.0), (101_600.0, 101_600.0)  # pixels per unit at 0.25 um/px
DPI_72: dict[str, Any] = {"per_unit": (72.0, 72.0), "unit": 2}
MACRO_XML = ("MACROIMAGE", 15.0)
SLIDE_IMAGE = position_pixels(EDGE_PX, EDGE_PX)
MACRO_IMAGE = ScnImage(position_pixels(128, 384), None)


def described(about: str | bytes = "", **how: Any) -> Write:
    return lambda path: write_described(path, about, **how)


def aperio(fields: str | bytes, **how: Any) -> Write:
    text = fields.encode() if isinstance(fields, str) else fields
    head = f"Aperio Image Library v12.0.15\r\n{EDGE_PX}x{EDGE_PX} (128x128) JPEG/RGB Q=70".encode()
    return described(head + b"|AppMag = 40|" + text, **how)


def ome(*images: str, xml: dict[str, Any] | None = None, **how: Any) -> Write:
    return described(ome_xml(*images, **(xml or {})), **how)


def ome_in(size: float, unit: str) -> Write:
    return ome(ome_image(physical_size(size, size, unit)))


def imagej(word: str, um: float = 1.0, **how: Any) -> Write:
    return described(f"ImageJ=1.54f\nunit={word}\nloop=false\n", **({"per_unit": (4 * um, 4 * um), "unit": 1} | how))


def ventana(xmp: str, **how: Any) -> Write:
    return described("level=0 mag=40 quality=95", xmp=xmp, software="ScanOutputManager 1.1.0.15854", **how)


def ventana_behind_a_label(path: Path) -> Path:
    xmp = b'<?xml version="1.0"?><EncodeInfo><SlideInfo><iScan ScanRes="0.25"/></SlideInfo></EncodeInfo>'
    common: dict[str, Any] = {"photometric": "rgb", "compression": "zlib", "metadata": None}
    with tifffile.TiffWriter(path) as writer:
        writer.write(position_pixels(64, 64), rowsperstrip=16, description="Label Image", **common)
        writer.write(SLIDE_IMAGE, tile=(128, 128), extratags=[(700, 1, len(xmp), xmp, True)], **common)
    return path


def philips(xml: str, **how: Any) -> Write:
    return described(xml, software="Philips DP v1.0", **how)


def scn(*images: ScnImage, **how: Any) -> Write:
    return lambda path: write_scn(path, images or (MACRO_IMAGE, ScnImage(SLIDE_IMAGE)), **how)


def ndpi(path: Path) -> Path:
    macro = NdpiImage(position_pixels(128, 64), MACRO)
    return write_ndpi(path, [NdpiImage(SLIDE_IMAGE, 20.0), macro], mpp=0.25)


IMAGE = ome_image(physical_size(0.25, 0.25))
PIXEL_WIDE = ome_image(physical_size(1.0, 1.0, "pixel"))
LATER = ome_image(physical_size(1.0, 1.0), '<TiffData IFD="7" PlaneCount="1"/>')
ELSEWHERE = ome_image(physical_size(1.0, 1.0), '<TiffData><UUID FileName="b.ome.tif">urn:b</UUID></TiffData>')
HERE = ome_image(physical_size(0.25, 0.25), '<TiffData IFD="0"><UUID FileName="a.ome.tif">urn:a</UUID></TiffData>')
MIXED = 'PhysicalSizeX="250" PhysicalSizeXUnit="nm" PhysicalSizeY="0.00025" PhysicalSizeYUnit="mm"'

QUARTER: dict[str, Write] = {
    "aperio": aperio("MPP = 0.2500"),
    "aperio, decimal comma": aperio("MPP = 0,2500"),
    "aperio, with its unit": aperio("MPP = 0.25 um", **DPI_72),
    "aperio, with its unit and a comma": aperio("MPP = 0,25 \u00b5m|Title = a", per_unit=(20_000.0, 20_000.0)),
    "aperio, in nanometres": aperio("MPP=250nm"),
    "aperio, with an exponent": aperio("MPP = 2.5e-1"),
    "aperio, no blanks": aperio("MPP=0.25"),
    "aperio, a field without a value": aperio("Title|Empty = |User =|MPP = 0.25"),
    "aperio, fields on lines of their own": aperio("Left = 1\n|MPP = 0.25\n|Title = a"),
    "aperio, latin-1": aperio(b"User = M\xfcller|MPP = 0.25"),
    "aperio, bytes of no encoding": aperio(b"User = \x81\x8d|MPP = 0.25"),
    "aperio, spacing in the tags alone": aperio("Title = a", per_unit=CM),
    "aperio, MPP of nothing": aperio("MPP = 0", per_unit=CM),
    "aperio, after a macro of another spacing": aperio(
        "MPP = 0.25", macro="Aperio Image Library v12.0.15\r\nmacro 200x100|MPP = 8"
    ),
    "centimetres": described(per_unit=CM),
    "inches": described(per_unit=INCH, unit=2),
    "no ResolutionUnit is inches": described(per_unit=INCH, lacks=[RESOLUTION_UNIT]),
    "millimetres": described(per_unit=(4000.0, 4000.0), unit=4),
    "micrometres": described(per_unit=(4.0, 4.0), unit=5),
    "x only": described(per_unit=CM, lacks=[Y_RESOLUTION]),
    "y only": described(per_unit=CM, lacks=[X_RESOLUTION]),
    "after a macro of another spacing": described(per_unit=CM, macro=""),
    "hamamatsu": ndpi,
    "trestle has um/px in the resolution": described("OverlapsXY=0 0", software="MedScan", per_unit=(0.25, 0.25)),
    "ventana": ventana(
        '<?xml version="1.0"?><iScan Magnification="40" ScanRes="0.25" UnitNumber="1"/>', macro="Label Image"
    ),
    "ventana, in Metadata": ventana('<Metadata><iScan ScanRes="0.25"><AOI0/></iScan></Metadata>', **DPI_72),
    "ventana, decimal comma": ventana('<iScan ScanRes="0,25"/>  '),
    "ventana, of level 0 behind a label": ventana_behind_a_label,
    "philips": philips(philips_xml(("WSI", 0.25))),
    "philips, macro first": philips(philips_xml(MACRO_XML, ("LABELIMAGE", 9.0), ("WSI", 0.25), manufacturer=False)),
    "philips, of the root": philips(philips_xml(MACRO_XML, at_root=0.25)),
    "scn": scn(),
    "scn, older": scn(version="2010/03/10"),
    "scn without macro": scn(ScnImage(SLIDE_IMAGE)),
    "scn without what the spacing does not need": scn(without=["aperture", "objective", "device", "creationDate"]),
    "scn, tags": scn(tagged_mpp=0.25),
    "scn without macro and view, tags": scn(ScnImage(SLIDE_IMAGE), tagged_mpp=0.25, without=["view"]),
    "scn, macro in the middle": scn(ScnImage(SLIDE_IMAGE), MACRO_IMAGE),
    "ome": ome(IMAGE),
    "ome 2008": ome(IMAGE, xml={"version": "2008-02"}),
    "ome 2013, prefixed": ome(IMAGE, xml={"version": "2013-06", "prefix": "OME"}),
    "ome over the dpi of a screen": ome(IMAGE, **DPI_72),
    "ome over tags": ome(IMAGE, per_unit=(20_000.0, 20_000.0)),
    "ome, an axis each": ome(ome_image(MIXED)),
    "ome, x only": ome(ome_image('PhysicalSizeX="0.25"')),
    "ome, the image of level 0": ome(ome_image(physical_size(8.0, 8.0), edge_px=64), IMAGE),
    "ome, the image of level 0's directory": ome(LATER, HERE),
    "ome, the image of this file": ome(ELSEWHERE, HERE),
    "ome, binary only": ome('<BinaryOnly MetadataFile="a.companion.ome" UUID="urn:b"/>', per_unit=CM),
    "ome, pixels as unit": ome(PIXEL_WIDE, per_unit=CM),
    "ome, reference frame": ome(PIXEL_WIDE.replace("pixel", "reference frame"), per_unit=CM),
    "ome of another picture": ome(ome_image(physical_size(8.0, 8.0), edge_px=64), per_unit=CM),
    "ome that is cut short": described(ome_xml(IMAGE)[:-9], per_unit=CM),
    "ome, latin-1": described(ome_xml(ome_image(physical_size(0.25, 0.25, "\u00b5m"))).encode("latin-1")),
    "ome, utf-8 taken for latin-1": ome_in(0.25, "\u00c2\u00b5m"),
    "imagej over the dpi of a screen": imagej("um", per_unit=(4.0, 4.0), unit=2),
    "imagej, y of its own": described("ImageJ=1.54f\nunit=um\nyunit=nm\n", per_unit=(4.0, 0.004), unit=1),
    "imagej without a unit": described("ImageJ=1.54f\nimages=1\n", per_unit=CM),
    "imagej of pixels": imagej("pixel", per_unit=CM, unit=3),
    "imagej of many lines": described("ImageJ=1.54f\n" + "a\n" * 300_000 + "unit=um\n", per_unit=(4.0, 4.0), unit=1),
    "imagej of lines that end in CR and LF": imagej("um\r"),
    "scifio": described("SCIFIO=0.42\nunit=micron\n", per_unit=(4.0, 4.0), unit=1),
}
UM = {"\u00b5m": 1.0, "\u03bcm": 1.0, "um": 1.0, "nm": 1e-3, "pm": 1e-6, "\u00c5": 1e-4, "\u212b": 1e-4, "mm": 1e3}
UM |= {"cm": 1e4, "dm": 1e5, "m": 1e6, "km": 1e9, "in": 25_400.0, "pt": 25_400 / 72, "thou": 25.4, "li": 25_400 / 12}
UM |= {"fm": 1e-9, "am": 1e-12, "dam": 1e7, "hm": 1e8, "ft": 304_800.0, "yd": 914_400.0}
QUARTER |= {f"ome in {unit}": ome_in(0.25 / um, unit) for unit, um in UM.items()}
WORDS = {
    "um": 1.0,
    "micron": 1.0,
    "microns": 1.0,
    "\\u00B5m": 1.0,
    "\u00b5m": 1.0,
    "\u03bcm": 1.0,
    "nm": 1e-3,
    "mm": 1e3,
}
WORDS |= {"cm": 1e4, "inch": 25_400.0, "inches": 25_400.0, "micrometer": 1.0, "m": 1e6}
QUARTER |= {f"imagej in {unit}": imagej(unit, um) for unit, um in WORDS.items()}

OTHERS: dict[str, tuple[Write, Pair]] = {
    "nothing": (described(), UNKNOWN),
    "no unit": (described(per_unit=CM, unit=1), UNKNOWN),
    "zero": (described(per_unit=(0.0, 0.0)), UNKNOWN),
    "the dpi of a screen": (described(**DPI_72), UNKNOWN),
    "not square": (described(per_unit=(40_000.0, 20_000.0)), (0.25, 0.5)),
    "one axis that cannot be true": (described(per_unit=(40_000.0, 28.0)), UNKNOWN),
    "a macro that alone says it": (described(macro=""), UNKNOWN),
    "aperio, MPP of the macro": (aperio("MPP = nan"), UNKNOWN),
    "ome, not square": (ome(ome_image(physical_size(0.25, 0.5))), (0.25, 0.5)),
    "ome in an unknown unit": (ome_in(0.25, "furlong"), UNKNOWN),
    "imagej in pixels": (imagej("pixel"), UNKNOWN),
    "ventana without ScanRes": (ventana("<iScan/>  "), UNKNOWN),
    "ventana, damaged": (ventana('<iScan ScanRes="0.25"'), UNKNOWN),
    "scn without a view": (scn(ScnImage(SLIDE_IMAGE), without=["view"]), UNKNOWN),
}
CASES = OTHERS | {name: (write, (0.25, 0.25)) for name, write in QUARTER.items()}
NOT_AS_OPENSLIDE = {  # which knows nothing of OME and ImageJ, takes any number, and crashes if an SCN lacks the objective
    *("scn without what the spacing does not need", "aperio, MPP of nothing"),
    *("aperio, with its unit", "aperio, with its unit and a comma", "aperio, in nanometres"),
    *("ome over tags", "imagej over the dpi of a screen"),
    *("the dpi of a screen", "ome over the dpi of a screen", "one axis that cannot be true"),
}


def spacing_of(path: Path) -> Pair:
    with open_slide(str(path)) as slide:
        return slide.mpp_x, slide.mpp_y


def openslides(path: Path) -> Pair:
    try:
        with openslide.OpenSlide(str(path)) as slide:
            x, y = (slide.properties.get(f"openslide.mpp-{axis}") for axis in "xy")
    except openslide.OpenSlideError:
        return UNKNOWN
    return (float(x), float(y)) if x and y else UNKNOWN


@pytest.mark.parametrize("name", CASES)
def test_the_spacing_is_the_slides(tmp_path: Path, name: str) -> None:
    write, right = CASES[name]
    path = write(tmp_path / "slide.tif")
    assert spacing_of(path) == (right if None in right else pytest.approx(right, rel=1e-6))
    theirs = UNKNOWN if name in NOT_AS_OPENSLIDE else openslides(path)
    if None not in theirs:
        assert spacing_of(path) == pytest.approx(theirs, rel=1e-6)


def test_openslide_has_a_value_for_every_vendor_that_it_knows(tmp_path: Path) -> None:
    """So that the comparison above compares."""
    for name in (
        "aperio",
        "centimetres",
        "hamamatsu",
        "trestle has um/px in the resolution",
        "ventana",
        "philips",
        "scn, tags",
    ):
        found = openslides(QUARTER[name](tmp_path / f"{name.replace('/', ' ')}.tif"))
        assert found == pytest.approx((0.25, 0.25), rel=1e-6), name


@pytest.mark.parametrize(
    ("name", "vendor"),
    [
        *(
            ("aperio", "aperio"),
            ("aperio, bytes of no encoding", "aperio"),
            ("hamamatsu", "hamamatsu"),
            ("philips", "philips"),
            ("scn", "leica"),
        ),
        *(
            ("ventana", "ventana"),
            ("ventana, damaged", "ventana"),
            ("trestle has um/px in the resolution", "trestle"),
            ("ome", "unknown"),
            ("centimetres", "unknown"),
        ),
    ],
)
def test_the_vendor_is_known(tmp_path: Path, name: str, vendor: str) -> None:
    with open_slide(str(CASES[name][0](tmp_path / "slide.tif"))) as slide:
        assert slide.vendor == vendor


@pytest.mark.parametrize(
    ("write", "warning"),
    [
        (QUARTER["ome over tags"], "0.25 um/px by OME-XML, 0.5 by the TIFF tags: the first is used"),
        (
            aperio("MPP = 0.25", per_unit=(40_000.0, 20_000.0)),
            "0.25 um/px by the Aperio header, 0.25 x 0.5 by the TIFF tags",
        ),
        (scn(tagged_mpp=0.5), "0.5 um/px by the TIFF tags, 0.25 by the Leica XML: the first is used"),
        (QUARTER["x only"], "0.25 um/px by the TIFF tags, along one axis only: pixels are taken as square"),
        (QUARTER["ome that is cut short"], "its OME-XML cannot be parsed (unclosed token"),
        (OTHERS["ventana, damaged"][0], "its Ventana XML cannot be parsed"),
    ],
)
def test_a_doubtful_spacing_has_a_warning(tmp_path: Path, write: Write, warning: str) -> None:
    with open_slide(str(write(tmp_path / "slide.tif"))) as slide:
        [said] = slide.warnings
    assert said.startswith(warning)


@pytest.mark.parametrize(
    "write",
    [aperio("MPP = 0.2510", per_unit=CM), ome(IMAGE, **DPI_72), ome(IMAGE, per_unit=CM), scn(tagged_mpp=0.25)],
)
def test_spacings_that_agree_have_none(tmp_path: Path, write: Write) -> None:
    with open_slide(str(write(tmp_path / "slide.tif"))) as slide:
        assert slide.warnings == ()
