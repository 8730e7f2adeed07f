"""Writers of TIFFs as vendors' scanners make them: directories that are no levels, blocks by codecs of their own.

Frames and words are those of `tests.slides.make`; levels are area averages of level 0.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import imagecodecs
import numpy as np
import tifffile

from tests.slides.make import Pixels
from tests.slides.oracle import area_average

JPEG, APERIO_YCBCR, APERIO_RGB, JPEG2000 = 7, 33003, 33005, 34712
Encode = Callable[[Pixels], bytes]

_TABLES = (0xC4, 0xDB)  # Huffman and quantisation
_START_OF_SCAN = 0xDA


@dataclass(frozen=True)
class Codec:
    """How blocks are stored."""

    encode: Encode  # of uint8 [h, w, samples]
    compression: int
    photometric: str = "rgb"
    subsampling: tuple[int, int] | None = None
    tables: bytes = b""


def jpeg_codec(
    *, photometric: str = "ycbcr", subsampling: tuple[int, int] = (1, 1), quality: int = 90, shares_tables: bool = False
) -> Codec:
    """JPEG as TIFF wants it: streams that do not say what colours they hold (no JFIF, no Adobe marker).

    photometric     "ycbcr", "rgb" (as Aperio stores it) or "minisblack"
    subsampling     of chroma, horizontally and vertically
    shares_tables   streams are abbreviated, their tables stand in the directory
    """
    colours = "grayscale" if photometric == "minisblack" else "rgb"
    stored = {"ycbcr": "ycbcr", "rgb": "rgb", "minisblack": "grayscale"}[photometric]

    def whole(block: Pixels) -> bytes:
        pixels = block[..., 0] if colours == "grayscale" else block
        return bytes(
            imagecodecs.jpeg8_encode(
                np.ascontiguousarray(pixels),
                level=quality,
                colorspace=colours,
                outcolorspace=stored,
                subsampling=subsampling if stored == "ycbcr" else None,
            )
        )

    tables = b""
    if shares_tables:  # libjpeg's are the same for every stream of one quality
        blank = np.zeros((16, 16, 1 if colours == "grayscale" else 3), np.uint8)
        tables = _parts(whole(blank))[0]

    def encode(block: Pixels) -> bytes:
        in_tables, rest = _parts(whole(block))
        assert not tables or in_tables == tables
        return rest if tables else in_tables[:-2] + rest[2:]

    factors = subsampling if photometric == "ycbcr" else None
    return Codec(encode, JPEG, photometric, factors, tables)


def jpeg2000_codec(
    compression: int,
    photometric: str = "rgb",
    *,
    stored: str | None = None,
    mct: bool | None = None,
    file_format: str = "j2k",
    colourspace: str | None = None,
) -> Codec:
    """JPEG 2000 without loss.

    photometric     what the directory says
    stored          "rgb" or "ycbcr": what the blocks hold; None for what the directory says
    mct             with the codestream's own colour transform, which decoders undo; None for RGB alone
    file_format     "j2k" for bare codestreams, "jp2" for a file around each, which names its `colourspace`
    """
    stored = stored or photometric

    def encode(block: Pixels) -> bytes:
        return bytes(
            imagecodecs.jpeg2k_encode(
                ycbcr(block) if stored == "ycbcr" else block,
                level=0,
                reversible=True,
                codecformat=file_format,
                colorspace=colourspace,
                mct=stored == "rgb" if mct is None else mct,
            )
        )

    return Codec(encode, compression, photometric, (1, 1) if photometric == "ycbcr" else None)


def ycbcr(pixels: Pixels) -> Pixels:
    """RGB to full-range Y, Cb, Cr, uint8: ITU-T T.871, 7."""
    matrix = np.array([[0.299, 0.587, 0.114], [-0.168736, -0.331264, 0.5], [0.5, -0.418688, -0.081312]])
    converted: Pixels = np.clip(np.rint(pixels @ matrix.T + [0, 128, 128]), 0, 255).astype(np.uint8)
    return converted


def write_encoded(
    target: Path | tifffile.TiffWriter,
    pixels: Pixels,
    codec: Codec,
    *,
    block: tuple[int, int] = (256, 256),
    size: tuple[int, int] | None = None,
    strips: bool = False,
    **tags: Any,
) -> None:
    """Write one directory.

    pixels    [h, w, samples]; what blocks need beyond the border is the border again
    block     width and height of a tile; of strips only the height counts, and the last is as high as what is left
    size      width and height that the directory tells, where they are not those of `pixels`
    tags      for `tifffile.TiffWriter.write`
    """
    if isinstance(target, Path):
        with tifffile.TiffWriter(target) as writer:
            return write_encoded(writer, pixels, codec, block=block, size=size, strips=strips, **tags)
    width, height = size or (pixels.shape[1], pixels.shape[0])
    edge = (width if strips else block[0], block[1])
    # to tifffile `photometric` is what comes in; of JPEG it would store YCbCr whatever it is
    stored = {"outcolorspace": tifffile.PHOTOMETRIC[codec.photometric.upper()]} if codec.compression == JPEG else None
    target.write(
        map(codec.encode, _cut(pixels, edge, width, height, pads=not strips)),
        shape=(height, width, pixels.shape[2]) if pixels.shape[2] > 1 else (height, width),
        dtype="uint8",
        compression=codec.compression,
        compressionargs=stored,
        photometric=codec.photometric,
        subsampling=codec.subsampling,
        jpegtables=codec.tables or None,
        metadata=None,
        software=tags.pop("software", False),
        **({"rowsperstrip": block[1]} if strips else {"tile": (block[1], block[0])}),
        **tags,
    )
    return None


def write_aperio(
    path: Path,
    pixels: Pixels,
    codec: Codec,
    *,
    levels: Sequence[int] = (4, 16),
    macro: Pixels | None = None,
    is_macro_tiled: bool = False,
    block: tuple[int, int] = (240, 240),
) -> Path:
    """An SVS: level 0, a thumbnail in strips, the levels, label and macro; the macro is `macro`, else a stretched slide."""
    height, width = pixels.shape[:2]
    title = "Aperio Image Library v12.0.15"
    about = f"{title}\r\n{width}x{height} [0,0 {width}x{height}] ({block[0]}x{block[1]}) |AppMag = 20|MPP = 0.5000"
    thumbnail = area_average(pixels, 8)
    macro = area_average(pixels, 4)[:, ::2] if macro is None else macro
    picture = jpeg_codec(photometric="ycbcr")
    with tifffile.TiffWriter(path) as writer:
        write_encoded(writer, pixels, codec, block=block, description=about)
        write_encoded(writer, thumbnail, picture, block=(16, 16), strips=True, description=f"{about} -> thumbnail")
        for downsample in levels:
            write_encoded(writer, area_average(pixels, downsample), codec, block=block, description=about)
        label = np.ascontiguousarray(np.rot90(thumbnail))
        stored: dict[str, Any] = {"metadata": None, "software": False, "photometric": "rgb", "compression": "lzw"}
        text = f"{title}\r\nlabel {label.shape[1]}x{label.shape[0]}"
        writer.write(label, rowsperstrip=8, subfiletype=1, description=text, **stored)
        text = f"{title}\r\nmacro {macro.shape[1]}x{macro.shape[0]}"
        write_encoded(
            writer, macro, picture, block=(64, 64), strips=not is_macro_tiled, subfiletype=9, description=text
        )
    return path


def write_philips(
    path: Path, pixels: Pixels, codec: Codec, *, doublings: int = 3, edge: int = 512, lists_macro: bool = False
) -> Path:
    """A Philips TIFF: each level padded to whole tiles, which its directory does not tell; the XML tells the spacing.

    With `lists_macro` the XML has the macro image first, with a spacing of its own.
    """
    columns, rows = -(-pixels.shape[1] // edge), -(-pixels.shape[0] // edge)
    padded = np.full((rows * edge, columns * edge, 3), 255, np.uint8)
    padded[: pixels.shape[0], : pixels.shape[1]] = pixels
    spacings = "".join(
        '<DataObject ObjectType="PixelDataRepresentation">'
        f'<Attribute Name="DICOM_PIXEL_SPACING">"{0.00025 * 2**level}" "{0.00025 * 2**level}"</Attribute></DataObject>'
        for level in range(doublings + 1)
    )
    others = ""
    if lists_macro:
        others = (
            '<DataObject ObjectType="DPScannedImage"><Attribute Name="PIM_DP_IMAGE_TYPE">MACROIMAGE</Attribute>'
            '<Attribute Name="PIIM_PIXEL_DATA_REPRESENTATION_SEQUENCE"><Array><DataObject ObjectType="PixelDataRepresentation">'
            '<Attribute Name="DICOM_PIXEL_SPACING">"0.015" "0.015"</Attribute></DataObject></Array></Attribute></DataObject>'
        )
    about = (
        '<?xml version="1.0" encoding="UTF-8" ?><DataObject ObjectType="DPUfsImport">'
        '<Attribute Name="DICOM_MANUFACTURER">PHILIPS</Attribute>'
        '<Attribute Name="DICOM_PIXEL_SPACING">"0.00025" "0.00025"</Attribute>'
        f'<Attribute Name="PIM_DP_SCANNED_IMAGES"><Array>{others}<DataObject ObjectType="DPScannedImage">'
        '<Attribute Name="PIM_DP_IMAGE_TYPE">WSI</Attribute><Attribute Name="PIIM_PIXEL_DATA_REPRESENTATION_SEQUENCE">'
        f"<Array>{spacings}</Array></Attribute></DataObject></Array></Attribute></DataObject>"
    )
    with tifffile.TiffWriter(path) as writer:
        for level in range(doublings + 1):
            small = area_average(padded, 2**level)
            size = tuple(-(-small.shape[axis] // edge) * edge for axis in (1, 0))
            tags = {"description": about, "software": "Philips DP v1.0"} if level == 0 else {"subfiletype": 1}
            write_encoded(writer, small, codec, block=(edge, edge), size=(size[0], size[1]), **tags)
        macro = area_average(pixels, 4)
        write_encoded(writer, macro, codec, block=(64, 64), strips=True, description="Macro -offset=(0,0)")
    return path


def write_bif(path: Path, pixels: Pixels, codec: Codec, *, overlap_px: int = 0) -> Path:
    """A Ventana BIF: label first, then level 0 with the joints of its tiles in XMP, then a level."""
    joint = (
        f'<TileJointInfo FlagJoined="1" Direction="RIGHT" Tile1="1" Tile2="2" OverlapX="{overlap_px}" OverlapY="0"/>'
    )
    xmp = (
        '<?xml version="1.0"?><EncodeInfo Ver="2"><SlideStitchInfo><ImageInfo AOIScanned="1" AOIIndex="0">'
        f"{joint}</ImageInfo></SlideStitchInfo></EncodeInfo>"
    ).encode()
    with tifffile.TiffWriter(path) as writer:
        label = np.ascontiguousarray(np.rot90(area_average(pixels, 8)))
        scanner: dict[str, Any] = {
            "software": "ScanOutputManager 1.1.0.15854",
            "extratags": [(700, 1, 10, b"<iScan/>  ", True)],
        }
        write_encoded(writer, label, codec, block=(64, 64), strips=True, description="Label Image", **scanner)
        for level, downsample in enumerate((1, 2)):
            about = f"level={level} mag={40 / downsample:g} quality=95"
            tags = scanner | {"extratags": [(700, 1, len(xmp), xmp, True)]}
            write_encoded(writer, area_average(pixels, downsample), codec, description=about, **tags)
    return path


def write_trestle(path: Path, pixels: Pixels, *, overlaps: str | None) -> Path:
    """A slide of Trestle's MedScan: two levels, whose description tells by how many pixels the tiles of each overlap."""
    about = "Background Color=E6E6E6;White Balance=1.00;Objective Power=40;JPEG Quality=90"
    about += "" if overlaps is None else f";OverlapsXY={overlaps}"
    with tifffile.TiffWriter(path) as writer:
        for downsample in (1, 2):
            writer.write(
                area_average(pixels, downsample),
                tile=(256, 256),
                photometric="rgb",
                compression="zlib",
                metadata=None,
                software="MedScan",
                description=about,
                subfiletype=int(downsample > 1),
            )
    return path


def write_ome(
    path: Path,
    series: Sequence[Pixels],
    *,
    levels: Sequence[int] = (2, 4),
    axes: str = "YXS",
    names: Sequence[str | None] = (),
) -> Path:
    """An OME-TIFF of series, [..., h, w, 3] or, without an S in `axes`, [..., h, w]; each plane a pyramid of SubIFDs."""
    is_rgb = axes.endswith("S")
    with tifffile.TiffWriter(path, ome=True) as writer:
        for number, pixels in enumerate(series):
            kind: dict[str, Any] = {
                "photometric": "rgb" if is_rgb else "minisblack",
                "compression": "zlib",
                "tile": (128, 128),
            }
            name = names[number] if number < len(names) else None
            about = {"axes": axes} | ({"Name": name} if name else {})
            writer.write(pixels, subifds=len(levels), metadata=about, **kind)
            planes = pixels.reshape(-1, *pixels.shape[-3 if is_rgb else -2 :])
            for downsample in levels:
                small = [area_average(plane if is_rgb else plane[..., None], downsample) for plane in planes]
                shape = (*pixels.shape[: -3 if is_rgb else -2], *small[0].shape[: 3 if is_rgb else 2])
                writer.write(np.stack(small).reshape(shape), subfiletype=1, **kind)
    return path


def _cut(pixels: Pixels, edge: tuple[int, int], width: int, height: int, *, pads: bool) -> Iterator[Pixels]:
    """Blocks row by row."""
    for y in range(0, height, edge[1]):
        for x in range(0, width, edge[0]):
            block = pixels[y : y + edge[1], x : x + edge[0]]
            if pads and block.shape[:2] != (edge[1], edge[0]):
                rows = np.clip(np.arange(y, y + edge[1]), 0, pixels.shape[0] - 1)
                columns = np.clip(np.arange(x, x + edge[0]), 0, pixels.shape[1] - 1)
                block = pixels[rows][:, columns]
            yield np.ascontiguousarray(block)


def _parts(stream: bytes) -> tuple[bytes, bytes]:
    """A JPEG's tables as a stream of their own, and the rest of it, without what applications wrote (APPn)."""
    tables, rest, at = b"", b"", 2
    while stream[at + 1] != _START_OF_SCAN:
        end = at + 2 + int.from_bytes(stream[at + 2 : at + 4], "big")
        if stream[at + 1] in _TABLES:
            tables += stream[at:end]
        elif not 0xE0 <= stream[at + 1] <= 0xEF:
            rest += stream[at:end]
        at = end
    return b"\xff\xd8" + tables + b"\xff\xd9", b"\xff\xd8" + rest + stream[at:]
