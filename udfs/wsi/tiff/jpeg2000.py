"""JPEG 2000 blocks, as Aperio and others store them, through OpenJPEG."""

import imagecodecs
import numpy as np
from numpy.typing import NDArray

# R, G, B from full-range Y, Cb, Cr: ITU-T T.871, 7
_TO_RGB = np.array([[1.0, 0.0, 1.402], [1.0, -0.344136, -0.714136], [1.0, 1.772, 0.0]], np.float32)


def decode_jpeg2000(data: memoryview, width: int, height: int, *, is_ycbcr: bool) -> NDArray[np.uint8]:
    """Decode a codestream or a JP2 file.

    Args:
        data: the block.
        width: most that it may claim, pixels.
        height: likewise.
        is_ycbcr: its three samples are Y, Cb, Cr without saying so (Aperio's 33003).

    Returns:
        uint8 [h, w] or [h, w, samples].

    Raises:
        ValueError: it claims more pixels than its block, or not 8 bits a sample.
        imagecodecs.Jpeg2kError: the data is damaged.
    """
    content = bytes(data)
    _check_size(content, width, height)
    pixels: NDArray[np.uint8] = imagecodecs.jpeg2k_decode(content)
    if pixels.dtype != np.uint8:
        raise ValueError(f"{pixels.dtype} samples")
    if not is_ycbcr or pixels.ndim != 3 or pixels.shape[-1] != 3:
        return pixels
    ycbcr = pixels.astype(np.float32)
    ycbcr[..., 1:] -= 128
    rgb: NDArray[np.uint8] = np.clip(np.rint(ycbcr @ _TO_RGB.T), 0, 255).astype(np.uint8)
    return rgb


def _check_size(data: bytes, width: int, height: int) -> None:
    """Refuse a codestream that claims more pixels than its block, before OpenJPEG allocates them. ITU-T T.800, A.5.1."""
    at = data.find(b"\xff\x4f\xff\x51", 0, 256)  # start of codestream, image and tile size
    if at < 0:
        raise ValueError("no JPEG 2000 codestream")
    right, bottom, left, top = (int.from_bytes(data[at + i : at + i + 4], "big") for i in (8, 12, 16, 20))
    if right - left > width or bottom - top > height:
        raise ValueError(f"a codestream of {right - left} x {bottom - top} px in a block of {width} x {height}")
