"""Writers of slides from numpy pixels, on tifffile. Nothing here reads a slide, and nothing here is broken on purpose.

Frames: x runs along the width, y along the height, arrays are [y, x, channel]. A `downsample` d is a level whose pixel
covers d x d level-0 pixels; such a level is [h // d, w // d], as libvips makes it.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import imagecodecs
import numpy as np
import tifffile
from numpy.typing import NDArray

from tests.slides.oracle import area_average

Pixels = NDArray[np.uint8]

PYRAMID = (4, 16)
"""Downsamples of the lower levels, as most scanners write them."""

_UM_PER_CM = 10_000.0
_REDUCED = 1  # NewSubfileType of a lower level
_COMPRESSIONS = {"none": None, "deflate": "zlib"}  # the others go by tifffile's own names
_STAINS = np.array([[0.65, 0.70, 0.29], [0.07, 0.99, 0.11]])
"""Optical densities of haematoxylin and eosin in R, G, B: Ruifrok & Johnston 2001, Anal Quant Cytol Histol 23:291."""


def write_slide(
    path: Path,
    pixels: NDArray[Any],
    *,
    tile_px: int | None = 256,
    rows_per_strip: int = 16,
    compression: str = "jpeg",
    pyramid: bool = False,
    levels: Sequence[int] = PYRAMID,
    subifds: bool = False,
    mpp: float | tuple[float, float] | None = 0.5,
    photometric: str | None = None,
    subsampling: tuple[int, int] = (2, 2),
    quality: int = 90,
    planar: bool = False,
    predictor: bool = False,
    bigtiff: bool = False,
    description: str | None = None,
) -> Path:
    """Write `pixels` ([h, w], or [h, w, c] with c of 1, 3 or 4; uint8, or uint16 without a pyramid) as one TIFF.

    tile_px         edge of the square tiles (a multiple of 16); None writes strips of rows_per_strip rows
    compression     "jpeg", "lzw", "deflate", "none", "jpeg2000", "zstd" or any other name that tifffile knows
    pyramid         adds a level for each downsample in `levels`, each the rounded mean of level 0 over d x d squares,
                    as further directories marked "reduced", or as SubIFDs of the first (subifds)
    mpp             um/px, one number or (x, y), into XResolution and YResolution in centimetres; None leaves it out
    photometric     how JPEG stores three channels: "ycbcr" (None means it) or "rgb". Other compressions store RGB; one
                    channel is stored as "minisblack", four as RGB with unassociated alpha (not in JPEG)
    subsampling     of chroma in ycbcr JPEG: (2, 2) is 4:2:0, (1, 1) is 4:4:4
    quality         of JPEG, 1 to 100
    planar          one plane a channel instead of interleaved pixels
    predictor       horizontal differencing, for lzw and deflate
    description     ImageDescription of level 0, where vendors hide their header
    """
    image = pixels[:, :, None] if pixels.ndim == 2 else pixels
    options: dict[str, Any] = {
        "compression": _COMPRESSIONS.get(compression, compression),
        "predictor": predictor or None,
        "planarconfig": "separate" if planar and image.shape[2] > 1 else None,
        **_colours(image.shape[2], compression),
        **({"tile": (tile_px, tile_px)} if tile_px else {"rowsperstrip": rows_per_strip}),
    }
    if compression == "jpeg":
        # tifffile's `photometric` is the colour space that comes in, its outcolorspace the one that is stored.
        stored = photometric or "ycbcr"
        options["compressionargs"] = {"level": quality, "outcolorspace": stored}
        options["subsampling"] = subsampling if stored == "ycbcr" and image.shape[2] == 3 and not planar else (1, 1)
    downsamples = tuple(levels) if pyramid else ()
    with tifffile.TiffWriter(path, bigtiff=bigtiff) as writer:
        for downsample in (1, *downsamples):
            level = image if downsample == 1 else area_average(image, downsample)
            if image.shape[2] == 1:
                level = level[:, :, 0]
            elif planar:
                level = np.moveaxis(level, 2, 0)
            place = _place(downsample, mpp, len(downsamples) if subifds else 0, description)
            writer.write(np.ascontiguousarray(level), **options, **place)
    return path


def write_mosaic(
    path: Path,
    pixels: Pixels,
    *,
    width: int,
    height: int,
    tile_px: int = 256,
    pyramid: bool = True,
    levels: Sequence[int] = PYRAMID,
    mpp: float | None = 0.5,
    quality: int = 80,
    bigtiff: bool | None = None,
) -> Path:
    """Write a JPEG slide (YCbCr 4:2:0) of any size: the region `pixels` [h, w, 3], mirrored, over and over.

    Each distinct block is encoded once and its bytes repeated, so a 31,000 x 33,000 slide takes seconds and little
    memory. The region is cropped to multiples of tile_px / 2 (see `mosaic_window` for the pixels that come of it);
    blocks at the right and lower edge are whole, as TIFF asks. bigtiff: None decides by the size.
    """
    if tile_px % 16 or any(tile_px % downsample for downsample in levels):
        raise ValueError(
            f"tile_px is {tile_px}: must be a multiple of 16 and of each level's downsample {tuple(levels)}"
        )
    period = _mirrored(pixels, tile_px)
    if bigtiff is None:
        bigtiff = width * height * 3 >= 2**32
    with tifffile.TiffWriter(path, bigtiff=bigtiff) as writer:
        for downsample in (1, *(levels if pyramid else ())):
            level = area_average(period, downsample) if downsample > 1 else period
            shape = (max(1, height // downsample), max(1, width // downsample), 3)
            writer.write(
                _blocks(level, shape[0], shape[1], tile_px, quality),
                shape=shape,
                dtype="uint8",
                tile=(tile_px, tile_px),
                compression="jpeg",
                photometric="ycbcr",
                subsampling=(2, 2),
                **_place(downsample, mpp, 0, None),
            )
    return path


def mosaic_window(
    pixels: Pixels, x_px: int, y_px: int, width: int, height: int, *, tile_px: int = 256, downsample: int = 1
) -> Pixels:
    """What `write_mosaic` encodes at this window: uint8 [height, width, 3].

    x_px, y_px, width and height are pixels of the level with that downsample.
    """
    return _window(area_average(_mirrored(pixels, tile_px), downsample), x_px, y_px, width, height)


def position_pixels(width: int, height: int) -> Pixels:
    """Pixels that say where they are: uint8 [height, width, 3], unique up to 4096 x 4096.

    R = x mod 256, G = y mod 256, B = (x // 256 mod 16) * 16 + (y // 256 mod 16). Written without loss they catch every
    mix-up of x and y, of levels, and of a block's place.
    """
    x, y = np.arange(width)[None, :], np.arange(height)[:, None]
    channels = np.broadcast_arrays(x & 255, y & 255, ((x >> 8 & 15) << 4) | (y >> 8 & 15))
    pixels: Pixels = np.stack(channels, axis=2).astype(np.uint8)
    return pixels


def stain_shift(
    pixels: Pixels,
    *,
    haematoxylin: float = 0.8,
    eosin: float = 1.25,
    tint: tuple[float, float, float] = (0.985, 0.975, 0.99),
) -> Pixels:
    """The look of another centre: optical densities of the two stains scaled, glass slightly tinted.

    uint8 [h, w, 3] -> uint8 [h, w, 3]. The density that neither stain explains stays as it is. Glass stays glass: its
    density is near nothing, so with a mild tint (each factor of the light that passes) it stays above 190.
    """
    third = np.cross(_STAINS[0], _STAINS[1])
    vectors = np.vstack([_STAINS, third])
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    change = np.linalg.inv(vectors) @ np.diag([haematoxylin, eosin, 1.0]) @ vectors
    # 256 densities are all there are; a pixel without light counts as one of 1/255.
    density = -np.log(np.maximum(np.arange(256), 1) / 255.0).astype(np.float32)
    shifted: Pixels = np.empty_like(pixels)
    for top in range(0, pixels.shape[0], 512):  # in bands: floats take four times the memory
        light = np.exp(-(density[pixels[top : top + 512]] @ change.astype(np.float32)))
        shifted[top : top + 512] = np.clip(np.rint(light * np.asarray(tint, np.float32) * 255), 0, 255).astype(np.uint8)
    return shifted


def _colours(channels: int, compression: str) -> dict[str, Any]:
    if channels == 1:
        return {"photometric": "minisblack"}
    if channels == 4 and compression == "jpeg":
        raise ValueError("four channels cannot be written as JPEG: choose a lossless compression")
    return {"photometric": "rgb", "extrasamples": ["unassalpha"] if channels == 4 else None}


def _place(
    downsample: int, mpp: float | tuple[float, float] | None, subifds: int, description: str | None
) -> dict[str, Any]:
    """What depends on the level: its place in the file, its resolution. No dates, no names: same input, same bytes."""
    place: dict[str, Any] = {"metadata": None, "software": False}
    if downsample > 1:
        place["subfiletype"] = _REDUCED
    else:
        place |= {"subifds": subifds or None, "description": description}
    if mpp is not None:
        mpp_x, mpp_y = mpp if isinstance(mpp, tuple) else (mpp, mpp)
        place["resolution"] = (_UM_PER_CM / (mpp_x * downsample), _UM_PER_CM / (mpp_y * downsample))
        place["resolutionunit"] = "CENTIMETER"
    return place


def _mirrored(pixels: Pixels, tile_px: int) -> Pixels:
    """The region and its mirror images, a whole number of blocks a side: it repeats without a seam."""
    half = tile_px // 2
    height, width = pixels.shape[0] // half * half, pixels.shape[1] // half * half
    if not height or not width:
        raise ValueError(f"the region is {pixels.shape[1]} x {pixels.shape[0]} px: must be at least {half} px a side")
    region = pixels[:height, :width]
    upper = np.concatenate([region, region[:, ::-1]], axis=1)
    return np.concatenate([upper, upper[::-1]], axis=0)


def _window(period: Pixels, x_px: int, y_px: int, width: int, height: int) -> Pixels:
    rows = period.take(range(y_px, y_px + height), axis=0, mode="wrap")
    window: Pixels = rows.take(range(x_px, x_px + width), axis=1, mode="wrap")
    return window


def _blocks(period: Pixels, height: int, width: int, tile_px: int, quality: int) -> Iterator[bytes]:
    """Encoded blocks of one level, row by row. Blocks at the same phase of the period are the same bytes."""
    encoded: dict[tuple[int, int], bytes] = {}
    for y_px in range(0, height, tile_px):
        for x_px in range(0, width, tile_px):
            phase = (x_px % period.shape[1], y_px % period.shape[0])
            if phase not in encoded:
                block = np.ascontiguousarray(_window(period, *phase, tile_px, tile_px))
                encoded[phase] = bytes(imagecodecs.jpeg8_encode(block, level=quality, subsampling=(2, 2)))
            yield encoded[phase]
