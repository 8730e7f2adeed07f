"""Writers of small TIFFs that say their spacing in one of the ways that scanners and programs have for it.

Frames and words are those of `tests.slides.make`.
"""

import re
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tifffile

from tests.slides.make import Pixels, position_pixels
from tests.slides.oracle import area_average

EDGE_PX = 256

_DESCRIPTION, _XMP = 270, 700
_ASCII, _BYTE = 2, 1
_RESOLUTION = X_RESOLUTION, Y_RESOLUTION, RESOLUTION_UNIT = 282, 283, 296
_PRIVATE = 65_000
_GLASS_NM = (26_000_000, 76_000_000)


def write_described(
    path: Path,
    about: str | bytes = "",
    *,
    xmp: str = "",
    per_unit: tuple[float, float] | None = None,
    unit: int = 3,
    lacks: Sequence[int] = (),
    macro: str | None = None,
    software: str = "",
) -> Path:
    """Write a tiled slide of EDGE_PX x EDGE_PX.

    about      its description; bytes are written as they are
    xmp        of the first directory
    per_unit   pixels per unit along x and y, in XResolution and YResolution; without them there is no ResolutionUnit
    unit       ResolutionUnit: 1 none, 2 inch, 3 centimetre
    lacks      tags that are taken out again
    macro      description of a macro image of 8 um/px, in strips, that is written before the slide
    """
    common: dict[str, Any] = {
        "photometric": "rgb",
        "compression": "zlib",
        "metadata": None,
        "software": software or False,
    }
    packet = [(_XMP, _BYTE, len(xmp.encode()), xmp.encode(), True)] if xmp else []
    resolution: dict[str, Any] = {"resolution": per_unit, "resolutionunit": unit} if per_unit else {}
    with tifffile.TiffWriter(path) as writer:
        if macro is not None:
            coarse: dict[str, Any] = {"resolution": (1250, 1250), "resolutionunit": 3}
            tags = [*_described(macro.encode()), *packet]
            writer.write(position_pixels(200, 100), rowsperstrip=16, extratags=tags, **common, **coarse)
        tags = _described(about.encode() if isinstance(about, str) else about) + ([] if macro is not None else packet)
        writer.write(position_pixels(EDGE_PX, EDGE_PX), tile=(128, 128), extratags=tags, **common, **resolution)
    take_out(path, lacks if per_unit else _RESOLUTION)  # which tifffile writes, asked or not
    return path


def take_out(path: Path, tags: Sequence[int]) -> None:
    """Take tags out of the last directory of a little-endian file: they get a number that nobody knows."""
    with tifffile.TiffFile(path) as tiff:
        found = tiff.pages[-1].aspage().tags
        offsets = [found[code].offset for code in tags if code in found]
    with path.open("r+b") as file:
        for offset in offsets:
            file.seek(offset)
            file.write(struct.pack("<H", _PRIVATE))


def _described(text: bytes) -> list[tuple[Any, ...]]:
    return [(_DESCRIPTION, _ASCII, len(text) + 1, text + b"\0", True)] if text else []


def ome_xml(*images: str, version: str = "2016-06", prefix: str = "", uuid: str = "urn:a") -> str:
    """OME-XML of images from `ome_image`, or of other elements."""
    space = f'xmlns{":" * bool(prefix)}{prefix}="http://www.openmicroscopy.org/Schemas/OME/{version}"'
    elements = f'<OME {space} UUID="{uuid}">{"".join(images)}</OME>'
    if prefix:
        elements = re.sub(r"<(/?)", rf"<\1{prefix}:", elements)
    return f'<?xml version="1.0" encoding="UTF-8"?>{elements}'


def ome_image(attributes: str, planes: str = "", *, edge_px: int = EDGE_PX) -> str:
    """An Image element; `attributes` are those of its Pixels beside the size, `planes` its TiffData elements."""
    size = f'SizeX="{edge_px}" SizeY="{edge_px}" SizeC="3" SizeZ="1" SizeT="1"'
    return f'<Image ID="i"><Pixels ID="p" DimensionOrder="XYCZT" Type="uint8" {size} {attributes}>{planes}</Pixels></Image>'


def physical_size(x: float, y: float, unit: str = "") -> str:
    """Attributes of a Pixels element; without a unit it is micrometres."""
    sizes = f'PhysicalSizeX="{x!r}" PhysicalSizeY="{y!r}"'
    return f'{sizes} PhysicalSizeXUnit="{unit}" PhysicalSizeYUnit="{unit}"' if unit else sizes


def philips_xml(*images: tuple[str, float], manufacturer: bool = True, at_root: float | None = None) -> str:
    """Philips XML of pictures, each a type (WSI, MACROIMAGE, LABELIMAGE) and its um/px; each has one level."""

    def spacing(mpp: float) -> str:
        return f'<Attribute Name="DICOM_PIXEL_SPACING">"{mpp / 1000:.7f}" "{mpp / 1000:.7f}"</Attribute>'

    listed = ""
    for kind, mpp in images:
        level = f'<DataObject ObjectType="PixelDataRepresentation">{spacing(mpp)}</DataObject>'
        listed += (
            f'<DataObject ObjectType="DPScannedImage"><Attribute Name="PIM_DP_IMAGE_TYPE">{kind}</Attribute>{spacing(mpp)}'
            f'<Attribute Name="PIIM_PIXEL_DATA_REPRESENTATION_SEQUENCE"><Array>{level}</Array></Attribute></DataObject>'
        )
    return (
        '<?xml version="1.0" encoding="UTF-8" ?><DataObject ObjectType="DPUfsImport">'
        + ('<Attribute Name="DICOM_MANUFACTURER">PHILIPS</Attribute>' if manufacturer else "")
        + (spacing(at_root) if at_root else "")
        + f'<Attribute Name="PIM_DP_SCANNED_IMAGES"><Array>{listed}</Array></Attribute></DataObject>'
    )


@dataclass(frozen=True)
class ScnImage:
    """A picture in a Leica SCN."""

    pixels: Pixels  # [h, w, 3]
    mpp: float | None = 0.25  # None: it shows the whole glass, as the macro image does
    at_nm: tuple[int, int] = (3_000_000, 9_000_000)
    focal_planes: int = 1


def write_scn(
    path: Path,
    images: Sequence[ScnImage],
    *,
    version: str = "2010/10/01",
    tagged_mpp: float | None = None,
    without: Sequence[str] = (),
) -> Path:
    """A Leica SCN, each image with levels 1 and 1/4; directories in this order, the XML in the first.

    tagged_mpp   spacing of the finest levels by TIFF's own tags, um/px
    without      elements that the XML lacks
    """
    listed, pages = "", list[tuple[Pixels, int]]()
    for number, image in enumerate(images):
        height, width = image.pixels.shape[:2]
        size_nm = (
            _GLASS_NM if image.mpp is None else (round(width * image.mpp * 1000), round(height * image.mpp * 1000))
        )
        left, top = (0, 0) if image.mpp is None else image.at_nm
        levels = ""
        for plane in range(image.focal_planes):
            for rank, downsample in enumerate((1, 4)):
                z = f' z="{plane}"' if image.focal_planes > 1 else ""
                size = f'sizeX="{width // downsample}" sizeY="{height // downsample}"'
                levels += f'<dimension {size} r="{rank}"{z} ifd="{len(pages)}"/>'
                shown = image.pixels if plane == 0 else np.bitwise_not(image.pixels)
                pages.append((area_average(shown, downsample), downsample))
        parts = {
            "creationDate": "<creationDate>2020-01-01T00:00:00Z</creationDate>",
            "device": '<device model="Leica SCN400" version="1.0"/>',
            "pixels": f'<pixels sizeX="{width}" sizeY="{height}">{levels}</pixels>',
            "view": f'<view sizeX="{size_nm[0]}" sizeY="{size_nm[1]}" offsetX="{left}" offsetY="{top}" spacingZ="0"/>',
            "objective": "<objectiveSettings><objective>20</objective></objectiveSettings>",
            "aperture": "<numericalAperture>0.4</numericalAperture>",
            "source": "<illuminationSource>brightfield</illuminationSource>",
        } | dict.fromkeys(without, "")
        listed += (
            f'<image name="image_{number}" uuid="u">{parts["creationDate"]}{parts["device"]}{parts["pixels"]}{parts["view"]}'
            f"<scanSettings>{parts['objective']}<illuminationSettings>{parts['aperture']}{parts['source']}"
            "</illuminationSettings></scanSettings></image>"
        )
    text = (
        f'<?xml version="1.0"?><scn xmlns="http://www.leica-microsystems.com/scn/{version}" uuid="u">'
        f'<collection name="c" sizeX="{_GLASS_NM[0]}" sizeY="{_GLASS_NM[1]}"><barcode>YQ==</barcode>{listed}</collection></scn>'
    ).encode()
    with tifffile.TiffWriter(path, bigtiff=True) as writer:
        for number, (pixels, downsample) in enumerate(pages):
            tags = _described(text) if number == 0 else []
            resolution: dict[str, Any] = {}
            if tagged_mpp and downsample == 1:
                resolution = {"resolution": (10_000 / tagged_mpp,) * 2, "resolutionunit": 3}
            writer.write(
                pixels,
                tile=(128, 128),
                photometric="rgb",
                compression="zlib",
                metadata=None,
                software=False,
                extratags=tags,
                **resolution,
            )
    return path
