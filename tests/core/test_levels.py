"""Which directories are levels of the slide, and in which frame: files of many writers that hold pictures beside them."""

from collections.abc import Callable
from pathlib import Path

import imagecodecs
import numpy as np
import openslide
import pytest
import pyvips
import tifffile

from tests.slides.make import Pixels, position_pixels, write_slide
from tests.slides.oracle import area_average, on_white
from tests.slides.vendors import (
    APERIO_RGB,
    Codec,
    jpeg2000_codec,
    jpeg_codec,
    write_aperio,
    write_bif,
    write_encoded,
    write_ome,
    write_philips,
    write_trestle,
)
from udfs.wsi import ErrorCode, SlideError, open_slide

WIDTH, HEIGHT = 1100, 1000
DEFLATE = Codec(lambda block: bytes(imagecodecs.zlib_encode(block.tobytes())), 8)
APERIO = jpeg2000_codec(APERIO_RGB)
Shrink = Callable[[Pixels], Pixels]


@pytest.fixture(scope="module")
def image() -> Pixels:
    return position_pixels(WIDTH, HEIGHT)


def negative_of(image: Pixels) -> Pixels:
    return np.bitwise_not(image)


def levels_of(path: Path) -> list[tuple[int, int, float]]:
    with open_slide(str(path)) as slide:
        return [(level.width_px, level.height_px, level.downsample) for level in slide.levels]


def assert_levels(path: Path, image: Pixels, downsamples: tuple[int, ...]) -> None:
    """These levels and no others, each pixel of each where it belongs."""
    with open_slide(str(path)) as slide:
        assert tuple(level.downsample for level in slide.levels) == downsamples
        assert (slide.width_px, slide.height_px) == (image.shape[1], image.shape[0])
        for level, downsample in enumerate(downsamples):
            stored = area_average(image, downsample)
            assert (slide.levels[level].height_px, slide.levels[level].width_px) == stored.shape[:2]
            edge = min(stored.shape[:2])
            right, bottom = stored.shape[1] - edge, stored.shape[0] - edge
            corners = [(0, 0), (right * downsample, bottom * downsample)]
            tiles = dict(slide.read_tiles(corners, edge, level))
            np.testing.assert_array_equal(tiles[0], stored[:edge, :edge], err_msg=f"1/{downsample}")
            np.testing.assert_array_equal(tiles[1], stored[bottom:, right:], err_msg=f"1/{downsample}")


def test_of_an_aperio_slide_just_the_tiled_levels(image: Pixels, tmp_path: Path) -> None:
    """Thumbnail, label and macro lie between and behind them."""
    path = write_aperio(tmp_path / "slide.svs", image, APERIO)
    with openslide.OpenSlide(str(path)) as reference:
        assert set(reference.associated_images) == {"thumbnail", "label", "macro"}
        assert reference.level_count == 3
    assert_levels(path, image, (1, 4, 16))


@pytest.mark.parametrize("is_macro_tiled", [False, True], ids=["strips", "tiles"])
@pytest.mark.parametrize("shrinks", [2, 8], ids=["bigger than a level", "smaller"])
def test_a_macro_of_the_slides_own_shape_is_no_level(
    image: Pixels, tmp_path: Path, shrinks: int, is_macro_tiled: bool
) -> None:
    macro = np.full_like(area_average(image, shrinks), 99)
    path = write_aperio(tmp_path / "slide.svs", image, APERIO, macro=macro, is_macro_tiled=is_macro_tiled)
    assert_levels(path, image, (1, 4, 16))


@pytest.mark.parametrize("is_macro_tiled", [False, True], ids=["strips", "tiles"])
def test_a_macro_larger_than_the_slide_is_not_the_slide(image: Pixels, tmp_path: Path, is_macro_tiled: bool) -> None:
    macro = np.full((HEIGHT + 200, WIDTH + 200, 3), 99, np.uint8)
    path = write_aperio(tmp_path / "slide.svs", image, APERIO, macro=macro, is_macro_tiled=is_macro_tiled)
    assert_levels(path, image, (1, 4, 16))


def test_an_aperio_description_over_another_pyramid(image: Pixels, tmp_path: Path) -> None:
    """A slide converted by libvips keeps its description, though thumbnail and all are gone."""
    about = "Aperio Image Library v12.0.15\r\n1100x1000 (240x240) |AppMag = 20|MPP = 0.5000"
    path = write_slide(
        tmp_path / "slide.svs", image, compression="deflate", pyramid=True, levels=(2, 4, 8), description=about
    )
    assert_levels(path, image, (1, 2, 4, 8))
    with open_slide(str(path)) as slide:
        assert (slide.vendor, slide.mpp_x) == ("aperio", 0.5)


@pytest.mark.parametrize("second", ["none", "half the size"])
def test_of_ome_series_the_largest_with_its_subifds(image: Pixels, tmp_path: Path, second: str) -> None:
    others: dict[str, list[Pixels]] = {"none": [], "half the size": [area_average(~image, 2)]}
    path = write_ome(tmp_path / "slide.ome.tif", [image, *others[second]])
    with tifffile.TiffFile(path) as tiff:
        assert tiff.is_ome
        assert len(tiff.series) == 1 + len(others[second])
    assert_levels(path, image, (1, 2, 4))


def test_a_macro_before_the_slide_in_an_ome_file(image: Pixels, tmp_path: Path) -> None:
    assert_levels(write_ome(tmp_path / "slide.ome.tif", [~image[:300, :400], image]), image, (1, 2, 4))


@pytest.mark.parametrize("depth", ["onetile", "onepixel"])
@pytest.mark.parametrize("subifd", [False, True], ids=["pages", "subifds"])
@pytest.mark.parametrize("size", [(1100, 1000), (1077, 997)], ids=str)
def test_every_level_of_a_libvips_pyramid(tmp_path: Path, depth: str, subifd: bool, size: tuple[int, int]) -> None:
    image = position_pixels(*size)
    path = tmp_path / "slide.tif"
    options = {"tile": True, "tile_width": 128, "tile_height": 128, "compression": "deflate"}
    pyvips.Image.new_from_array(image).tiffsave(str(path), pyramid=True, subifd=subifd, depth=depth, **options)
    count = {"onetile": 5, "onepixel": 11}[depth]
    levels = levels_of(path)
    assert levels == [(size[0] >> i, size[1] >> i, 2**i) for i in range(len(levels))]
    assert count - 1 <= len(levels) <= count
    with open_slide(str(path)) as slide:
        for level, (width, height, _) in enumerate(levels):
            page = {"subifd": level - 1} if subifd and level else {"page": level}
            stored = pyvips.Image.new_from_file(str(path), **page).numpy()[..., :3]
            [(_, tile)] = slide.read_tiles([(0, 0)], min(width, height), level)
            np.testing.assert_array_equal(tile, stored[: min(width, height), : min(width, height)])


@pytest.mark.parametrize("compression", ["jpeg", "webp"])
def test_a_libvips_pyramid_with_loss(pixels: Pixels, tmp_path: Path, compression: str) -> None:
    path = tmp_path / "slide.tif"
    tissue = pixels[1408:2308, 768:1568]
    image = pyvips.Image.new_from_array(np.ascontiguousarray(tissue))
    image.tiffsave(str(path), tile=True, pyramid=True, compression=compression, Q=90)
    with open_slide(str(path)) as slide:
        assert [level.downsample for level in slide.levels] == [1, 2, 4, 8]
        for level, downsample in enumerate((1, 2, 4, 8)):
            stored = pyvips.Image.new_from_file(str(path), page=level).numpy()
            [(_, tile)] = slide.read_tiles([(0, 0)], 800 // downsample, level)
            difference = np.abs(tile.astype(int) - stored[: 800 // downsample])
            assert difference.max() <= 2


def halved_down(image: Pixels) -> Pixels:
    return image[: image.shape[0] // 2 * 2 : 2, : image.shape[1] // 2 * 2 : 2]


def halved_up(image: Pixels) -> Pixels:
    return image[::2, ::2]


@pytest.mark.parametrize("shrink", [halved_down, halved_up], ids=lambda shrink: shrink.__name__)
@pytest.mark.parametrize("size", [(1100, 1000), (531, 402), (1023, 769), (33, 4097), (2049, 63)], ids=str)
def test_halved_levels_have_whole_downsamples(tmp_path: Path, shrink: Shrink, size: tuple[int, int]) -> None:
    """Down to 1/32, where the edges of a small level are far from a 32nd of the slide's."""
    image = position_pixels(*size)
    path = tmp_path / "slide.tif"
    with tifffile.TiffWriter(path) as writer:
        level = image
        for _ in range(6):
            write_encoded(writer, np.ascontiguousarray(level), DEFLATE, block=(64, 64))
            level = shrink(level)
    assert [downsample for _, _, downsample in levels_of(path)] == [1, 2, 4, 8, 16, 32]
    with open_slide(str(path)) as slide:
        [(_, tile)] = slide.read_tiles([(32 * 5, 32 * 3)], 1, 5)
        expected = image[32 * 3, 32 * 5] if size[0] > 192 and size[1] > 128 else (255, 255, 255)
        np.testing.assert_array_equal(tile[0, 0], expected)


@pytest.mark.parametrize("downsamples", [(1, 3, 9), (1, 5, 10), (1, 4, 16, 32)], ids=str)
def test_other_whole_downsamples_stay_what_they_are(
    image: Pixels, tmp_path: Path, downsamples: tuple[int, ...]
) -> None:
    path = write_slide(tmp_path / "slide.tif", image, compression="lzw", pyramid=True, levels=downsamples[1:])
    assert_levels(path, image, downsamples)


@pytest.mark.parametrize("lists_macro", [False, True], ids=["the slide", "macro first"])
def test_levels_of_a_philips_slide_are_cut_to_the_slide(image: Pixels, tmp_path: Path, lists_macro: bool) -> None:
    """They are padded to whole tiles, which makes their shape another than the slide's."""
    path = write_philips(tmp_path / "slide.tiff", image, jpeg_codec(), doublings=4, lists_macro=lists_macro)
    with openslide.OpenSlide(str(path)) as reference:
        assert reference.properties["openslide.vendor"] == "philips"
        assert "macro" in reference.associated_images
        with open_slide(str(path)) as slide:
            assert slide.vendor.lower() == "philips"
            assert slide.mpp_x == pytest.approx(0.25)
            assert [level.downsample for level in slide.levels] == [1, 2, 4, 8, 16]
            for level, downsample in enumerate((1, 2, 4, 8, 16)):
                size = slide.levels[level].width_px, slide.levels[level].height_px
                assert size == reference.level_dimensions[level] == (1536 // downsample, 1024 // downsample)
                [(_, tile)] = slide.read_tiles([(0, 0)], 1024 // downsample, level)
                edge = (1024 // downsample, 1024 // downsample)
                expected = on_white(np.asarray(reference.read_region((0, 0), level, edge)))
                np.testing.assert_array_equal(tile, expected)


@pytest.mark.parametrize("overlaps", ["64 48 32 24", "0 0 16 16", "00 64"])
def test_trestle_tiles_that_overlap_are_refused(image: Pixels, tmp_path: Path, overlaps: str) -> None:
    path = write_trestle(tmp_path / "slide.tif", image, overlaps=overlaps)
    with openslide.OpenSlide(str(path)) as reference:
        assert reference.properties["openslide.vendor"] == "trestle"
        assert reference.dimensions != (WIDTH, HEIGHT) or overlaps.startswith("0 ")  # it reads them side over side
    assert_refused_for_overlaps(path, "trestle")


@pytest.mark.parametrize("overlaps", ["0 0 0 0", None])
def test_trestle_tiles_side_by_side_are_read(image: Pixels, tmp_path: Path, overlaps: str | None) -> None:
    path = write_trestle(tmp_path / "slide.tif", image, overlaps=overlaps)
    assert_levels(path, image, (1, 2))
    with openslide.OpenSlide(str(path)) as reference:
        assert reference.properties["openslide.vendor"] == "trestle"
        assert reference.dimensions == (WIDTH, HEIGHT)


@pytest.mark.parametrize("overlap_px", [12, -3])
def test_ventana_tiles_that_overlap_are_refused(image: Pixels, tmp_path: Path, overlap_px: int) -> None:
    assert_refused_for_overlaps(
        write_bif(tmp_path / "slide.bif", image, jpeg_codec(), overlap_px=overlap_px), "ventana"
    )


def assert_refused_for_overlaps(path: Path, vendor: str) -> None:
    with pytest.raises(SlideError, match="overlap") as caught:
        open_slide(str(path))
    assert caught.value.code is ErrorCode.UNSUPPORTED_FORMAT
    for said in (str(path), f"vendor: {vendor}", "convert"):
        assert said in caught.value.message


def test_ventana_tiles_side_by_side_are_read(image: Pixels, tmp_path: Path) -> None:
    path = write_bif(tmp_path / "slide.bif", image, DEFLATE)
    assert_levels(path, image, (1, 2))
    with open_slide(str(path)) as slide:
        assert slide.vendor == "ventana"


def test_a_mask_of_the_slides_shape_is_no_level(image: Pixels, tmp_path: Path) -> None:
    path = tmp_path / "slide.tif"
    with tifffile.TiffWriter(path) as writer:
        for level in (image, area_average(image, 2)):
            write_encoded(writer, level, DEFLATE, subfiletype=1)
    with tifffile.TiffFile(path, mode="r+") as tiff:
        tiff.pages[1].aspage().tags["NewSubfileType"].overwrite(1 | 4)
    assert levels_of(path) == [(WIDTH, HEIGHT, 1)]


def test_a_level_that_is_not_read_is_named(image: Pixels, tmp_path: Path) -> None:
    path = tmp_path / "slide.tif"
    with tifffile.TiffWriter(path) as writer:
        write_encoded(writer, image, DEFLATE)
        for downsample, compression in ((2, "lzma"), (4, "zlib")):
            level = area_average(image, downsample)
            writer.write(level, tile=(128, 128), compression=compression, photometric="rgb", metadata=None)
    assert_levels(path, image, (1, 4))
    with open_slide(str(path)) as slide:
        [warning] = slide.warnings
    assert warning.startswith("its level of 550 x 500 px is not read: ") and "LZMA" in warning


def test_a_level_beyond_the_end_of_the_file_is_named(image: Pixels, tmp_path: Path) -> None:
    """Level 0 is read; if it lies beyond the end, the file is refused."""
    for directory in (1, 0):
        path = tmp_path / f"{directory}.tif"
        with tifffile.TiffWriter(path) as writer:
            for downsample in (1, 2, 4):
                write_encoded(writer, area_average(image, downsample), DEFLATE)
        with tifffile.TiffFile(path, mode="r+") as tiff:
            page = tiff.pages[directory].aspage()
            page.tags["TileOffsets"].overwrite([*page.dataoffsets[:-1], 10**8])
        if directory:
            assert_levels(path, image, (1, 4))
            with open_slide(str(path)) as slide:
                [warning] = slide.warnings
            assert warning.startswith("its level of 550 x 500 px is not read: the file has") and "to 100,0" in warning
        else:
            with pytest.raises(SlideError) as caught:
                open_slide(str(path))
            assert caught.value.code is ErrorCode.FILE_TRUNCATED


@pytest.mark.parametrize("compression", ["zlib", "jpeg"])
def test_rgb_under_the_number_of_grey_is_rgb(image: Pixels, tmp_path: Path, compression: str) -> None:
    """Three samples, none of them extra; OpenSlide reads it, too."""
    path = tmp_path / "slide.tif"
    tifffile.imwrite(path, image, photometric="rgb", tile=(128, 128), compression=compression, metadata=None)
    with tifffile.TiffFile(path, mode="r+") as tiff:
        tiff.pages.first.tags["PhotometricInterpretation"].overwrite(1)
    with open_slide(str(path)) as slide:
        [(_, tile)] = slide.read_tiles([(100, 200)], 300)
    if compression == "zlib":
        np.testing.assert_array_equal(tile, image[200:500, 100:400])
    assert tile.shape == (300, 300, 3)
