"""Why OpenSlide refuses a slide that may be intact: a property that it does not read, looked up in the file."""

import re
import struct
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

from udfs.wsi.reading.companions import DICOM_HEAD_BYTES, DICOM_SERIES

# Zeiss CZI. Its directory lists all rectangles of pixels: type, compression and place in each dimension.
_CZI_FILE = struct.Struct("<84x q")  # the directory's place
_CZI_DIRECTORY = struct.Struct("<16s 16x i 124x")  # its name, how many rectangles follow
_CZI_RECTANGLE = struct.Struct("<2s i 12x i 6x i")  # schema, type, compression, how many dimensions follow
_CZI_DIMENSION = struct.Struct("<4s i 12x")  # name and start
_CZI_TYPES = {0: "grey", 1: "16-bit grey", 2: "32-bit grey", 3: "RGB", 4: "16-bit RGB", 8: "96-bit RGB", 9: "RGBA"}
_CZI_COMPRESSIONS = {0: "no", 1: "JPEG", 2: "LZW", 4: "JPEG XR", 5: "zstd", 6: "zstd"}
_CZI_DIMENSIONS = {"Z": "focal planes", "C": "channels", "T": "time points", "R": "rotations", "I": "illuminations"}
_CZI_READ = ("RGB", "16-bit RGB"), ("no", "zstd"), ("X", "Y", "S", "M")

# DICOM, explicit VR, little-endian: element, what it is, the value that OpenSlide reads.
_DICOM_NUMBERS = (
    (rb"\x28\x00\x02\x00US\x02\x00", "samples per pixel", 3),
    (rb"\x28\x00\x06\x00US\x02\x00", "planar configuration", 0),
    (rb"\x28\x00\x00\x01US\x02\x00", "bits allocated per sample", 8),
    (rb"\x28\x00\x01\x01US\x02\x00", "bits stored per sample", 8),
    (rb"\x28\x00\x03\x01US\x02\x00", "pixel representation", 0),
    (rb"\x48\x00\x03\x03UL\x04\x00", "focal planes", 1),
)
_DICOM_TEXTS = (  # transfer syntax and colours
    re.compile(rb"\x02\x00\x10\x00UI..([0-9.]+)", re.DOTALL),
    re.compile(rb"\x28\x00\x04\x00CS..([A-Z0-9_]+)", re.DOTALL),
)
_DICOM_JPEG, _DICOM_JPEG2000 = ("YBR_FULL_422", "RGB"), ("YBR_ICT", "YBR_RCT", "RGB")
_DICOM_READ = {
    "1.2.840.10008.1.2.1": ("RGB",),
    "1.2.840.10008.1.2.4.50": _DICOM_JPEG,
    "1.2.840.10008.1.2.4.90": _DICOM_JPEG2000,
    "1.2.840.10008.1.2.4.91": _DICOM_JPEG2000,
}

# Texts of lines "key = value": the values that OpenSlide reads.
_MIRAX_READ = {"IMAGE_FORMAT": ("JPEG", "PNG", "BMP24")}
_VMU_READ = {"BitsPerPixel": ("36",), "PixelOrder": ("RGB",)}


def unread_property(path: Path, kind: str) -> str | None:
    """Returns the property that OpenSlide does not read, in words; None if there is none, as in a damaged slide.

    The slide's other files lie beside `path`; `kind` is from `udfs.wsi.reading.foreign.sniff`.
    """
    looks: dict[str, Callable[[Path], Iterator[str]]] = {
        "Zeiss CZI": _czi,
        "DICOM": _dicom,
        "MIRAX": lambda path: _text(path.with_suffix("") / "Slidedat.ini", _MIRAX_READ),
        "Hamamatsu VMU": lambda path: _text(path, _VMU_READ),
    }
    try:
        return next(looks[kind](path), None) if kind in looks else None
    except (OSError, struct.error):
        return None  # the file or field with the answer is missing


def _czi(path: Path) -> Iterator[str]:
    types, compressions, places = _CZI_READ
    with path.open("rb") as file:
        [at] = _CZI_FILE.unpack(file.read(_CZI_FILE.size))
        file.seek(max(at, 0))
        name, count = _CZI_DIRECTORY.unpack(file.read(_CZI_DIRECTORY.size))
        for _ in range(count if name.startswith(b"ZISRAWDIRECTORY") else 0):
            schema, kind, compression, dimensions = _CZI_RECTANGLE.unpack(file.read(_CZI_RECTANGLE.size))
            if schema != b"DV":
                return  # damage
            for _ in range(dimensions):
                name, start = _CZI_DIMENSION.unpack(file.read(_CZI_DIMENSION.size))
                axis = name.rstrip(b"\0").decode("ascii", "replace")
                if axis not in places and not (axis == "C" and start == 0):
                    yield f"{_CZI_DIMENSIONS.get(axis, 'pictures')} (dimension {axis})"
            if (name_of_kind := _CZI_TYPES.get(kind, f"type {kind}")) not in types:
                yield f"{name_of_kind} pixels"
            if (name_of_codec := _CZI_COMPRESSIONS.get(compression, f"type {compression}")) not in compressions:
                yield f"{name_of_codec} compression"


def _dicom(path: Path) -> Iterator[str]:
    own = _head(path)
    series = set(DICOM_SERIES.findall(own))
    others = (other for other in sorted(path.parent.glob(f"*{path.suffix}")) if other != path and other.is_file())
    for head in (own, *(head for head in map(_head, others) if series & set(DICOM_SERIES.findall(head)))):
        syntax, colours = (found[1].decode() if (found := pattern.search(head)) else "" for pattern in _DICOM_TEXTS)
        if syntax and syntax not in _DICOM_READ:
            yield f"transfer syntax {syntax}"
        for element, name, read in _DICOM_NUMBERS:
            if found := re.search(element + (b"(....)" if b"UL" in element else b"(..)"), head, re.DOTALL):
                value = int.from_bytes(found[1], "little")
                if value != read:
                    yield f"{value} {name}"
        if syntax in _DICOM_READ and colours and colours not in _DICOM_READ[syntax]:
            yield f"{colours} pixels"


def _text(path: Path, read: Mapping[str, Sequence[str]]) -> Iterator[str]:
    text = _head(path).decode("utf-8-sig", errors="replace")
    for key, values in read.items():
        for value in re.findall(rf"^{key}[ \t]*=[ \t]*(.+?)\s*$", text, re.MULTILINE):
            if value not in values:
                yield f"{key} = {value:.40}"


def _head(path: Path) -> bytes:
    with path.open("rb") as file:
        return file.read(DICOM_HEAD_BYTES)
