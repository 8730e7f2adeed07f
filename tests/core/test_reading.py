"""Tiles are the pixels of the file: held against OpenSlide, and against arrays whose pixels say where they are."""

from collections import Counter
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import openslide
import pytest
import tifffile
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.slides.make import Pixels, position_pixels, write_slide
from tests.slides.oracle import area_average, on_white
from udfs.wsi import open_slide
from udfs.wsi.reading import blocks
from udfs.wsi.store import list_files, read_bytes
from udfs.wsi.tiff.decode import decode_block
from udfs.wsi.tiff.index import Level

WIDTH, HEIGHT = 531, 402
LAYOUTS: list[dict[str, Any]] = [
    {"compression": "none"},
    {"compression": "none", "tile_px": None},
    {"compression": "none", "tile_px": None, "planar": True},
    {"compression": "none", "bigtiff": True, "planar": True},
    {"compression": "lzw"},
    {"compression": "lzw", "tile_px": None, "rows_per_strip": 37},
    {"compression": "lzw", "predictor": True, "subifds": True},
    {"compression": "deflate", "predictor": True},
    {"compression": "deflate", "planar": True, "tile_px": 64},
    {"compression": "deflate", "subifds": True, "bigtiff": True},
    {"compression": "zstd", "tile_px": None, "rows_per_strip": 1},
    {"compression": "jpeg2000"},
    {"compression": "jpeg2000", "planar": True},
]


def layout_id(layout: dict[str, Any]) -> str:
    return "-".join(key if value is True else f"{value}" for key, value in layout.items()).replace("None", "strips")


def window(image: Pixels, x: int, y: int, edge: int) -> Pixels:
    """Square of an image at any place, white outside it."""
    height, width = image.shape[:2]
    square = np.full((edge, edge, 3), 255, np.uint8)
    x0, y0, x1, y1 = max(x, 0), max(y, 0), min(x + edge, width), min(y + edge, height)
    if x1 > x0 and y1 > y0:
        square[y0 - y : y1 - y, x0 - x : x1 - x] = image[y0:y1, x0:x1]
    return square


def read(path: Path | str, xy_px: Any, tile_px: int, level: int = 0) -> dict[int, Pixels]:
    """Tiles by index; a second of one index is an error."""
    tiles: dict[int, Pixels] = {}
    with open_slide(str(path)) as slide:
        for i, pixels in slide.read_tiles(xy_px, tile_px, level):
            assert i not in tiles
            tiles[i] = pixels
    return tiles


def positions(channels: int) -> Pixels:
    image = position_pixels(WIDTH, HEIGHT)
    if channels == 4:
        return np.dstack([image, image[..., 0] ^ image[..., 1]])
    return image[..., :channels]


def read_openslide(path: Path, x: int, y: int, edge: int) -> Pixels:
    with openslide.OpenSlide(str(path)) as slide:
        return on_white(np.asarray(slide.read_region((x, y), 0, (edge, edge))))


def anywhere(width: int, height: int, edge: int, count: int) -> list[tuple[int, int]]:
    random = np.random.default_rng(5)
    corners = random.integers((-edge, -edge), (width, height), (count, 2))
    return [(int(x), int(y)) for x, y in corners]


def test_tiles_of_the_sample_are_openslides_to_the_byte(sample: Path) -> None:
    corners = [(0, 0), (896, 1344), (1, 2), (2219, 2966), *anywhere(2220, 2967, 448, 12)]
    for i, pixels in read(sample, corners, 448).items():
        np.testing.assert_array_equal(pixels, read_openslide(sample, *corners[i], 448))


@pytest.mark.parametrize("jpeg", [{}, {"subsampling": (1, 1)}, {"photometric": "rgb"}, {"tile_px": None}], ids=str)
def test_tiles_of_jpeg_pyramids_are_openslides_to_the_byte(
    pixels: Pixels, tmp_path: Path, jpeg: dict[str, Any]
) -> None:
    path = write_slide(tmp_path / "slide.tif", pixels[1408:2308, 768:1568], pyramid="tile_px" not in jpeg, **jpeg)
    corners = anywhere(800, 900, 224, 8)
    tiles = read(path, corners, 224)
    assert len(tiles) == 8
    if "tile_px" in jpeg:  # OpenSlide reads no strips: libjpeg-turbo by tifffile does
        expected = [window(tifffile.imread(path), x, y, 224) for x, y in corners]
    else:
        expected = [read_openslide(path, x, y, 224) for x, y in corners]
    for i, tile in tiles.items():
        np.testing.assert_array_equal(tile, expected[i])


@pytest.mark.parametrize("channels", [1, 3, 4], ids=["grey", "rgb", "rgba"])
@pytest.mark.parametrize("layout", LAYOUTS, ids=layout_id)
def test_every_layout_gives_each_level_in_its_frame(tmp_path: Path, layout: dict[str, Any], channels: int) -> None:
    image = positions(channels)
    path = write_slide(tmp_path / "slide.tif", image, pyramid=True, **layout)
    with open_slide(str(path)) as slide:
        assert (slide.width_px, slide.height_px) == (WIDTH, HEIGHT)
        # a lower level of strips beside a level 0 of strips is read; which levels there are is the writer's choice
        assert [level.downsample for level in slide.levels] == [1, 4, 16]
        for level, downsample in enumerate((1, 4, 16)):
            stored = on_white(area_average(image, downsample))
            corners = [(0, 0), (256, 128), (-64, 320), (528, 400), (-320, -320), (WIDTH + 64, 0)]
            tiles = dict(slide.read_tiles(corners, 96, level))
            assert sorted(tiles) == list(range(len(corners)))
            for i, (x, y) in enumerate(corners):
                expected = window(stored, round(x / downsample), round(y / downsample), 96)
                np.testing.assert_array_equal(tiles[i], expected, err_msg=f"level {level}, tile at {x}, {y}")


@pytest.fixture(scope="module")
def lossless(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("lossless") / "slide.tif"
    return write_slide(path, position_pixels(WIDTH, HEIGHT), compression="lzw", tile_px=64, pyramid=True)


@settings(derandomize=True, deadline=None, max_examples=60)
@given(
    corners=st.lists(st.tuples(st.integers(-200, 700), st.integers(-200, 700)), max_size=40),
    tile_px=st.integers(1, 300),
    level=st.integers(0, 2),
)
def test_any_tiles_in_any_order_come_once_each(
    lossless: Path, corners: list[tuple[int, int]], tile_px: int, level: int
) -> None:
    tiles = read(lossless, np.array(corners, np.int64).reshape(-1, 2), tile_px, level)
    assert sorted(tiles) == list(range(len(corners)))
    downsample = (1, 4, 16)[level]
    stored = area_average(position_pixels(WIDTH, HEIGHT), downsample)
    for i, (x, y) in enumerate(corners):
        assert tiles[i].dtype == np.uint8
        np.testing.assert_array_equal(tiles[i], window(stored, round(x / downsample), round(y / downsample), tile_px))


def test_each_block_is_decoded_once_however_many_tiles_share_it(
    lossless: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    decoded: Counter[int] = Counter()
    decode = decode_block

    def counted(level: Level, block: int, *rest: Any) -> Pixels | None:
        decoded[block] += 1
        return decode(level, block, *rest)

    monkeypatch.setattr(blocks, "decode_block", counted)
    corners = [(x, y) for x in range(0, WIDTH, 40) for y in range(0, HEIGHT, 40)]
    np.random.default_rng(0).shuffle(corners)
    assert len(read(lossless, corners, 100)) == len(corners)
    assert decoded == Counter(range(9 * 7))
    decoded.clear()
    read(lossless, [(70, 70)], 20)
    assert decoded == Counter([10])


def test_no_tiles_are_no_error(lossless: Path) -> None:
    assert read(lossless, [], 448) == {}


def test_alpha_is_composited_on_white(tmp_path: Path) -> None:
    image = np.zeros((64, 64, 4), np.uint8)
    image[..., 0] = 200
    image[..., 3] = np.arange(64)[None, :] * 4
    path = write_slide(tmp_path / "slide.tif", image, compression="deflate", tile_px=64)
    tile = read(path, [(0, 0)], 64)[0]
    share = image[..., 3:] / 255
    np.testing.assert_allclose(tile, image[..., :3] * share + 255 * (1 - share), atol=0.5 + 1e-9)
    assert (tile[:, 0] == 255).all()


def test_premultiplied_alpha_is_composited_as_such(tmp_path: Path) -> None:
    path = tmp_path / "slide.tif"
    image = np.full((64, 64, 4), 100, np.uint8)  # what is seen through half: 100 of it, 155 of white
    tifffile.imwrite(path, image, photometric="rgb", extrasamples=["assocalpha"], tile=(64, 64))
    assert (read(path, [(0, 0)], 64)[0] == 255).all()


def test_blocks_that_a_writer_left_out_are_white(tmp_path: Path) -> None:
    path = tmp_path / "sparse.tif"
    image = np.zeros((128, 128, 3), np.uint8)
    image[:64, :64] = 77
    with tifffile.TiffWriter(path) as writer:
        blocks = (image[y : y + 64, x : x + 64] if (x, y) == (0, 0) else None for y in (0, 64) for x in (0, 64))
        writer.write(blocks, shape=(128, 128, 3), dtype="uint8", tile=(64, 64), photometric="rgb")
    tile = read(path, [(0, 0)], 128)[0]
    assert (tile[:64, :64] == 77).all()
    assert (tile[64:] == 255).all()
    assert (tile[:, 64:] == 255).all()


@pytest.mark.parametrize("protocol", ["memory", "file"])
def test_any_fsspec_uri_reads_alike(lossless: Path, protocol: str) -> None:
    uri = f"file://{lossless}"
    if protocol == "memory":
        uri = "memory://slides/lossless.tif"
        fsspec.filesystem("memory").pipe("/slides/lossless.tif", lossless.read_bytes())
    corners = [(0, 0), (300, 200)]
    for i, tile in read(uri, corners, 100).items():
        np.testing.assert_array_equal(tile, window(position_pixels(WIDTH, HEIGHT), *corners[i], 100))


def test_threads_that_decode_change_nothing(lossless: Path) -> None:
    corners = [(x, y) for x in range(-40, WIDTH, 70) for y in range(0, HEIGHT, 70)]
    with open_slide(str(lossless), threads=3) as slide:
        tiles = dict(slide.read_tiles(corners, 90))
        small = slide.downsampled(8)
    image = position_pixels(WIDTH, HEIGHT)
    for i, (x, y) in enumerate(corners):
        np.testing.assert_array_equal(tiles[i], window(image, x, y, 90))
    with open_slide(str(lossless)) as slide:
        np.testing.assert_array_equal(small, slide.downsampled(8))


def test_a_tile_that_is_kept_stays_as_it_is(lossless: Path) -> None:
    """Whether the caller holds the tile, a view of it, its memory by the buffer protocol, or every tile at once."""
    corners = [(x, y) for y in range(0, HEIGHT, 20) for x in range(0, WIDTH, 20)]
    image = position_pixels(WIDTH, HEIGHT)
    kept: dict[int, Pixels] = {}
    with open_slide(str(lossless)) as slide:
        for i, tile in slide.read_tiles(corners, 30):
            if i % 3 == 0:
                kept[i] = tile
            elif i % 3 == 1:
                kept[i] = tile[5:25, ::2, :1]
            else:
                kept[i] = np.asarray(memoryview(tile.data))
        every = dict(slide.read_tiles(corners, 30))
    assert kept.keys() == every.keys() == set(range(len(corners)))
    for i, tile in kept.items():
        expected = window(image, *corners[i], 30)
        np.testing.assert_array_equal(tile, expected[5:25, ::2, :1] if i % 3 == 1 else expected)
        np.testing.assert_array_equal(every[i], expected)


def test_two_readers_of_one_slide_do_not_disturb_each_other(lossless: Path) -> None:
    image = position_pixels(WIDTH, HEIGHT)
    corners = [(x, y) for y in range(0, HEIGHT, 64) for x in range(0, WIDTH, 64)]
    with open_slide(str(lossless)) as slide:
        pairs = zip(slide.read_tiles(corners, 64), slide.read_tiles(corners[::-1], 64), strict=True)
        for (i, tile), (j, other) in pairs:
            np.testing.assert_array_equal(tile, window(image, *corners[i], 64))
            np.testing.assert_array_equal(other, window(image, *corners[::-1][j], 64))


@pytest.mark.parametrize("name", ["a::b.tif", "zip::c.svs", "d :: e/f.tif", "s3::g%20h#.tif"])
def test_an_absolute_path_is_a_path_of_this_machine(tmp_path: Path, name: str) -> None:
    """To fsspec, `::` makes a chain of URIs."""
    image = position_pixels(64, 64)
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    write_slide(path, image, compression="none")
    np.testing.assert_array_equal(read(path, [(0, 0)], 64)[0], image)
    assert [uri for uri, _ in list_files(str(path.parent), (".tif", ".svs"))] == [str(path)]
    assert read_bytes(str(path)) == path.read_bytes()


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("edges", [(0, 0), (17, 9)], ids=["whole blocks", "cut blocks"])
def test_a_block_that_many_share_is_decoded_once_for_each_run_of_them(
    tmp_path: Path, threads: int, edges: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Some writers store one white block for all the glass."""
    width, height = 8 * 64 - edges[0], 6 * 64 - edges[1]
    image = position_pixels(width, height)
    path = write_slide(tmp_path / "slide.tif", image, compression="deflate", tile_px=64)
    shared = [*range(9, 15), 20, 21, *range(24, 48)]
    with tifffile.TiffFile(path, mode="r+") as tiff:
        tags = tiff.pages.first.aspage().tags
        for tag in ("TileOffsets", "TileByteCounts"):
            values = list(tags[tag].value)
            for block in shared:
                values[block] = values[shared[0]]
            tags[tag].overwrite(values)
    padded = np.pad(image, ((0, 64), (0, 64), (0, 0)))
    for block in shared:
        row, column = divmod(block, 8)
        padded[row * 64 :, column * 64 :][:64, :64] = image[64:128, 64:128]
    expected = padded[:height, :width]
    counts: Counter[int] = Counter()

    def counting(level: Level, block: int, *arguments: Any) -> Any:
        counts[block] += 1
        return decode_block(level, block, *arguments)

    monkeypatch.setattr(blocks, "decode_block", counting)
    with open_slide(str(path), threads=threads) as slide:
        np.testing.assert_array_equal(slide.downsampled(16), area_average(expected, 16))
        in_mask = counts.total()
        tiles = dict(slide.read_tiles([(0, 0), (100, 100), (300, 200)], 150))
    for i, (x, y) in enumerate([(0, 0), (100, 100), (300, 200)]):
        np.testing.assert_array_equal(tiles[i], window(expected, x, y, 150))
    assert in_mask < 48 - len(shared) + (4 if edges == (0, 0) else 10)
