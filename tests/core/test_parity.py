"""Pixels are those of OpenSlide, over layouts and codecs: equal without loss, JPEG too (libjpeg-turbo on both sides).

Layouts and codecs meet pairwise rather than each with each. Where OpenSlide does not read a layout (strips, planes), tifffile
or the pixels themselves are the reference.
"""

import base64
from pathlib import Path
from typing import Any

import imagecodecs
import numpy as np
import openslide
import pytest
import tifffile

from tests.slides.make import Pixels, position_pixels, write_slide
from tests.slides.oracle import area_average, on_white
from tests.slides.vendors import (
    APERIO_RGB,
    APERIO_YCBCR,
    JPEG2000,
    Codec,
    jpeg2000_codec,
    jpeg_codec,
    write_aperio,
    write_encoded,
)
from udfs.wsi import ErrorCode, SlideError, open_slide

WIDTH, HEIGHT = 620, 530
JPEG_LOSS = 2  # grey levels; two versions of libjpeg-turbo may differ by rounding

CODECS: dict[str, Codec] = {
    "jpeg 4:4:4": jpeg_codec(subsampling=(1, 1)),
    "jpeg 4:2:2": jpeg_codec(subsampling=(2, 1)),
    "jpeg 4:2:0": jpeg_codec(subsampling=(2, 2)),
    "jpeg rgb": jpeg_codec(photometric="rgb"),
    "jpeg grey": jpeg_codec(photometric="minisblack"),
    "jpeg 4:2:0, shared tables": jpeg_codec(subsampling=(2, 2), shares_tables=True),
    "jpeg rgb, shared tables": jpeg_codec(photometric="rgb", shares_tables=True),
    "jpeg grey, shared tables": jpeg_codec(photometric="minisblack", shares_tables=True),
    "jpeg of quality 30": jpeg_codec(subsampling=(2, 2), quality=30),
    "aperio 33005": jpeg2000_codec(APERIO_RGB),
    "aperio 33003": jpeg2000_codec(APERIO_YCBCR, "ycbcr"),
    "deflate 32946": Codec(lambda block: bytes(imagecodecs.zlib_encode(block.tobytes())), 32946),
    "webp": Codec(lambda block: bytes(imagecodecs.webp_encode(block, lossless=True)), 50001),
    "zstd": Codec(lambda block: bytes(imagecodecs.zstd_encode(block.tobytes())), 50000),
    "packbits": Codec(lambda block: b"".join(imagecodecs.packbits_encode(row.tobytes()) for row in block), 32773),
    "jpeg2000": jpeg2000_codec(JPEG2000),
}
NOT_BY_OPENSLIDE = ("jpeg2000", "webp")  # JPEG 2000 beyond Aperio's
BLOCKS = [(16, 16), (240, 240), (256, 256), (512, 512), (256, 64), (48, 272)]  # width, height
PAIRS = [(name, BLOCKS[i % len(BLOCKS)]) for i, name in enumerate(CODECS)] + [
    ("jpeg 4:2:0", block) for block in BLOCKS if block != (256, 256)
]


@pytest.fixture(scope="module")
def tissue(pixels: Pixels) -> Pixels:
    return pixels[1600 : 1600 + HEIGHT, 900 : 900 + WIDTH]


def of_codec(image: Pixels, codec: Codec) -> Pixels:
    return image[..., 1:2] if codec.photometric == "minisblack" else image


def places(width: int, height: int, edge: int) -> list[tuple[int, int]]:
    """Corners over block, strip and level borders, partly and wholly outside."""
    fixed = [(0, 0), (200, 230), (width - edge, height - edge), (width - 30, -30), (-edge // 2, height - 30)]
    outside = [(-edge, -edge), (width, 0), (0, height + 1000)]
    random = np.random.default_rng(3).integers((-edge, -edge), (width, height), (4, 2))
    return fixed + outside + [(int(x), int(y)) for x, y in random]


def window(image: Pixels, x: int, y: int, edge: int) -> Pixels:
    padded = np.pad(on_white(image), ((edge, edge), (edge, edge), (0, 0)), constant_values=255)
    x, y = np.clip((x, y), -edge, (image.shape[1], image.shape[0])) + edge
    return padded[y : y + edge, x : x + edge]


def assert_tiles(path: Path, expected: Pixels, edge: int = 150, loss: int = 0) -> None:
    """Tiles of level 0 against an image of all of it."""
    with open_slide(str(path)) as slide:
        assert (slide.width_px, slide.height_px) == (expected.shape[1], expected.shape[0])
        corners = places(slide.width_px, slide.height_px, edge)
        tiles = dict(slide.read_tiles(corners, edge))
    assert sorted(tiles) == list(range(len(corners)))
    for i, (x, y) in enumerate(corners):
        difference = np.abs(tiles[i].astype(int) - window(expected, x, y, edge))
        assert difference.max() <= loss, f"tile at {x}, {y}"


def by_openslide(path: Path) -> Pixels:
    with openslide.OpenSlide(str(path)) as slide:
        return on_white(np.asarray(slide.read_region((0, 0), 0, slide.dimensions)))


@pytest.mark.parametrize(("name", "block"), PAIRS, ids=lambda part: str(part).replace(" ", ""))
def test_tiles_are_openslides(tissue: Pixels, tmp_path: Path, name: str, block: tuple[int, int]) -> None:
    codec = CODECS[name]
    path = tmp_path / "slide.tif"
    image = of_codec(tissue, codec)
    if name.startswith("aperio"):
        write_aperio(path, image, codec, block=block)
    else:
        write_encoded(path, image, codec, block=block)
    expected = image if name in NOT_BY_OPENSLIDE else by_openslide(path)
    if name.startswith(("jpeg ", "aperio 33003")):
        assert np.abs(expected.astype(int) - image).mean() < 12  # that the reference itself is right
    else:
        np.testing.assert_array_equal(expected, on_white(image))
    assert_tiles(path, expected, loss=JPEG_LOSS if name.startswith("jpeg ") else 0)


@pytest.mark.parametrize(
    "name", ["jpeg 4:2:2", "jpeg 4:2:0, shared tables", "jpeg grey", "jpeg rgb", "packbits", "zstd"]
)
def test_strips_are_tifffiles(tissue: Pixels, tmp_path: Path, name: str) -> None:
    """The last strip is as high as what is left: 530 = 5 * 96 + 50."""
    path = tmp_path / "slide.tif"
    write_encoded(path, of_codec(tissue, CODECS[name]), CODECS[name], block=(0, 96), strips=True)
    stored = tifffile.imread(path)
    assert_tiles(path, stored if stored.ndim == 3 else stored[..., None], loss=JPEG_LOSS if "jpeg" in name else 0)


def test_chroma_of_half_the_height_is_openslides(tissue: Pixels, tmp_path: Path) -> None:
    """4:4:0, as a camera turned by 90 degrees writes it; TIFF's own tag for it stays unwritten."""
    path = tmp_path / "slide.tif"
    write_encoded(path, tissue, Codec(jpeg_codec(subsampling=(1, 2)).encode, 7, "ycbcr"))
    assert_tiles(path, by_openslide(path), loss=JPEG_LOSS)


SUBSAMPLED_JPEG2000 = {
    "4:2:2": (
        "/0//UQAvAAAAAAAgAAAAIAAAAAAAAAAAAAAAIAAAACAAAAAAAAAAAAADBwEBBwIBBwIB/1IADAAAAAEABQQEAAH/XAATQEBISFBI"
        "SFBISFBISFBISFD/kAAKAAAAAAC8AAH/k8fUBAW/w+cEBr/A+EEHx9oFD6gIAzMEP4DD6gIEP8PqA4PnBg0AmQs9h8PqAgACZMHz"
        "goPnBAJnC5HB84OB8gQAIhnXA3/dX8HzhAAX19/3wPkCQPkBgBFd2mYDeH/A+QJAfCIANqGaxz2mNC/A+QMAIhzx8at/wPkCwHwh"
        "gBcswn4nKSELwHwiQDogX6fHiZ2sKT/AfCKANqF4cn/A+QPAOiAhbhDr6pFghCAnP//Z"
    ),
    "4:2:0": (
        "/0//UQAvAAAAAAAgAAAAIAAAAAAAAAAAAAAAIAAAACAAAAAAAAAAAAADBwEBBwICBwIC/1IADAAAAAEABQQEAAH/XAATQEBISFBI"
        "SFBISFBISFBISFD/kAAKAAAAAAC1AAH/k8fUBAW/w+cEBr/A+EEHx9oFD6gIAzMEP4CAw+oDg+cGDQCZCz2Hw+oCAAQ/wfOCh9QE"
        "BB8EP8Hzg4HyBAAiGdcDf91fwfOEAA0B/3/A+QJB84MACPEUfws9h8D5AkB8IgA2oZrHPaY0L8D5AgAiGghfwPkCQPkCABcslIgD"
        "f91fwHwiQDogX6fHiZ2sKT/AfCIANqGZv8D5A0B8IgAhbgzFTTc9pjRf/9k="
    ),
}
"""Blocks of 32 x 32 px whose chroma has fewer samples, as Aperio stores them, by OpenJPEG: a gradient, base64."""


@pytest.mark.parametrize("photometric", ["ycbcr", "rgb"])  # Aperio's own slides say RGB
@pytest.mark.parametrize("chroma", SUBSAMPLED_JPEG2000)
def test_subsampled_chroma_of_aperios_jpeg2000_is_openslides(tmp_path: Path, chroma: str, photometric: str) -> None:
    block = base64.b64decode(SUBSAMPLED_JPEG2000[chroma])
    path = tmp_path / "slide.svs"
    image = np.zeros((96, 64, 3), np.uint8)
    stored = Codec(lambda _: block, APERIO_YCBCR, photometric, (2, 2) if photometric == "ycbcr" else None)
    write_aperio(path, image, stored, levels=(), block=(32, 32))
    expected = by_openslide(path)
    assert len(np.unique(expected)) > 100
    assert_tiles(path, expected, edge=40, loss=1)  # rounded otherwise
    damaged = Codec(lambda _: block[:-80], APERIO_YCBCR, "ycbcr", (2, 2))
    write_aperio(path, image, damaged, levels=(), block=(32, 32))
    with open_slide(str(path)) as slide, pytest.raises(SlideError) as caught:
        list(slide.read_tiles([(0, 0)], 32))
    assert caught.value.code is ErrorCode.TILE_DATA_CORRUPT


@pytest.mark.parametrize("compression", [APERIO_YCBCR, 33004, APERIO_RGB, JPEG2000])
@pytest.mark.parametrize(
    ("photometric", "stored", "mct"),
    [
        ("rgb", "rgb", False),  # as Bio-Formats stores it
        ("rgb", "rgb", True),
        ("ycbcr", "ycbcr", False),
        ("ycbcr", "rgb", True),  # YCbCr is what the codestream makes of RGB, and unmakes again
    ],
)
def test_colours_of_jpeg2000_are_what_the_tag_says_and_the_codestream_undoes(
    tissue: Pixels, tmp_path: Path, compression: int, photometric: str, stored: str, mct: bool
) -> None:
    path = tmp_path / "slide.tif"
    write_encoded(path, tissue, jpeg2000_codec(compression, photometric, stored=stored, mct=mct))
    assert_tiles(path, tissue, loss=0 if stored == "rgb" else 2)  # rounded on the way to YCbCr and back


def test_a_jp2_file_in_a_block_says_its_own_colours(tissue: Pixels, tmp_path: Path) -> None:
    path = tmp_path / "slide.tif"
    codec = jpeg2000_codec(JPEG2000, "ycbcr", mct=False, file_format="jp2", colourspace="SYCC")
    write_encoded(path, tissue, codec)
    assert_tiles(path, tissue, loss=2)


@pytest.mark.parametrize(
    ("compression", "photometric", "stored"),
    [
        (APERIO_YCBCR, "rgb", "ycbcr"),  # as its scanners write it
        (APERIO_YCBCR, "ycbcr", "ycbcr"),
        (APERIO_RGB, "rgb", "rgb"),
        (APERIO_RGB, "ycbcr", "rgb"),
    ],
)
def test_of_aperios_own_slides_the_compression_says_the_colours(
    tissue: Pixels, tmp_path: Path, compression: int, photometric: str, stored: str
) -> None:
    path = tmp_path / "slide.svs"
    codec = jpeg2000_codec(compression, photometric, stored=stored, mct=False)
    write_aperio(path, tissue, codec)
    expected = by_openslide(path)
    assert np.abs(expected.astype(int) - tissue).max() <= 2
    assert_tiles(path, expected)


@pytest.mark.parametrize("tile_px", [96, None], ids=["tiles", "strips"])
def test_jpeg_of_colours_stored_apart_is_tifffiles(tissue: Pixels, tmp_path: Path, tile_px: int | None) -> None:
    path = write_slide(tmp_path / "slide.tif", tissue, planar=True, photometric="rgb", tile_px=tile_px)
    assert_tiles(path, np.moveaxis(tifffile.imread(path), 0, -1), loss=JPEG_LOSS)


LOSSLESS: list[dict[str, Any]] = [
    {"compression": "none", "tile_px": 16},
    {"compression": "none", "tile_px": None, "bigtiff": True},
    {"compression": "lzw", "tile_px": 240, "predictor": True},
    {"compression": "lzw", "planar": True, "tile_px": None, "rows_per_strip": 61},
    {"compression": "lzw", "subifds": True, "bigtiff": True},
    {"compression": "deflate", "tile_px": None, "rows_per_strip": 530, "predictor": True},
    {"compression": "deflate", "tile_px": 512, "subifds": True, "planar": True},
    {"compression": "packbits", "tile_px": 48},
    {"compression": "packbits", "planar": True, "bigtiff": True},
    {"compression": "zstd", "tile_px": 16, "predictor": True},
    {"compression": "zstd", "planar": True, "tile_px": None},
    {"compression": "jpeg2000", "tile_px": 240, "bigtiff": True},
]


@pytest.mark.parametrize("layout", LOSSLESS, ids=lambda layout: "-".join(str(value) for value in layout.values()))
def test_pixels_that_say_where_they_are_stand_there_on_every_level(tmp_path: Path, layout: dict[str, Any]) -> None:
    image = position_pixels(WIDTH, HEIGHT)
    if layout["compression"] == "jpeg2000":
        path = tmp_path / "slide.tif"
        with tifffile.TiffWriter(path, bigtiff=True) as writer:
            for downsample in (1, 2, 8):
                write_encoded(writer, area_average(image, downsample), CODECS["jpeg2000"], block=(240, 240))
    else:
        path = write_slide(tmp_path / "slide.tif", image, pyramid=True, levels=(2, 8), **layout)
    with open_slide(str(path)) as slide:
        assert [level.downsample for level in slide.levels] == [1, 2, 8]
        for level, downsample in enumerate((1, 2, 8)):
            stored = area_average(image, downsample)
            corners = [(x * downsample, y * downsample) for x, y in places(stored.shape[1], stored.shape[0], 70)]
            for i, tile in slide.read_tiles(corners, 70, level):
                x, y = (at // downsample for at in corners[i])
                np.testing.assert_array_equal(tile, window(stored, x, y, 70), err_msg=f"1/{downsample} at {x}, {y}")


@pytest.mark.parametrize(
    ("samples", "alpha"), [(2, "unassalpha"), (2, "assocalpha"), (4, "unassalpha"), (4, "assocalpha")]
)
@pytest.mark.parametrize(
    "layout", [{"compression": "lzw"}, {"compression": "zlib", "planarconfig": "separate"}], ids=str
)
def test_alpha_of_either_kind_lets_white_through(
    tissue: Pixels, tmp_path: Path, samples: int, alpha: str, layout: dict[str, Any]
) -> None:
    share = np.linspace(0, 1, WIDTH)[None, :, None].repeat(HEIGHT, axis=0)
    opacity = np.rint(share * 255).astype(np.uint8)
    colours = tissue[..., : samples - 1]
    seen = np.rint(colours * (opacity / 255)).astype(np.uint8) if alpha == "assocalpha" else colours
    path = tmp_path / "slide.tif"
    image = np.concatenate([seen, opacity], axis=2)
    if "planarconfig" in layout:
        image = np.ascontiguousarray(np.moveaxis(image, -1, 0))
    kind = "rgb" if samples == 4 else "minisblack"
    tifffile.imwrite(path, image, photometric=kind, extrasamples=[alpha], tile=(128, 128), **layout)
    exact = colours * (opacity / 255) + (255 - opacity.astype(float))
    expected = np.repeat(np.rint(exact).astype(np.uint8), 3 if samples == 2 else 1, axis=2)
    assert_tiles(path, expected, loss=1)  # premultiplied pixels were rounded before


@pytest.mark.parametrize("sparse", ["offset", "count"])
def test_blocks_left_out_are_white_and_one_block_may_serve_twice(tmp_path: Path, sparse: str) -> None:
    """As writers leave out glass (offset or count 0), or store it once for all places."""
    image = position_pixels(256, 256)
    path = write_slide(tmp_path / "slide.tif", image, compression="deflate", tile_px=64)
    with tifffile.TiffFile(path, mode="r+") as tiff:
        tags = tiff.pages.first.tags
        offsets, counts = list(tags["TileOffsets"].value), list(tags["TileByteCounts"].value)
        (offsets if sparse == "offset" else counts)[3] = 0
        offsets[9], counts[9] = offsets[6], counts[6]
        tags["TileOffsets"].overwrite(offsets)
        tags["TileByteCounts"].overwrite(counts)
    expected = image.copy()
    expected[:64, 192:] = 255
    expected[128:192, 64:128] = image[64:128, 128:192]
    assert_tiles(path, expected, edge=100)
    with open_slide(str(path)) as slide:
        np.testing.assert_array_equal(slide.downsampled(16), area_average(expected, 16))


GREY = {"photometric": "minisblack", "planarconfig": "contig"}


@pytest.mark.parametrize(
    ("kind", "fault"),
    [
        ({"compression": "lerc"}, "its compression is LERC; NONE, JPEG,"),
        ({"compression": "jpegxl"}, "its compression is JPEGXL; NONE, JPEG,"),
        ({"compression": "lzma"}, "its compression is LZMA; NONE, JPEG,"),
        ({"photometric": "miniswhite"}, "its photometric interpretation is MINISWHITE; RGB,"),
        ({"photometric": "separated", "extrasamples": []}, "its photometric interpretation is SEPARATED; RGB,"),
        ({"photometric": "cielab"}, "its photometric interpretation is CIELAB; RGB,"),
        ({"photometric": "ycbcr", "compression": "zlib"}, "its photometric interpretation is YCBCR with ADOBE_DEFLATE"),
        ({"dtype": "uint16"}, "it has 16 bits per sample; 8 are read"),
        ({"dtype": "float32"}, "it has 32 bits per sample; 8 are read"),
        ({"dtype": "int8"}, "its sample format is INT; unsigned integers are read"),
        ({"samples": 6}, "it has 6 samples per pixel; 1 to 4 are read"),
        (GREY | {"samples": 2}, "it has 2 channels, MINISBLACK samples"),
        (GREY | {"samples": 3}, "it has 3 channels, MINISBLACK samples"),
        (GREY | {"samples": 4, "compression": "zlib"}, "it has 4 channels, MINISBLACK samples"),
        ({"compression": "zlib", "predictor": 3, "dtype": "uint8"}, "its predictor is FLOATINGPOINT; NONE and"),
    ],
    ids=str,
)
def test_what_is_not_read_is_named(tmp_path: Path, kind: dict[str, Any], fault: str) -> None:
    options: dict[str, Any] = {"photometric": "rgb", "tile": (64, 64), "metadata": None} | kind
    samples = options.pop("samples", {"miniswhite": 1, "separated": 4}.get(options["photometric"], 3))
    image = np.ones((128, 128, samples), options.pop("dtype", "uint8"))
    path = tmp_path / "slide.tif"
    about = "Aperio Image Library v1\r\n128x128 (64x64)|MPP = 0.5"
    predictor = options.pop("predictor", None)
    stored = {"photometric": "rgb"} if options["photometric"] in ("cielab", "ycbcr") else {}
    tifffile.imwrite(path, image[..., 0] if samples == 1 else image, description=about, **(options | stored))
    with tifffile.TiffFile(path, mode="r+") as tiff:
        tags = tiff.pages.first.tags
        if stored:
            tags[262].overwrite(tifffile.PHOTOMETRIC[options["photometric"].upper()])
    if predictor:
        tifffile.imwrite(path, image, description=about, predictor=True, **options)
        with tifffile.TiffFile(path, mode="r+") as tiff:
            tiff.pages.first.tags[317].overwrite(predictor)
    message = refusal(path)
    for word in (str(path), "aperio", fault, "convert it"):
        assert word in message


def test_planes_in_the_depth_of_one_directory_are_named(tmp_path: Path) -> None:
    path = tmp_path / "slide.tif"
    volume = np.ones((16, 128, 128, 3), np.uint8)
    tifffile.imwrite(path, volume, photometric="rgb", volumetric=True, tile=(16, 64, 64), metadata=None)
    assert "it has 16 focal planes in one directory" in refusal(path)


def refusal(path: Path) -> str:
    with pytest.raises(SlideError) as caught:
        open_slide(str(path))
    assert caught.value.code is ErrorCode.UNSUPPORTED_FORMAT
    return caught.value.message
