"""Writers of slides that are no TIFFs, as small as OpenSlide takes them: MIRAX, Hamamatsu VMS, DICOM, Zeiss CZI.

Their layouts are those that OpenSlide's readers expect (https://openslide.org/formats, and DICOM PS3.3 A.32.8 for VL
Whole Slide Microscopy). Frames and words are those of `tests.slides.make`.
"""

import io
import struct
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from tests.slides.make import Pixels
from tests.slides.oracle import area_average

MIRAX_IMAGE_PX = 128
VMS_RESTART_PX = 64  # between two restart markers, the width of what OpenSlide can decode alone

_JPEG_BASELINE = "1.2.840.10008.1.2.4.50"
_WHOLE_SLIDE = "1.2.840.10008.5.1.4.1.1.77.1.6"
_LONG_VRS = (b"OB", b"SQ")  # these have 32-bit lengths


def write_mirax(
    path: Path, pixels: Pixels, *, doublings: int = 2, missing: Collection[int] = (), mpp: float = 0.25
) -> Path:
    """Write a MIRAX slide: a .mrxs file, itself a JPEG, and beside it a folder of its stem. Lossless (PNG).

    path        of the .mrxs file
    pixels      [h, w, 3], h and w multiples of MIRAX_IMAGE_PX << doublings
    doublings   levels below level 0, each half the one above it
    missing     numbers of level-0 images, row by row, that are left out, as scanners do with empty glass; the lower
                levels have them
    """
    folder = path.with_suffix("")
    folder.mkdir()
    columns, rows = pixels.shape[1] // MIRAX_IMAGE_PX, pixels.shape[0] // MIRAX_IMAGE_PX
    ini = [
        *("[GENERAL]", "SLIDE_ID = 0123456789ABCDEF", f"IMAGENUMBER_X = {columns}", f"IMAGENUMBER_Y = {rows}"),
        *("[HIERARCHICAL]", "HIER_COUNT = 1", "NONHIER_COUNT = 0", "INDEXFILE = Index.dat"),
        *("HIER_0_NAME = Slide zoom level", f"HIER_0_COUNT = {doublings + 1}"),
        *(f"HIER_0_VAL_{level}_SECTION = LEVEL_{level}" for level in range(doublings + 1)),
        *("[DATAFILE]", "FILE_COUNT = 1", "FILE_0 = Data0000.dat"),
    ]
    data, pages = io.BytesIO(), []
    for level in range(doublings + 1):
        ini += [
            *(f"[LEVEL_{level}]", f"IMAGE_CONCAT_FACTOR = {min(level, 1)}", "OVERLAP_X = 0", "OVERLAP_Y = 0"),
            *(f"MICROMETER_PER_PIXEL_{axis} = {mpp * 2**level}" for axis in "XY"),
            *("IMAGE_FORMAT = PNG", "IMAGE_FILL_COLOR_BGR = 16777215"),
            *(f"DIGITIZER_WIDTH = {MIRAX_IMAGE_PX}", f"DIGITIZER_HEIGHT = {MIRAX_IMAGE_PX}"),
        ]
        step = 1 << level  # level-0 images that an image of this level spans
        page = []
        for (row, column), image in _grid(area_average(pixels, step) if level else pixels, MIRAX_IMAGE_PX):
            number = row * step * columns + column * step
            if level or number not in missing:
                start = data.tell()
                Image.fromarray(image).save(data, "PNG")
                page.append((number, start, data.tell() - start, 0))
        pages.append(page)
    (folder / "Slidedat.ini").write_text("\n".join(ini) + "\n")
    (folder / "Data0000.dat").write_bytes(data.getvalue())
    (folder / "Index.dat").write_bytes(_mirax_index(pages))
    Image.fromarray(area_average(pixels, 8)).save(path, "JPEG")
    return path


def write_vms(path: Path, pixels: Pixels, *, columns: int = 2, mpp: float = 0.5, quality: int = 90) -> Path:
    """Write a Hamamatsu VMS slide: an ini file, and beside it a JPEG a column, the map (1/16) and a macro image.

    pixels      [h, w, 3], h a multiple of 128, w one of columns * VMS_RESTART_PX * 16
    """
    height, width = pixels.shape[:2]
    parts = np.split(pixels, columns, axis=1)
    names = [f"{path.stem}-{column}.jpg" for column in range(columns)]
    for name, part in zip(names, parts, strict=True):
        _write_restarting(path.with_name(name), part, quality)
    _write_restarting(path.with_name(f"{path.stem}-map.jpg"), area_average(pixels, 16), quality)
    Image.fromarray(area_average(pixels, 16)).save(path.with_name(f"{path.stem}-macro.jpg"))
    lines = [
        *("[Virtual Microscope Specimen]", "NoLayers=1", f"NoJpegColumns={columns}", "NoJpegRows=1"),
        *(f"ImageFile({column},0)={name}" if column else f"ImageFile={name}" for column, name in enumerate(names)),
        *(f"MapFile={path.stem}-map.jpg", f"MacroImage={path.stem}-macro.jpg", "AuthCode=none"),
        *(f"PhysicalWidth={round(width * mpp * 1000)}", f"PhysicalHeight={round(height * mpp * 1000)}"),  # nm
    ]
    path.write_text("\n".join(lines) + "\n")
    return path


def write_dicom(
    folder: Path,
    pixels: Pixels,
    *,
    levels: Sequence[int] = (1, 4),
    frame_px: int = 256,
    series: int = 1,
    mpp: float = 0.5,
) -> Path:
    """Write a DICOM slide, a file a level, JPEG frames (4:2:0); returns the file of level 0.

    folder      may hold other series
    levels      downsamples, each written as the area average of `pixels` [h, w, 3]
    series      number of the series; what it names differs in every UID
    """
    folder.mkdir(exist_ok=True)
    for downsample in levels:
        level = area_average(pixels, downsample)
        path = folder / f"series{series}-level{downsample}.dcm"
        path.write_bytes(_dicom(level, frame_px, f"1.2.3.{series}", f"1.2.3.{series}.{downsample}", mpp * downsample))
    return folder / f"series{series}-level{levels[0]}.dcm"


CZI_GREY, CZI_GREY16, CZI_BGR, CZI_BGRA = 0, 1, 3, 9  # types of pixels
CZI_UNCOMPRESSED, CZI_JPEG, CZI_JPEG_XR = 0, 1, 4


def write_czi(
    path: Path,
    pixels: Pixels,
    *,
    planes: Sequence[tuple[str, int]] = (("C", 0),),
    kind: int = CZI_BGR,
    compression: int = CZI_UNCOMPRESSED,
    mpp: float = 0.25,
) -> Path:
    """Write a Zeiss CZI of one scene and level, `pixels` [h, w, 3] once for each plane.

    planes        dimension and place in it, beside X and Y
    kind          what the directory says of the pixels, which are BGR
    compression   what it says of their compression; they are not compressed
    """
    height, width = pixels.shape[:2]
    distances = "".join(f'<Distance Id="{axis}"><Value>{mpp / 1e6}</Value></Distance>' for axis in "XY")
    xml = (
        f"<ImageDocument><Metadata><Information><Image><SizeX>{width}</SizeX><SizeY>{height}</SizeY></Image></Information>"
        f"<Scaling><Items>{distances}</Items></Scaling></Metadata></ImageDocument>"
    ).encode()
    file, data, entries = io.BytesIO(bytes(32 + 512)), pixels[..., ::-1].tobytes(), []
    file.seek(0, io.SEEK_END)

    def add(name: bytes, content: bytes) -> int:
        at = file.tell()
        file.write(struct.pack("<16sqq", name, len(content), len(content)) + content)
        return at

    metadata = add(b"ZISRAWMETADATA", struct.pack("<ii248x", len(xml), 0) + xml)
    for plane in planes:
        dimensions = [("X", 0, width), ("Y", 0, height), (*plane, 1)]
        entry = struct.pack("<2siqiib5xi", b"DV", kind, file.tell(), 0, compression, 0, len(dimensions))
        entry += b"".join(struct.pack("<4siifi", name.encode(), at, n, 0.0, n) for name, at, n in dimensions)
        entries.append(entry)
        add(b"ZISRAWSUBBLOCK", (struct.pack("<iiq", 0, 0, len(data)) + entry).ljust(256, b"\0") + data)
    directory = add(b"ZISRAWDIRECTORY", struct.pack("<i124x", len(entries)) + b"".join(entries))
    attachments = add(b"ZISRAWATTDIR", struct.pack("<i252x", 0))
    file.seek(0)
    add(b"ZISRAWFILE", struct.pack("<ii8x32xiqqiq", 1, 0, 0, directory, metadata, 0, attachments))
    path.write_bytes(file.getvalue())
    return path


def _grid(pixels: Pixels, edge: int) -> Iterator[tuple[tuple[int, int], Pixels]]:
    """((row, column), square) row by row; what hangs over the edge is white."""
    height, width = pixels.shape[:2]
    rows, columns = -(-height // edge), -(-width // edge)
    whole = np.full((rows * edge, columns * edge, 3), 255, np.uint8)
    whole[:height, :width] = pixels
    for row in range(rows):
        for column in range(columns):
            yield (row, column), whole[row * edge : (row + 1) * edge, column * edge : (column + 1) * edge]


def _mirax_index(pages: Sequence[Sequence[tuple[int, int, int, int]]]) -> bytes:
    """A version, the slide's id, pointers to the levels; a level is a zero and a pointer to its page of records."""
    head = b"01.02" + b"0123456789ABCDEF"
    at = len(head) + 8  # behind the pointers to the levels and to what is not in levels
    records_at = at + 4 * len(pages) + 8 * len(pages)
    pointers, starts, records = b"", b"", b""
    for number, page in enumerate(pages):
        pointers += struct.pack("<i", at + 4 * len(pages) + 8 * number)
        starts += struct.pack("<ii", 0, records_at + len(records))
        records += struct.pack("<ii", len(page), 0) + b"".join(struct.pack("<4i", *record) for record in page)
    return head + struct.pack("<ii", at, 0) + pointers + starts + records


def _write_restarting(path: Path, pixels: Pixels, quality: int) -> None:
    # without subsampling a unit is 8 x 8 px
    Image.fromarray(pixels).save(
        path, "JPEG", quality=quality, subsampling=0, restart_marker_blocks=VMS_RESTART_PX // 8
    )


def _dicom(pixels: Pixels, frame_px: int, series: str, instance: str, mpp: float) -> bytes:
    frames = []
    for _, square in _grid(pixels, frame_px):
        stream = io.BytesIO()
        Image.fromarray(square).save(stream, "JPEG", quality=90)
        frames.append(stream.getvalue() + b"\0" * (stream.tell() % 2))
    meta = (
        _element(0x0002, 0x0001, b"OB", b"\0\1")
        + _element(0x0002, 0x0002, b"UI", _WHOLE_SLIDE)
        + _element(0x0002, 0x0003, b"UI", instance)
        + _element(0x0002, 0x0010, b"UI", _JPEG_BASELINE)
        + _element(0x0002, 0x0012, b"UI", "1.2.3")
    )
    spacing = _element(0x0028, 0x0030, b"DS", f"{mpp / 1000}\\{mpp / 1000}")  # mm
    offsets = np.cumsum([0] + [8 + len(frame) for frame in frames[:-1]])
    items = [struct.pack(f"<{len(frames)}I", *offsets), *frames]
    height, width = pixels.shape[:2]
    return (
        (b"\0" * 128 + b"DICM" + _element(0x0002, 0x0000, b"UL", len(meta)) + meta)
        + _element(0x0008, 0x0008, b"CS", "ORIGINAL\\PRIMARY\\VOLUME\\NONE")
        + _element(0x0008, 0x0016, b"UI", _WHOLE_SLIDE)
        + _element(0x0008, 0x0018, b"UI", instance)
        + _element(0x0020, 0x000E, b"UI", series)
        + _element(0x0020, 0x9311, b"CS", "TILED_FULL")
        + _element(0x0028, 0x0002, b"US", 3)
        + _element(0x0028, 0x0004, b"CS", "YBR_FULL_422")
        + _element(0x0028, 0x0006, b"US", 0)
        + _element(0x0028, 0x0008, b"IS", str(len(frames)))
        + _element(0x0028, 0x0010, b"US", frame_px)
        + _element(0x0028, 0x0011, b"US", frame_px)
        + b"".join(_element(0x0028, 0x0100 + i, b"US", bits) for i, bits in enumerate((8, 8, 7, 0)))
        + _element(0x0048, 0x0006, b"UL", width)
        + _element(0x0048, 0x0007, b"UL", height)
        + _element(0x5200, 0x9229, b"SQ", _item(_element(0x0028, 0x9110, b"SQ", _item(spacing))))
        + struct.pack("<HH2s2xI", 0x7FE0, 0x0010, b"OB", 0xFFFFFFFF)
        + b"".join(_item(item) for item in items)
        + struct.pack("<HHI", 0xFFFE, 0xE0DD, 0)
    )


def _element(group: int, number: int, vr: bytes, value: bytes | str | int) -> bytes:
    """One data element, explicit VR, little-endian: DICOM PS3.5, 7.1.2."""
    if isinstance(value, int):
        value = struct.pack("<H" if vr == b"US" else "<I", value)
    if isinstance(value, str):
        value = value.encode() + (b"\0" if vr == b"UI" else b" ") * (len(value) % 2)
    length = struct.pack("<2xI" if vr in _LONG_VRS else "<H", len(value))
    return struct.pack("<HH2s", group, number, vr) + length + value


def _item(content: bytes) -> bytes:
    return struct.pack("<HHI", 0xFFFE, 0xE000, len(content)) + content
