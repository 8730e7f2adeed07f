"""The index of a slide: kept as bytes, cut down, it opens the slide again without its header, and notices another file."""

import dataclasses
import os
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.slides.make import Pixels, position_pixels, write_mosaic, write_slide
from udfs.wsi import ErrorCode, SlideError, open_slide
from udfs.wsi.reading.blocks_of_tiles import needed_blocks
from udfs.wsi.store import File
from udfs.wsi.tiff.index import SlideIndex

LAYOUTS: list[dict[str, Any]] = [
    {"compression": "jpeg", "pyramid": True},
    {"compression": "lzw", "predictor": True, "tile_px": None},
    {"compression": "deflate", "planar": True, "tile_px": 64, "pyramid": True},
    {"compression": "none", "bigtiff": True},
]


def index_of(path: Path) -> SlideIndex:
    with open_slide(str(path)) as slide:
        assert slide.index
        return slide.index


def same(one: SlideIndex, other: SlideIndex) -> None:
    for field in dataclasses.fields(SlideIndex):
        if field.name != "levels":
            assert getattr(one, field.name) == getattr(other, field.name)
    assert len(one.levels) == len(other.levels)
    for mine, its in zip(one.levels, other.levels, strict=True):
        for field in dataclasses.fields(mine):
            np.testing.assert_array_equal(getattr(mine, field.name), getattr(its, field.name), err_msg=field.name)


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout["compression"])
def test_an_index_survives_as_bytes_whole_and_cut_down(tmp_path: Path, layout: dict[str, Any]) -> None:
    path = write_slide(tmp_path / "a.tif", position_pixels(700, 500), **layout)
    corners = [(100, 50), (300, 300)]
    index = index_of(path)
    with open_slide(str(path)) as slide:
        expected = dict(slide.read_tiles(corners, 96))
    again = SlideIndex.from_bytes(index.to_bytes())
    assert again is not None
    same(index, again)
    part = index.only(0, needed_blocks(index.levels[0], corners, 96))
    cut = SlideIndex.from_bytes(part.to_bytes())
    assert cut is not None
    same(part, cut)
    with open_slide(str(path), index=cut) as slide:
        for i, tile in slide.read_tiles(corners, 96):
            np.testing.assert_array_equal(tile, expected[i])


def test_a_part_knows_that_it_is_one(tmp_path: Path) -> None:
    path = write_slide(tmp_path / "a.tif", position_pixels(700, 500), tile_px=64, compression="none")
    part = index_of(path).only(0, [3, 4])
    with open_slide(str(path), index=part) as slide, pytest.raises(KeyError, match="cut down"):
        slide.read_tiles([(0, 448)], 64)


def test_opened_by_an_index_no_header_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    image = position_pixels(2048, 2048)
    path = write_slide(tmp_path / "a.tif", image, compression="none", tile_px=256)
    index = index_of(path)
    asked: list[tuple[int, int]] = []
    request = File.request

    def noted(file: File, start: int, count: int) -> Any:
        asked.append((start, count))
        return request(file, start, count)

    monkeypatch.setattr(File, "request", noted)
    with open_slide(f"file://{path}", index=index) as slide:
        [(_, tile)] = slide.read_tiles([(256, 512)], 256)
        assert slide.traffic.bytes == 256 * 256 * 3
    np.testing.assert_array_equal(tile, image[512:768, 256:512])
    assert len(asked) == 1


def test_another_file_under_the_same_name_is_noticed(tmp_path: Path) -> None:
    path = write_slide(tmp_path / "a.tif", position_pixels(300, 300), compression="none", tile_px=64)
    index = index_of(path)
    os.utime(path, (10**9, 10**9))
    with open_slide(str(path), index=index) as slide:
        with pytest.raises(SlideError, match="run again") as caught:
            next(slide.read_tiles([(0, 0)], 64))
        with pytest.raises(SlideError):
            slide.downsampled()
    assert caught.value.code is ErrorCode.FILE_CHANGED


def test_an_index_of_another_version_is_not_read(tmp_path: Path) -> None:
    path = write_slide(tmp_path / "a.tif", position_pixels(64, 64), compression="none", tile_px=64)
    content = zlib.decompress(index_of(path).to_bytes())
    assert SlideIndex.from_bytes(zlib.compress(content.replace(b'"format": 1', b'"format": 9'))) is None


def test_an_index_takes_a_few_bytes_a_block(pixels: Pixels, tmp_path: Path) -> None:
    path = write_mosaic(tmp_path / "a.tif", pixels[:512, :512], width=16_000, height=16_000, tile_px=64)
    index = index_of(path)
    blocks = sum(len(level.offsets) for level in index.levels)
    assert blocks > 60_000
    assert len(index.to_bytes()) < 2 * blocks
