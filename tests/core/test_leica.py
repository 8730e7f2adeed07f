"""Leica SCN: the area that was scanned is the slide; several are refused, whatever the XML lacks."""

from pathlib import Path

import numpy as np
import openslide
import pytest

from tests.slides.make import Pixels, position_pixels
from tests.slides.oracle import area_average, on_white
from tests.slides.spacings import ScnImage, write_scn
from udfs.wsi import ErrorCode, SlideError, open_slide

AREA = position_pixels(512, 384)
MACRO = ScnImage(np.bitwise_not(position_pixels(200, 584)), None)
LARGE_MACRO = ScnImage(np.bitwise_not(position_pixels(640, 1280)), None)  # of more pixels than the area
BELOW = (3_000_000, 39_000_000)


def assert_is_the_area(path: Path) -> None:
    with open_slide(str(path)) as slide:
        assert (slide.vendor, slide.mpp_x, slide.mpp_y) == ("leica", 0.25, 0.25)
        assert [level.downsample for level in slide.levels] == [1, 4]
        for level, downsample in enumerate((1, 4)):
            [(_, tile)] = slide.read_tiles([(0, 0)], 384 // downsample, level)
            expected = area_average(AREA, downsample)[: 384 // downsample, : 384 // downsample]
            np.testing.assert_array_equal(tile, expected)


def refusal(path: Path) -> SlideError:
    with pytest.raises(SlideError) as caught:
        open_slide(str(path))
    assert str(path) in caught.value.message and "leica" in caught.value.message
    return caught.value


@pytest.mark.parametrize(
    "images",
    [
        [MACRO, ScnImage(AREA)],
        [ScnImage(AREA), MACRO],
        [LARGE_MACRO, ScnImage(AREA)],
        [ScnImage(AREA)],
        [MACRO, LARGE_MACRO, ScnImage(AREA)],  # fluorescence slides have two
    ],
    ids=["macro first", "macro last", "macro larger", "no macro", "two macros"],
)
def test_the_area_is_the_slide(tmp_path: Path, images: list[ScnImage]) -> None:
    path = write_scn(tmp_path / "slide.scn", images)
    assert_is_the_area(path)
    with open_slide(str(path)) as slide:
        assert slide.warnings == ()


@pytest.mark.parametrize(
    "without", [["aperture"], ["source"], ["objective"], ["device", "creationDate", "aperture"]], ids=str
)
def test_elements_that_nobody_needs_may_be_missing(tmp_path: Path, without: list[str]) -> None:
    assert_is_the_area(write_scn(tmp_path / "slide.scn", [MACRO, ScnImage(AREA)], without=without))


def test_pixels_are_openslides_on_its_canvas(tmp_path: Path) -> None:
    path = write_scn(tmp_path / "slide.scn", [MACRO, ScnImage(AREA)])
    with openslide.OpenSlide(str(path)) as reference, open_slide(str(path)) as slide:
        at = int(reference.properties["openslide.bounds-x"]), int(reference.properties["openslide.bounds-y"])
        [(_, tile)] = slide.read_tiles([(0, 0)], 384)
        np.testing.assert_array_equal(tile, on_white(np.asarray(reference.read_region(at, 0, (384, 384)))))


def test_a_scan_of_the_whole_glass_is_the_slide(tmp_path: Path) -> None:
    """It has the macro image's place and size, but more pixels."""
    path = write_scn(tmp_path / "slide.scn", [MACRO, ScnImage(AREA, None)])
    with open_slide(str(path)) as slide:
        assert (slide.width_px, slide.height_px) == (512, 384)


@pytest.mark.parametrize("without", [[], ["aperture"], ["source"], ["objective"], ["view"]], ids=str)
@pytest.mark.parametrize("second", [0.25, 0.5, 4.0], ids=["alike", "half", "coarse"])
def test_several_areas_are_refused_with_their_number(tmp_path: Path, second: float, without: list[str]) -> None:
    small: Pixels = AREA[:256, :256]
    images = [ScnImage(AREA), ScnImage(small, second, BELOW), ScnImage(small, second, (9_000_000, 39_000_000))]
    for count in (2, 3):
        error = refusal(write_scn(tmp_path / f"{count}.scn", images[:count], without=without))
        assert error.code is ErrorCode.UNSUPPORTED_FORMAT
        assert f"{count} areas" in error.message and "convert it" in error.message


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (b'<view sizeX="26000000"', b'<view sizeX="25999999"'),
        (b'offsetX="0" offsetY="0"', b'offsetX="-9" offsetY="700000"'),
        (b'sizeY="76000000" offsetX="0"', b'sizeY="76500000" offsetX="0"'),
    ],
)
def test_a_macro_may_miss_the_edges_of_the_glass_by_little(tmp_path: Path, old: bytes, new: bytes) -> None:
    """Its view is then not the collection's to the nanometre."""
    path = write_scn(tmp_path / "slide.scn", [MACRO, ScnImage(AREA)])
    content = path.read_bytes()
    assert content.count(old) == 1
    # Directories lie behind the XML: places must stay the same.
    at = content.index(b"<barcode>")
    changed = content.replace(old, new)
    cut = len(changed) - len(content)
    assert cut <= len(b"<barcode>YQ==</barcode>")
    padded = changed[:at] + changed[at:].replace(b"<barcode>YQ==</barcode>", b" " * (23 - cut), 1)
    path.write_bytes(padded)
    assert_is_the_area(path)


def test_a_macro_is_no_area_of_several(tmp_path: Path) -> None:
    images = [MACRO, ScnImage(AREA), ScnImage(AREA, at_nm=BELOW)]
    assert "2 areas" in refusal(write_scn(tmp_path / "slide.scn", images)).message


def test_of_focal_planes_the_first_is_read_with_a_warning(tmp_path: Path) -> None:
    path = write_scn(tmp_path / "slide.scn", [MACRO, ScnImage(AREA, focal_planes=3)])
    assert_is_the_area(path)
    with open_slide(str(path)) as slide:
        assert slide.warnings == ("it has 3 focal planes: the first is read",)


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        (b"</collection>", b"</collectiom>", "cannot be parsed (mismatched tag"),
        (b"dimension", b"dimensiom", "lists no image"),
        (b'ifd="0"', b'ifd="9"', "cannot be read"),
    ],
    ids=["cut", "no levels", "no such directory"],
)
def test_xml_that_does_not_say_what_is_scanned_is_refused(tmp_path: Path, old: bytes, new: bytes, said: str) -> None:
    """The largest image may be one of several, or the macro."""
    path = write_scn(tmp_path / "slide.scn", [ScnImage(AREA)])
    path.write_bytes(path.read_bytes().replace(old, new))
    with pytest.raises(SlideError, match="upload the slide again") as caught:
        open_slide(str(path))
    assert caught.value.code is ErrorCode.HEADER_CORRUPT and said in caught.value.message
