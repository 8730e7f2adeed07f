"""Several pictures in one TIFF: refused where nothing tells which is the slide, read with a warning where one clearly is."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile

from tests.slides.make import Pixels, position_pixels
from tests.slides.ndpi import NdpiImage, write_ndpi
from tests.slides.oracle import area_average
from tests.slides.spacings import ome_image, ome_xml, physical_size
from tests.slides.vendors import (
    APERIO_RGB,
    jpeg2000_codec,
    jpeg_codec,
    write_aperio,
    write_bif,
    write_ome,
    write_philips,
)
from udfs.wsi import ErrorCode, SlideError, open_slide

WIDTH, HEIGHT = 1100, 1000
PLAIN: dict[str, Any] = {"photometric": "rgb", "compression": "zlib", "metadata": None}
TILES, STRIPS = {"tile": (128, 128)}, {"rowsperstrip": 64}


@pytest.fixture(scope="module")
def image() -> Pixels:
    return position_pixels(WIDTH, HEIGHT)


def write_pages(path: Path, *pages: tuple[Pixels, dict[str, Any]]) -> Path:
    with tifffile.TiffWriter(path) as writer:
        for pixels, options in pages:
            kind = {"photometric": "minisblack"} if pixels.ndim == 2 else {}
            writer.write(np.ascontiguousarray(pixels), **(PLAIN | kind | options))
    return path


def pyramid(pixels: Pixels, *downsamples: int) -> list[tuple[Pixels, dict[str, Any]]]:
    return [(pixels, TILES), *((area_average(pixels, d), TILES | {"subfiletype": 1}) for d in downsamples)]


def assert_refused(path: Path, count: int) -> None:
    with pytest.raises(SlideError) as caught:
        open_slide(str(path))
    assert caught.value.code is ErrorCode.UNSUPPORTED_FORMAT
    for said in (str(path), f"it holds {count} pictures", "channels", "Write each to a file of its own"):
        assert said in caught.value.message


def assert_read(path: Path, image: Pixels, warnings: Sequence[str] = ()) -> None:
    with open_slide(str(path)) as slide:
        assert slide.warnings == tuple(warnings)
        [(_, tile)] = slide.read_tiles([(100, 200)], 300)
    np.testing.assert_array_equal(tile, image[200:500, 100:400])


def test_two_sections_are_refused(image: Pixels, tmp_path: Path) -> None:
    """Each with its levels, which are no pictures of their own."""
    section = np.ascontiguousarray(image[:940, :1010])
    assert_refused(write_pages(tmp_path / "a.tif", *pyramid(image, 2, 4), *pyramid(section, 2, 4)), 2)
    assert_refused(write_pages(tmp_path / "b.tif", *pyramid(section), *pyramid(image), *pyramid(section[::-1])), 3)
    assert_refused(write_pages(tmp_path / "strips.tif", (image, STRIPS), (section, STRIPS)), 2)


def test_a_picture_in_strips_beside_a_slide_in_tiles_is_worth_a_warning(image: Pixels, tmp_path: Path) -> None:
    warning = "it holds 2 pictures: the largest, of 1100 x 1000 px, is read, the next is one of 1100 x 800 px"
    assert_read(write_pages(tmp_path / "a.tif", (~image[:800], STRIPS), *pyramid(image, 2)), image, [warning])


def test_a_far_smaller_picture_is_no_slide_but_worth_a_warning(image: Pixels, tmp_path: Path) -> None:
    small = ~image[:300, :450]
    warning = "it holds 2 pictures: the largest, of 1100 x 1000 px, is read, the next is one of 450 x 300 px"
    assert_read(write_pages(tmp_path / "a.tif", *pyramid(image, 2), (small, TILES)), image, [warning])
    assert_read(write_pages(tmp_path / "b.tif", (small, STRIPS), *pyramid(image, 2)), image, [warning])


@pytest.mark.parametrize("planes", [2, 3, 260])
@pytest.mark.parametrize("layout", [TILES, STRIPS], ids=["tiles", "strips"])
def test_planes_of_one_size_are_refused(tmp_path: Path, planes: int, layout: dict[str, Any]) -> None:
    plane = position_pixels(140, 130)
    assert_refused(write_pages(tmp_path / "slide.tif", *[(plane, layout)] * planes), planes)


def test_planes_level_by_level_are_refused(image: Pixels, tmp_path: Path) -> None:
    planes = [image, ~image, image[::-1]]
    levels = [(area_average(plane, d), TILES) for d in (1, 4) for plane in planes]
    assert_refused(write_pages(tmp_path / "slide.tif", *levels), 3)


def test_channels_beside_one_another_are_refused(image: Pixels, tmp_path: Path) -> None:
    channels = [(image[..., i], TILES) for i in range(3)]
    assert_refused(write_pages(tmp_path / "slide.tif", *channels), 3)


@pytest.mark.parametrize(("axes", "shape"), [("CYX", (3,)), ("ZYXS", (5,)), ("TYXS", (2,)), ("TZYXS", (2, 3))])
def test_channels_focal_planes_and_time_points_of_ome_are_refused(
    tmp_path: Path, axes: str, shape: tuple[int, ...]
) -> None:
    plane = position_pixels(260, 200)
    pixels = np.broadcast_to(
        plane if axes.endswith("S") else plane[..., 0], (*shape, *plane.shape[: len(axes) - len(shape)])
    )
    path = write_ome(tmp_path / "slide.ome.tif", [np.ascontiguousarray(pixels)], levels=(2,), axes=axes)
    assert_refused(path, int(np.prod(shape)))


def test_series_of_ome(image: Pixels, tmp_path: Path) -> None:
    """A series in the shape of a level of another is no level of it."""
    half = area_average(~image, 2)
    assert_refused(write_ome(tmp_path / "a.ome.tif", [image, ~image]), 2)
    assert_refused(write_ome(tmp_path / "b.ome.tif", [half, image, ~image[:800]]), 3)
    warning = "it holds 2 pictures: the largest, of 1100 x 1000 px, is read, the next is one of 550 x 500 px"
    assert_read(write_ome(tmp_path / "c.ome.tif", [half, image]), image, [warning])


def test_label_and_macro_of_ome_are_no_pictures(image: Pixels, tmp_path: Path) -> None:
    added = [~image[:400, :300], ~image[:300, :800]]
    path = write_ome(tmp_path / "slide.ome.tif", [image, *added], names=["tissue", "label image", "macro image"])
    assert_read(path, image)


@pytest.mark.parametrize("name", ["Labelled HE 12", "Macrophage_CD68_12.svs", "overview of HE", "Thumbnails"])
def test_an_ome_name_that_only_begins_like_a_label_is_a_slides(image: Pixels, tmp_path: Path, name: str) -> None:
    assert_refused(write_ome(tmp_path / "a.ome.tif", [image, ~image[:900]], names=[name, "other"]), 2)
    added = [~image[:900], ~image[:300], ~image[:, :900]]
    names = [name, "Label", " macro image ", "THUMBNAIL"]
    assert_read(write_ome(tmp_path / "b.ome.tif", [image, *added], names=names), image)


@pytest.mark.parametrize(
    "plane",
    ['<TiffData IFD="0"><UUID FileName="b.ome.tif">urn:b</UUID></TiffData>', "<TiffData/>", '<TiffData IFD="x"/>'],
)
def test_a_label_in_another_file_is_no_directory_of_this_one(image: Pixels, tmp_path: Path, plane: str) -> None:
    def named(name: str, planes: str, spacing: float) -> str:
        return ome_image(physical_size(spacing, spacing), planes, edge_px=1).replace(
            "<Image ", f'<Image Name="{name}" '
        )

    here = '<TiffData IFD="0"><UUID FileName="a.ome.tif">urn:a</UUID></TiffData>'
    xml = ome_xml(named("slide", here, 0.25), named("label image", plane, 10.0))
    other = (area_average(~image, 4), TILES)
    path = write_pages(tmp_path / "a.ome.tif", (image, TILES | {"description": xml.encode()}), other)
    assert_read(path, image)


@pytest.mark.parametrize(
    "about", ["Scanner X v1\nLabel: HE 12", "Scanner\r\nMacro\r\n", "Labelled", "a\n" * 9000 + "Label", "labels: 3"]
)
def test_a_description_with_a_field_such_as_label_is_a_slides(image: Pixels, tmp_path: Path, about: str) -> None:
    [(pixels, options), level] = pyramid(image, 2)
    path = write_pages(tmp_path / "a.tif", (pixels, options | {"description": about}), level)
    assert_read(path, image)


@pytest.mark.parametrize(
    "about", ["Label Image", "Label_Image", "macro", "Overview: 1", "Aperio Image Library v12\r\nlabel 1100x900"]
)
def test_a_description_that_begins_with_label_is_none(image: Pixels, tmp_path: Path, about: str) -> None:
    added = (~image[:900], TILES | {"description": about})
    assert_read(write_pages(tmp_path / "a.tif", added, *pyramid(image, 2)), image)


def test_the_largest_picture_is_not_left_out_without_a_warning(image: Pixels, tmp_path: Path) -> None:
    warning = (
        "its picture of 1100 x 1000 px is the largest, but is called a label, a macro image, a mask or the like: it is not "
        "read"
    )
    small = np.ascontiguousarray(~image[:600, :500])
    assert_read(
        write_pages(tmp_path / "a.tif", (image, TILES | {"description": "Macro"}), (small, TILES)), small, [warning]
    )


def padded(pixels: Pixels, downsample: int, edge: int = 128) -> Pixels:
    level = area_average(pixels, downsample)
    height, width = (-n % edge for n in level.shape[:2])
    return np.pad(level, ((0, height), (0, width), (0, 0)), constant_values=255)


def test_levels_that_are_padded_to_whole_tiles_are_no_sections(tmp_path: Path) -> None:
    """They are no levels either; not marked as smaller copies, they are worth a warning."""
    image = position_pixels(1100, 1300)
    levels = [padded(image, 2), padded(image, 4)]
    assert levels[0].shape[:2] == (768, 640)
    warning = "it holds 3 pictures: the largest, of 1100 x 1300 px, is read, the next is one of 640 x 768 px"
    path = write_pages(tmp_path / "a.tif", (image, TILES), *[(level, TILES) for level in levels])
    assert_read(path, image, [warning])
    marked = [(level, TILES | {"subfiletype": 1}) for level in levels]
    assert_read(write_pages(tmp_path / "b.tif", (image, TILES), *marked), image)
    cut = [(np.ascontiguousarray(level[:-128, :-128]), TILES | {"subfiletype": 1}) for level in levels]
    assert_read(write_pages(tmp_path / "c.tif", (image, TILES), *cut), image)


@pytest.mark.parametrize("size", [(1000, 960), (900, 1100), (1024, 1024)])
def test_a_mark_of_a_smaller_copy_does_not_hide_a_section(image: Pixels, tmp_path: Path, size: tuple[int, int]) -> None:
    section = np.resize(~image, (*size, 3))
    assert_refused(write_pages(tmp_path / "a.tif", (image, TILES), (section, TILES | {"subfiletype": 1})), 2)


@pytest.mark.parametrize("size", [(1000, 1200), (1100, 2600)])
def test_a_macro_in_strips_larger_than_the_slide_in_tiles_is_not_the_slide(
    image: Pixels, tmp_path: Path, size: tuple[int, int]
) -> None:
    macro = np.resize(~image, (*size, 3))
    warning = (
        "it holds 2 pictures: the largest in tiles, of 1100 x 1000 px, is read, the largest in strips has "
        f"{size[1]} x {size[0]} px"
    )
    assert_read(write_pages(tmp_path / "a.tif", (macro, STRIPS), *pyramid(image, 2)), image, [warning])


def test_a_slide_in_strips_is_not_its_level_in_tiles(image: Pixels, tmp_path: Path) -> None:
    path = write_pages(tmp_path / "a.tif", (area_average(image, 4), TILES), (image, STRIPS))
    assert_read(path, image)


@pytest.mark.parametrize("is_first", [False, True])
@pytest.mark.parametrize("channel", [1, 2])
def test_a_mask_in_grey_is_no_section_of_a_slide_in_colour(
    image: Pixels, tmp_path: Path, is_first: bool, channel: int
) -> None:
    mask = (image[: 1000 - 2 * channel, :, channel], TILES)
    size = f"{WIDTH} x {1000 - 2 * channel} px"
    warning = f"it holds 2 pictures: the largest, of 1100 x 1000 px, is read, the next is one of {size}"
    pages = [*pyramid(image, 2)]
    path = write_pages(tmp_path / "a.tif", *([mask, *pages] if is_first else [*pages, mask]))
    assert_read(path, image, [warning])
    whole = (image[..., channel], TILES)
    path = write_pages(tmp_path / "b.tif", *([whole, *pages] if is_first else [*pages, whole]))
    assert_read(path, image, [warning.replace(size, "1100 x 1000 px")])


@pytest.mark.parametrize("axes", ["ZCYX", "TYXS"])
def test_stacks_of_imagej_are_refused(tmp_path: Path, axes: str) -> None:
    shape = {"ZCYX": (4, 3, 120, 150), "TYXS": (5, 120, 150, 3)}[axes]
    path = tmp_path / "slide.tif"
    tifffile.imwrite(path, np.ones(shape, np.uint8), imagej=True, metadata={"axes": axes})
    assert_refused(path, 12 if axes == "ZCYX" else 5)


@pytest.mark.parametrize("kind", ["imagej", "shaped"])
def test_planes_behind_the_only_directory_are_refused(tmp_path: Path, kind: str) -> None:
    """ImageJ stores stacks of more than 4 GB so: planes without directories, which the description counts."""
    path = tmp_path / "slide.tif"
    planes = np.ones((7, 120, 150, 3), np.uint8)
    if kind == "shaped":
        tifffile.imwrite(path, planes, photometric="rgb", truncate=True)
    else:
        about = "ImageJ=1.53t\nimages=7\nslices=7\n"
        tifffile.imwrite(path, planes[0], photometric="rgb", metadata=None, description=about, rowsperstrip=120)
        path.write_bytes(path.read_bytes() + planes[1:].tobytes())
    assert_refused(path, 7)


def test_what_scanners_add_is_no_picture(image: Pixels, tmp_path: Path) -> None:
    with open_slide(str(write_aperio(tmp_path / "slide.svs", image, jpeg2000_codec(APERIO_RGB)))) as slide:
        assert slide.warnings == ()
    with open_slide(str(write_bif(tmp_path / "slide.bif", image, jpeg_codec()))) as slide:
        assert slide.warnings == ()
    with open_slide(str(write_philips(tmp_path / "slide.tiff", image, jpeg_codec()))) as slide:
        assert slide.warnings == ()


def test_an_aperio_thumbnail_may_lack_its_description(image: Pixels, tmp_path: Path) -> None:
    about = "Aperio Image Library v12.0.15\r\n1100x1000 (128x128)|MPP = 0.5"
    path = write_pages(
        tmp_path / "slide.svs",
        (image, TILES | {"description": about}),
        (~image[:900], STRIPS),
        (area_average(image, 4), TILES | {"description": about}),
    )
    with open_slide(str(path)) as slide:
        assert slide.warnings == ()
        assert [level.downsample for level in slide.levels] == [1, 4]


def test_thumbnail_overview_and_label_of_perkinelmer_are_no_pictures(image: Pixels, tmp_path: Path) -> None:
    def about(kind: str) -> dict[str, str]:
        xml = f"<PerkinElmer-QPI-ImageDescription><ImageType>{kind}</ImageType></PerkinElmer-QPI-ImageDescription>"
        return {"description": f'<?xml version="1.0"?>{xml}'}

    path = write_pages(
        tmp_path / "slide.qptiff",
        (image, TILES | about("FullResolution")),
        (area_average(image, 4), STRIPS | about("Thumbnail")),
        (area_average(image, 2), TILES | about("ReducedResolution")),
        (~image[:900], TILES | about("Overview")),
        (~image[:, :800], TILES | about("Label")),
    )
    assert_read(path, image)
    with open_slide(str(path)) as slide:
        assert [level.downsample for level in slide.levels] == [1, 2]


def test_of_hamamatsus_focal_planes_the_middle_one_with_a_warning(image: Pixels, tmp_path: Path) -> None:
    tissue: Pixels = np.ascontiguousarray(image[:512, :512])
    planes = [
        NdpiImage(tissue if plane == 0 else np.bitwise_not(tissue), 20.0, focal_plane=plane)
        for plane in (-2000, 0, 2000)
    ]
    write_ndpi(tmp_path / "slide.ndpi", planes)
    with open_slide(str(tmp_path / "slide.ndpi")) as slide:
        assert slide.warnings == ("it has 3 focal planes: the middle one is read",)
        assert (slide.width_px, slide.height_px) == (512, 512)
