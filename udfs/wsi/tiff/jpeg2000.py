"""JPEG 2000 blocks, as Aperio and others store them, through OpenJPEG."""

import io

import imagecodecs
import numpy as np
from numpy.typing import NDArray
from PIL import Image

from udfs.wsi.tiff.codestream import START, checked_codestream

_CODING_STYLE, _START_OF_TILE = b"\xff\x52", b"\xff\x90"


def decode_jpeg2000(data: memoryview, width: int, height: int, samples: int, *, is_ycbcr: bool) -> NDArray[np.uint8]:
    """Decode a codestream or a JP2 file.

    Args:
        data: the block.
        width: of the block, pixels; the image may be smaller.
        height: of the block, pixels.
        samples: number per pixel.
        is_ycbcr: whether the directory says that the three samples are Y, Cb and Cr. The block's own header takes
            precedence: decoders undo a codestream's colour transform, and convert a JP2 file in sYCC.

    Returns:
        uint8 [h, w] or [h, w, samples].

    Raises:
        ValueError: the image is larger than the block, or has other samples.
        imagecodecs.Jpeg2kError, OSError: the data is damaged.
    """
    content = bytes(data)
    codestream = checked_codestream(content, width, height, samples)
    # imagecodecs puts the samples of smaller components in wrong places; Pillow gives RGB.
    if _is_subsampled(codestream):
        with Image.open(io.BytesIO(content)) as image:  # Pillow reads the size from the boxes of a JP2 file
            if image.width > width or image.height > height:
                raise ValueError(f"a JP2 file of {image.width} x {image.height} px in a block of {width} x {height}")
            return np.asarray(image.convert("RGB"))
    pixels: NDArray[np.uint8] = imagecodecs.jpeg2k_decode(content)
    if pixels.dtype != np.uint8:
        raise ValueError(f"{pixels.dtype} samples")
    if is_ycbcr and pixels.ndim == 3 and pixels.shape[-1] == 3 and not _says_its_colours(content):
        return _rgb(pixels)
    return pixels


def _rgb(ycbcr: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """R, G, B from full-range Y, Cb, Cr in 16-bit fixed point, rounded as libjpeg and OpenSlide do. ITU-T T.871, 7."""
    luma, blue, red = np.moveaxis(ycbcr.astype(np.int32), -1, 0)
    blue, red = blue - 128, red - 128
    chroma = np.stack((91881 * red, -22554 * blue - 46802 * red, 116130 * blue), axis=-1)
    rgb: NDArray[np.uint8] = np.clip(luma[..., None] + (chroma + 32768 >> 16), 0, 255).astype(np.uint8)
    return rgb


def _is_subsampled(codestream: bytes) -> bool:
    """Whether some components (chroma) have fewer samples than the image has pixels."""
    samples = int.from_bytes(codestream[40:42], "big")
    steps = codestream[42 : 42 + 3 * samples]  # bits, and a sample's width and height in pixels, of each
    return any(steps[i] != 1 for i in range(len(steps)) if i % 3)


def _says_its_colours(data: bytes) -> bool:
    """Whether the block alone defines its colours: a JP2 file names the colour space, and a codestream may have a
    multiple component transform. ITU-T T.800, I.5.3.3 and A.6.1.
    """
    if not data.startswith(START):
        return True
    at = 2
    while at + 9 <= len(data) and data[at : at + 2] not in (_CODING_STYLE, _START_OF_TILE):
        at += 2 + int.from_bytes(data[at + 2 : at + 4], "big")
    return data[at : at + 2] == _CODING_STYLE and data[at + 8] == 1
