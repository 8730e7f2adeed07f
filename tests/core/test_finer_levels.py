"""Coarse levels that lack blocks, or hold damaged ones, while a finer level is whole: what is read is the finer level's."""

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile

from tests.slides.make import Pixels, position_pixels, write_slide
from tests.slides.oracle import area_average
from tests.slides.vendors import jpeg_codec, write_encoded
from udfs.wsi import ErrorCode, SlideError, open_slide
from udfs.wsi.reading.blocks import BlockReader
from udfs.wsi.reading.blocks_of_tiles import needed_blocks
from udfs.wsi.store import File
from udfs.wsi.tiff.header import read_index
from udfs.wsi.tiff.index import Level, SlideIndex

WIDTH, HEIGHT = 1090, 1030  # 1/4 is 272 x 257: blocks at the edges are cut, and a pixel or two of level 0 left over
Damage = Callable[[Path, int, Iterable[int]], None]


def _set(tag: str) -> Damage:
    def damage(path: Path, level: int, blocks: Iterable[int]) -> None:
        with tifffile.TiffFile(path, mode="r+") as tiff:
            found = _page(tiff, level).tags[tag]
            values = list(found.value)
            for block in blocks:
                values[block] = 0
            found.overwrite(values)

    return damage


def _overwrite(path: Path, level: int, blocks: Iterable[int]) -> None:
    with tifffile.TiffFile(path) as tiff:
        page = _page(tiff, level)
        places = [(page.dataoffsets[block], page.databytecounts[block]) for block in blocks]
    content = bytearray(path.read_bytes())
    for start, count in places:
        content[start : start + count] = b"\x11\x00\xff" * (count // 3) + bytes(count % 3)
    path.write_bytes(content)


def _page(tiff: tifffile.TiffFile, level: int) -> tifffile.TiffPage:
    first: Any = tiff.pages.first
    page: tifffile.TiffPage = (first, *(first.pages or tiff.pages[1:]))[level].aspage()
    return page


DAMAGES: dict[str, Damage] = {
    "no bytes": _set("TileByteCounts"),
    "no place": _set("TileOffsets"),
    "garbage": _overwrite,
}


def smooth(width: int, height: int) -> Pixels:
    """Pixels whose averages say where they are, and which JPEG hardly changes."""
    x, y = np.arange(width)[None, :], np.arange(height)[:, None]
    channels = np.broadcast_arrays(x * 150 // width + 20, y * 150 // height + 20, (x + y) % 700 // 5 + 20)
    pixels: Pixels = np.stack(channels, axis=2).astype(np.uint8)
    return pixels


def slide_with(path: Path, **layout: Any) -> tuple[Path, Pixels]:
    image = smooth(WIDTH, HEIGHT)
    options: dict[str, Any] = {"compression": "deflate", "tile_px": 64} | layout
    return write_slide(path, image, pyramid=True, **options), image


def levels_of(path: Path) -> tuple[Level, ...]:
    with open_slide(str(path)) as slide:
        assert slide.index
        return slide.index.levels


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize(
    "layout",
    [
        {},
        {"subifds": True, "predictor": True},
        {"planar": True, "levels": (2, 4, 8)},
        {"compression": "jpeg2000", "levels": (8,)},
        {"compression": "lzw", "levels": (4, 8, 16, 32), "tile_px": 48},
    ],
    ids=str,
)
@pytest.mark.parametrize("threads", [1, 3])
def test_the_mask_is_that_of_the_whole_slide(tmp_path: Path, damage: str, layout: dict[str, Any], threads: int) -> None:
    path, image = slide_with(tmp_path / "slide.tif", **layout)
    levels = levels_of(path)
    read = max(i for i, level in enumerate(levels) if level.downsample < 16)
    last = levels[read].columns * levels[read].rows - 1
    with open_slide(str(path)) as slide:
        expected = slide.downsampled()
    DAMAGES[damage](path, read, {0, last // 2, levels[read].columns - 1, last})
    with open_slide(str(path), threads=threads) as slide:
        difference = np.abs(slide.downsampled().astype(int) - expected)
    assert difference.max() <= 1  # of a mean of rounded means
    assert np.abs(expected.astype(int) - area_average(image, 16)).max() <= 1


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("tile_px", [64, 208])
def test_of_jpeg_too_where_blocks_are_shrunk_while_they_are_decoded(tmp_path: Path, damage: str, tile_px: int) -> None:
    path, image = slide_with(tmp_path / "slide.tif", compression="jpeg", tile_px=tile_px, levels=(2, 4), quality=95)
    expected = area_average(image, 32).astype(int)
    DAMAGES[damage](path, 2, [0, 3])
    DAMAGES[damage](path, 1, [0])
    with open_slide(str(path)) as slide:
        assert np.abs(slide.downsampled(32) - expected).max() <= 3


@pytest.mark.parametrize("damage", DAMAGES)
def test_several_levels_deep_level_0_has_the_last_word(tmp_path: Path, damage: str) -> None:
    path, image = slide_with(tmp_path / "slide.tif", levels=(2, 4, 8))
    for level in (1, 2, 3):
        found = levels_of(path)[level]
        DAMAGES[damage](path, level, range(found.columns * found.rows))
    with open_slide(str(path)) as slide:
        assert np.abs(slide.downsampled().astype(int) - area_average(image, 16)).max() <= 1
    DAMAGES[damage](path, 0, [20])
    with open_slide(str(path)) as slide:
        if damage == "garbage":
            with pytest.raises(SlideError, match="x=128, y=64 ") as caught:
                slide.downsampled()
            assert caught.value.code is ErrorCode.TILE_DATA_CORRUPT
        else:
            assert (slide.downsampled()[4:8, 8:12] == 255).all()


@pytest.mark.parametrize("damage", ["no bytes", "no place"])
def test_what_all_levels_leave_out_is_white_and_nothing_is_read_for_it(tmp_path: Path, damage: str) -> None:
    path, _ = slide_with(tmp_path / "slide.tif", levels=(4,))
    columns = levels_of(path)[0].columns
    with open_slide(str(path)) as slide:
        expected = slide.downsampled()
        whole = slide.traffic.bytes
    DAMAGES[damage](path, 1, [1])
    DAMAGES[damage](path, 0, [row * columns + column for row in range(4) for column in range(4, 8)])
    expected[:16, 16:32] = 255
    with open_slide(str(path)) as slide:
        np.testing.assert_array_equal(slide.downsampled(), expected)
        assert slide.traffic.bytes <= whole


def test_just_the_region_of_the_block_is_read_from_the_finer_level(tmp_path: Path) -> None:
    path, _ = slide_with(tmp_path / "slide.tif", levels=(4,), compression="none")
    with open_slide(str(path)) as slide:
        slide.downsampled()
        whole = slide.traffic.bytes
    DAMAGES["no bytes"](path, 1, [6])
    with open_slide(str(path)) as slide:
        slide.downsampled()
        assert 0 < slide.traffic.bytes - whole <= 16 * 64 * 64 * 3


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("cut_down", [False, True], ids=["whole index", "cut down"])
def test_tiles_of_a_coarse_level(tmp_path: Path, damage: str, cut_down: bool) -> None:
    """Also where a worker opens the slide by an index that lists no more than the blocks of its tiles."""
    path, image = slide_with(tmp_path / "slide.tif")
    DAMAGES[damage](path, 1, [0, 7, 24])
    corners = [(0, 0), (300, 200), (900, 850), (-40, 1000)]
    with open_slide(str(path)) as slide:
        index: SlideIndex | None = slide.index
    assert index
    if cut_down:
        blocks = needed_blocks(index.levels[1], corners, 90)
        index = SlideIndex.from_bytes(index.only(1, blocks).to_bytes())
    stored = np.pad(area_average(image, 4), ((100, 100), (100, 100), (0, 0)), constant_values=255)
    with open_slide(str(path), index=index) as slide:
        tiles = dict(slide.read_tiles(corners, 90, level=1))
    for i, (x, y) in enumerate(corners):
        left, top = round(x / 4) + 100, round(y / 4) + 100
        np.testing.assert_array_equal(tiles[i], stored[top : top + 90, left : left + 90])


def test_a_level_whose_writer_rounded_up_ends_behind_level_0(tmp_path: Path) -> None:
    """1/4 of 1,090 x 1,030 px as 273 x 258: the last column stands for two pixels of level 0."""
    path = tmp_path / "slide.tif"
    image = smooth(WIDTH, HEIGHT)
    level = np.pad(image, ((0, 2), (0, 2), (0, 0)), "edge")
    with tifffile.TiffWriter(path) as writer:
        for pixels in (image, area_average(level, 4)):
            writer.write(pixels, tile=(64, 64), photometric="rgb", compression="zlib", metadata=None)
    _overwrite(path, 1, range(25))
    with open_slide(str(path)) as slide:
        assert (slide.levels[1].width_px, slide.levels[1].height_px) == (273, 258)
        [(_, tile)] = slide.read_tiles([(0, 0)], 273, level=1)
    np.testing.assert_array_equal(tile[:258], area_average(level, 4))


def test_a_block_that_is_smaller_than_it_ought_to_be_counts_as_damaged(tmp_path: Path) -> None:
    path = tmp_path / "slide.tif"
    image = smooth(512, 512)
    codec = jpeg_codec(quality=95)
    with tifffile.TiffWriter(path) as writer:
        write_encoded(writer, image, codec, block=(64, 64))
        write_encoded(writer, np.zeros((64, 64, 3), np.uint8), codec, block=(32, 32), size=(128, 128))
    with tifffile.TiffFile(path, mode="r+") as tiff:  # half of what the directory says
        for tag in ("TileWidth", "TileLength"):
            tiff.pages[1].aspage().tags[tag].overwrite(64)
        tags = tiff.pages[1].aspage().tags
        for tag in ("TileOffsets", "TileByteCounts"):
            tags[tag].overwrite(tags[tag].value[:4])
    with open_slide(str(path)) as slide:
        assert [level.downsample for level in slide.levels] == [1, 4]
        assert np.abs(slide.downsampled().astype(int) - area_average(image, 16)).max() <= 3


def test_nothing_is_asked_of_finer_levels_if_all_is_whole(tmp_path: Path) -> None:
    path = write_slide(tmp_path / "slide.tif", position_pixels(512, 512), compression="lzw", pyramid=True, levels=(4,))
    with open_slide(str(path)) as slide:
        assert slide.index
        level = slide.index.levels[1]

    def never() -> Sequence[Level]:
        raise AssertionError

    blocks = list(range(level.rows * level.columns))
    found = list(BlockReader(File(str(path)), level, blocks, finer=never))
    assert [block for block, _ in found] == blocks
    assert all(pixels is not None for _, pixels in found)


@pytest.mark.parametrize("has_finer_data", [False, True])
def test_the_header_is_read_again_only_for_a_block_that_finer_levels_have(
    tmp_path: Path, has_finer_data: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A worker opens the slide by an index that lists no more than the blocks of its tiles; glass is left out as a rule."""
    path, image = slide_with(tmp_path / "slide.tif", levels=(4,))
    DAMAGES["no place"](path, 1, [1])
    columns = levels_of(path)[0].columns
    glass = [row * columns + column for row in range(4) for column in range(4, 8)]
    DAMAGES["no place"](path, 0, glass[:-1] if has_finer_data else glass)
    with open_slide(str(path)) as slide:
        assert slide.index
        part = slide.index.only(1, [0, 1]).to_bytes()
    n_read = 0

    def read_again(*arguments: Any) -> SlideIndex:
        nonlocal n_read
        n_read += 1
        return read_index(*arguments)

    monkeypatch.setattr("udfs.wsi.reading.slide.read_index", read_again)
    for again in (part, again_of(part)):
        with open_slide(str(path), index=SlideIndex.from_bytes(again)) as slide:
            tiles = dict(slide.read_tiles([(0, 0), (256, 0)], 64, level=1))
    assert n_read == 2 * has_finer_data
    expected = area_average(image, 4)[:64, :128].copy()
    if has_finer_data:
        expected[:48, 64:] = expected[:, 64:112] = 255
    else:
        expected[:, 64:] = 255
    np.testing.assert_array_equal(np.hstack([tiles[0], tiles[1]]), expected)


def again_of(part: bytes) -> bytes:
    """An index that was cut down, cut down and stored once more."""
    index = SlideIndex.from_bytes(part)
    assert index
    return index.only(1, [0, 1]).to_bytes()


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("level_px", [(400, 320), (401, 321), (360, 288)], ids=str)
def test_a_level_of_a_fractional_downsample(tmp_path: Path, damage: str, level_px: tuple[int, int]) -> None:
    """1,000 x 800 px at 1/2.5, also with a column and a row more than level 0 fills, and at 1/2.78."""
    path = tmp_path / "slide.tif"
    image = smooth(1000, 800)
    stored = np.full((level_px[1], level_px[0], 3), 9, np.uint8)
    with tifffile.TiffWriter(path) as writer:
        for pixels in (image, stored):
            writer.write(pixels, tile=(64, 64), photometric="rgb", compression="zlib", metadata=None)
    columns = -(-level_px[0] // 64)
    last = columns * -(-level_px[1] // 64) - 1
    lost = [0, columns + 2, last]
    DAMAGES[damage](path, 1, lost)
    with open_slide(str(path)) as slide:
        downsample = slide.levels[1].downsample
        assert downsample % 1
        [(_, tile)] = slide.read_tiles([(0, 0)], 401, level=1)
    for block in lost:
        row, column = divmod(block, columns)
        for dy, dx in ((0, 0), (5, 2), (63, 63)):
            y, x = min(row * 64 + dy, level_px[1] - 1), min(column * 64 + dx, level_px[0] - 1)
            exact = mean_of(image, y * downsample, x * downsample, downsample)
            assert np.abs(tile[y, x] - exact).max() <= 0.51, (block, y, x)
    assert (tile[10, 70] == 9).all()


def mean_of(image: Pixels, top: float, left: float, edge: float) -> Any:
    """The area average over a square whose edges lie between pixels, by a grid of 50 x 50 points in it."""
    points = (np.arange(50) + 0.5) / 50 * edge
    rows, columns = ((start + points).astype(int) for start in (top, left))
    return image[np.minimum(rows, len(image) - 1)][:, np.minimum(columns, image.shape[1] - 1)].mean(axis=(0, 1))
