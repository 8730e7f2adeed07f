"""The slide makers, held against readers that had no part in them: OpenSlide, tifffile, libjpeg-turbo, plain numpy."""

import csv
import logging
import subprocess
from pathlib import Path
from typing import Any

import imagecodecs
import numpy as np
import openslide
import pytest
import safetensors.torch
import simplejpeg
import skimage.data
import tifffile
import timm
import torch
from numpy.typing import NDArray
from PIL import Image

from tests.slides.damage import BAD_SLIDES, damaged_blocks
from tests.slides.demo import COHORT, NEW, WEIGHTS_NAME, build_demo
from tests.slides.make import Pixels, mosaic_window, position_pixels, stain_shift, write_mosaic, write_slide
from tests.slides.oracle import area_average, kept_tiles, on_white
from tests.slides.sample import SAMPLE_FOLDER, SampleError, fetch_sample, real_pixels

KEPT_OF_SAMPLE = [[896, 896], [896, 1344], [896, 1792], [896, 2240], [1344, 2240]]
KEPT_OF_DEMO = {
    "CMU-1-Small-Region.svs": 5,
    "002_0.tif": 148,
    "003_0.tif": 156,
    "004_0.tif": 5,
    "004_1.tif": 4,
    "004_2.tif": 0,
    "005_0.tif": 5,
    "006_0.tif": 5,
    "007_0.tif": 5,
}


@pytest.fixture(scope="module")
def pixels() -> Pixels:
    return real_pixels(fetch_sample(SAMPLE_FOLDER))


@pytest.fixture(scope="module")
def good(pixels: Pixels, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_slide(tmp_path_factory.mktemp("good") / "good.tif", pixels[1536:2944, 800:1760], pyramid=True)


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_demo(tmp_path_factory.mktemp("demo"))


def mean_of_squares(image: Pixels, d: int) -> NDArray[np.float64]:
    height, width = image.shape[0] // d, image.shape[1] // d
    squares = image[: height * d, : width * d].reshape(height, d, width, d, -1)
    mean: NDArray[np.float64] = np.floor(squares.mean(axis=(1, 3)) + 0.5)
    return mean


def read_openslide(path: Path, level: int = 0) -> Pixels:
    with openslide.OpenSlide(str(path)) as slide:
        return np.asarray(slide.read_region((0, 0), level, slide.level_dimensions[level]))[..., :3]


def test_sample_is_the_public_slide_with_five_tiles(pixels: Pixels) -> None:
    assert pixels.shape == (2967, 2220, 3)
    np.testing.assert_array_equal(pixels, read_openslide(fetch_sample(SAMPLE_FOLDER)))
    assert kept_tiles(pixels).tolist() == KEPT_OF_SAMPLE


def test_sample_that_cannot_be_fetched_is_one_clear_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    failed = subprocess.CompletedProcess([], 1, "", "WARNING: slow\nERROR: No matching distribution found\n")
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: failed)
    (tmp_path / "CMU-1-Small-Region.svs").write_bytes(b"half a slide")
    with pytest.raises(SampleError, match="No matching distribution") as caught:
        fetch_sample(tmp_path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("downsample", [2, 3, 4, 16, 20])
def test_area_average_is_the_rounded_mean(pixels: Pixels, downsample: int) -> None:
    image = pixels[1000:1500, 700:1001]
    np.testing.assert_array_equal(area_average(image, downsample), mean_of_squares(image, downsample))
    white = np.full((40, 40, 3), 255, np.uint8)
    assert (area_average(white, downsample) == 255).all()


@pytest.mark.parametrize(
    "options",
    [
        {"compression": "none", "bigtiff": True},
        {"compression": "lzw", "tile_px": None, "rows_per_strip": 37},
        {"compression": "deflate", "predictor": True},
        {"compression": "deflate", "subifds": True},
        {"compression": "zstd", "planar": True},
        {"compression": "jpeg2000"},
    ],
    ids=lambda options: "-".join(str(value) for value in options.values()),
)
@pytest.mark.parametrize("channels", [1, 3, 4])
def test_lossless_slides_hold_every_position(tmp_path: Path, options: dict[str, Any], channels: int) -> None:
    position = position_pixels(531, 402)
    image = np.concatenate([position, position[..., :1]], axis=2)[..., :channels]
    path = write_slide(tmp_path / "slide.tif", image, pyramid=True, mpp=(0.25, 0.5), **options)
    with tifffile.TiffFile(path) as tiff:
        first = tiff.pages.first
        assert tiff.is_bigtiff == options.get("bigtiff", False)
        assert (first.tags["XResolution"].value, first.tags["YResolution"].value) == ((40000, 1), (20000, 1))
        pages: list[Any] = [first, *(first.pages or [])] if options.get("subifds") else list(tiff.pages)
        assert len(pages) == 3
        for page, downsample in zip(pages, (1, 4, 16), strict=True):
            level = page.asarray()
            level = np.moveaxis(level, 0, 2) if options.get("planar") and channels > 1 else level
            expected = mean_of_squares(image, downsample)
            np.testing.assert_array_equal(level.reshape(expected.shape), expected)
            assert page.is_reduced == (downsample > 1)


def test_openslide_sees_the_same_positions_and_levels(tmp_path: Path) -> None:
    image = position_pixels(1040, 720)
    path = write_slide(tmp_path / "slide.tif", image, compression="deflate", pyramid=True, mpp=0.25)
    with openslide.OpenSlide(str(path)) as slide:
        assert slide.level_dimensions == ((1040, 720), (260, 180), (65, 45))
        assert float(slide.properties["openslide.mpp-x"]) == pytest.approx(0.25)
    for level, downsample in enumerate((1, 4, 16)):
        np.testing.assert_array_equal(read_openslide(path, level), area_average(image, downsample))


@pytest.mark.parametrize(
    ("options", "stored", "limit"),
    [({}, (6, (2, 2)), 7), ({"subsampling": (1, 1)}, (6, (1, 1)), 4.5), ({"photometric": "rgb"}, (2, (1, 1)), 2.5)],
)
def test_jpeg_is_stored_as_asked(
    pixels: Pixels, tmp_path: Path, options: dict[str, Any], stored: tuple[int, tuple[int, int]], limit: float
) -> None:
    image = pixels[1536:2048, 800:1312]
    path = write_slide(tmp_path / "slide.tif", image, **options)
    with tifffile.TiffFile(path) as tiff:
        page = tiff.pages.first
        assert page.compression == 7
        assert (page.photometric, page.subsampling or (1, 1)) == stored
        np.testing.assert_array_equal(page.asarray(), read_openslide(path))
        assert np.abs(page.asarray().astype(int) - image).mean() < limit


def test_mosaic_blocks_are_the_mirrored_region(pixels: Pixels, tmp_path: Path) -> None:
    region = pixels[1408:2944, 768:2048]
    path = write_mosaic(tmp_path / "slide.tif", region, width=9008, height=7040, mpp=0.499, quality=80)
    first = mosaic_window(region, 0, 0, 2560, 3072)
    np.testing.assert_array_equal(first[:1536, :1280], region)
    np.testing.assert_array_equal(first[1536:, 1280:], region[::-1, ::-1])
    chosen = np.random.default_rng(0)
    with openslide.OpenSlide(str(path)) as slide:
        assert slide.level_dimensions == ((9008, 7040), (2252, 1760), (563, 440))
        for level, downsample in enumerate((1, 4, 16)):
            width, height = slide.level_dimensions[level]
            for _ in range(5):
                x, y = (int(chosen.integers(0, -(-size // 256))) * 256 for size in (width, height))
                shown = min(256, width - x), min(256, height - y)
                block = mosaic_window(region, x, y, 256, 256, downsample=downsample)
                coded = imagecodecs.jpeg8_decode(imagecodecs.jpeg8_encode(block, level=80, subsampling=(2, 2)))
                read = np.asarray(slide.read_region((x * downsample, y * downsample), level, shown))[..., :3]
                np.testing.assert_array_equal(read, coded[: shown[1], : shown[0]])


def test_same_input_same_bytes(pixels: Pixels, tmp_path: Path) -> None:
    region = pixels[1536:2048, 800:1312]
    for name in ("a", "b"):
        write_mosaic(tmp_path / f"mosaic_{name}", region, width=1000, height=1000)
        write_slide(tmp_path / f"slide_{name}", region, pyramid=True)
    assert (tmp_path / "mosaic_a").read_bytes() == (tmp_path / "mosaic_b").read_bytes()
    assert (tmp_path / "slide_a").read_bytes() == (tmp_path / "slide_b").read_bytes()


def test_another_centre_has_other_tissue_and_the_same_glass(pixels: Pixels) -> None:
    shifted = stain_shift(pixels)
    glass = (pixels > 230).all(axis=2)
    assert (shifted[glass] > 200).all()
    tissue = (pixels < 190).any(axis=2)
    assert np.abs(shifted[tissue].astype(int) - pixels[tissue]).mean() > 8
    assert kept_tiles(shifted).tolist() == KEPT_OF_SAMPLE
    same = stain_shift(pixels[:100], haematoxylin=1, eosin=1, tint=(1, 1, 1))
    assert np.abs(same.astype(int) - pixels[:100]).max() <= 1


@pytest.mark.parametrize("kind", sorted(BAD_SLIDES))
def test_bad_slides_are_bad_in_the_way_they_say(
    good: Path, tmp_path: Path, kind: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.CRITICAL)  # tifffile logs what it is meant to stumble over
    path = BAD_SLIDES[kind](good, tmp_path, kind)
    assert path.stem == kind
    if kind == "missing":
        assert not path.exists()
        return
    again = path.read_bytes()
    assert BAD_SLIDES[kind](good, tmp_path, kind).read_bytes() == again
    assert [entry.name for entry in tmp_path.iterdir()] == [path.name]
    if kind == "no_tissue":
        assert len(kept_tiles(tifffile.imread(path, key=0))) == 0
        assert read_openslide(path).min() > 190
    elif kind == "sixteen_bit":
        assert tifffile.imread(path).dtype == np.uint16
    elif kind == "flipped_tile_data":
        _assert_blocks_are_refused(good, path)
    elif kind in ("truncated", "bad_directory_entry", "huge_header"):
        _assert_directory_reads_and_pixels_do_not(path, kind)
    else:
        with pytest.raises((tifffile.TiffFileError, IndexError)), tifffile.TiffFile(path) as tiff:
            _ = tiff.pages.first
        with pytest.raises(openslide.OpenSlideError):
            openslide.OpenSlide(str(path))
    if kind == "jpeg_as_tif":
        with Image.open(path) as image:
            assert image.format == "JPEG"
    assert (path.suffix == ".svs") == (kind == "text_as_svs")


def _assert_blocks_are_refused(good: Path, bad: Path) -> None:
    before, after = good.read_bytes(), bad.read_bytes()
    blocks = damaged_blocks(good)
    assert len(blocks) == 5
    assert len(before) == len(after)
    assert sum(a != b for a, b in zip(before, after, strict=True)) == 64 * len(blocks)
    for start, size in blocks:
        simplejpeg.decode_jpeg(before[start : start + size], strict=True)
        with pytest.raises(ValueError, match=r"JPEG|marker"):
            simplejpeg.decode_jpeg(after[start : start + size], strict=True)


def _assert_directory_reads_and_pixels_do_not(path: Path, kind: str) -> None:
    with tifffile.TiffFile(path) as tiff:
        page = tiff.pages.first
        side = 2**31 if kind == "huge_header" else None
        assert side is None or (page.imagewidth, page.imagelength) == (side, side)
        if kind == "truncated":
            size = path.stat().st_size
            ends = [offset + count for offset, count in zip(page.dataoffsets, page.databytecounts, strict=True)]
            assert 0 < sum(end > size for end in ends) < len(ends)
    with pytest.raises(openslide.OpenSlideError):
        read_openslide(path)


def test_demo_cohort_has_the_tiles_it_is_sized_for(demo: Path) -> None:
    with (demo / "patients.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == ["image_id", "center_id", "patient_id", "image_num", "label", "mpp"]
    assert len({row["patient_id"] for row in rows}) == 7
    assert len({(row["patient_id"], row["center_id"], row["label"]) for row in rows}) == 7
    assert [row["image_id"] for row in rows if row["mpp"]] == ["004_0"]
    slides = {path.name: path for path in (demo / "slides").iterdir()}
    assert sorted(path.stem for path in slides.values()) == sorted(row["image_id"] for row in rows)
    kept = {name: len(kept_tiles(on_white(tifffile.imread(slides[name], key=0)))) for name in KEPT_OF_DEMO}
    assert kept == KEPT_OF_DEMO
    assert slides.keys() - kept.keys() == {"005_1.tif"}
    with pytest.raises(imagecodecs.Jpeg8Error, match="Empty input"):
        tifffile.imread(slides["005_1.tif"], key=0)


def test_second_demo_leaves_everything_alone(demo: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in demo.rglob("*")}
    build_demo(demo)
    assert {path: path.stat().st_mtime_ns for path in demo.rglob("*")} == before
    assert len([path for path in before if path.is_file()]) == len(COHORT) + 3


def test_the_demos_new_patients_have_slides_and_neither_labels_nor_the_ids_of_others(demo: Path) -> None:
    with (demo / "new.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert all(Path(row["uri"]).exists() and "label" not in row for row in rows)
    assert {row["patient_id"] for row in rows} == NEW.keys()
    assert NEW.keys().isdisjoint(slide.patient_id for slide in COHORT)


def test_demo_weights_know_a_cat(demo: Path) -> None:
    """The order of the tensors was taken from shapes; only a right order knows a photograph."""
    model = timm.create_model("tf_efficientnet_lite0", pretrained=False)
    model.load_state_dict(safetensors.torch.load_file(demo / "weights" / WEIGHTS_NAME), strict=True)
    photographs = {"cat": skimage.data.chelsea(), "cup": skimage.data.coffee()}  # type: ignore[no-untyped-call]
    classes = {"cat": {281, 282, 285}, "cup": {967, 968}}  # tabby, tiger and Egyptian cat; espresso, cup
    for name, photograph in photographs.items():
        edge = min(photograph.shape[:2])
        left = (photograph.shape[1] - edge) // 2
        square = Image.fromarray(photograph[:edge, left : left + edge]).resize((224, 224), Image.Resampling.BICUBIC)
        batch = torch.from_numpy(np.array(square)).permute(2, 0, 1)[None].float() / 127.5 - 1
        with torch.inference_mode():
            probability, found = model.eval()(batch).softmax(dim=1).max(dim=1)
        assert int(found) in classes[name]
        assert float(probability) > 0.3
