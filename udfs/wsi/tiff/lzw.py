"""LZW blocks through libtiff: imagecodecs' own LZW decoder crashes the process on some damaged data."""

import struct
from typing import Any

import imagecodecs
import numpy as np
from numpy.typing import NDArray

_SHORT, _LONG = 3, 4
_LZW, _MINISBLACK, _RGB = 5, 1, 2


def decode_lzw(data: bytes, width: int, height: int, samples: int, predictor: int) -> NDArray[np.uint8]:
    """Decodes one block to uint8 [height, width, samples].

    `predictor` is TIFF's: 1 for none, 2 for horizontal differences. Raises imagecodecs.TiffError if the data is damaged.
    """
    pixels: NDArray[np.uint8] = imagecodecs.tiff_decode(_as_tiff(data, width, height, samples, predictor))
    return pixels.reshape(height, width, samples)


def _as_tiff(data: bytes, width: int, height: int, samples: int, predictor: int) -> bytes:
    """A little-endian TIFF of one strip: header, directory, sample widths, the block (TIFF 6.0, section 2)."""
    entries: list[tuple[int, int, int, Any]] = [
        (256, _LONG, 1, width),
        (257, _LONG, 1, height),
        (258, _SHORT, samples, None),  # bits per sample, after the directory if there are more than two
        (259, _SHORT, 1, _LZW),
        (262, _SHORT, 1, _RGB if samples >= 3 else _MINISBLACK),
        (273, _LONG, 1, None),  # the beginning of the strip
        (277, _SHORT, 1, samples),
        (278, _LONG, 1, height),
        (279, _LONG, 1, len(data)),
        (284, _SHORT, 1, 1),
        (317, _SHORT, 1, predictor),
    ]
    if samples in (2, 4):
        entries.append((338, _SHORT, 1, 2))
    after = 8 + 2 + 12 * len(entries) + 4
    bits = struct.pack(f"<{samples}H", *[8] * samples)
    values = {258: after if samples > 2 else 8 | (8 << 16 if samples == 2 else 0), 273: after + len(bits)}
    directory = b"".join(
        struct.pack("<HHII", tag, kind, count, values[tag] if value is None else value)
        for tag, kind, count, value in entries
    )
    return struct.pack("<2sHIH", b"II", 42, 8, len(entries)) + directory + bytes(4) + bits + data
