"""A bad slide is a SlideError with a code, the file and a remedy: never another exception, wrong pixels or much memory.

Damage by chance is in test_fuzz.py.
"""

import pickle
import struct
import subprocess
import sys
import tracemalloc
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
import tifffile

from tests.slides.damage import BAD_SLIDES
from tests.slides.make import Pixels, write_slide
from tests.slides.oracle import kept_tiles
from udfs.wsi import ErrorCode, SlideError, open_slide
from udfs.wsi.store import File
from udfs.wsi.store.stream import open_stream

CODES = {
    "missing": ErrorCode.FILE_MISSING,
    "zero_bytes": ErrorCode.FILE_EMPTY,
    "truncated": ErrorCode.FILE_TRUNCATED,
    "truncated_directory": ErrorCode.FILE_TRUNCATED,
    "flipped_header": ErrorCode.NOT_A_SLIDE,
    "flipped_tile_data": ErrorCode.TILE_DATA_CORRUPT,
    "text_as_svs": ErrorCode.NOT_A_SLIDE,
    "jpeg_as_tif": ErrorCode.NOT_A_SLIDE,
    "bad_directory_entry": ErrorCode.HEADER_CORRUPT,
    "sixteen_bit": ErrorCode.UNSUPPORTED_FORMAT,
    "huge_header": ErrorCode.SIZE_IMPLAUSIBLE,
}
REMEDIES = ("upload", "scan", "convert", "check", "export")
MOST_BYTES = 16 * 2**20  # that a header of a small file may cost, whatever it claims


def read_all(path: Path, factor: int = 16, tile_px: int = 448) -> tuple[Pixels, list[Pixels]]:
    with open_slide(str(path)) as slide:
        small = slide.downsampled(factor)
        assert small.shape == (slide.height_px // factor, slide.width_px // factor, 3)
        steps = range(0, 5 * tile_px, tile_px)
        corners = [(x, y) for y in steps for x in steps if x < slide.width_px and y < slide.height_px]
        tiles = dict(slide.read_tiles(corners, tile_px))
    assert sorted(tiles) == list(range(len(corners)))
    return small, [tiles[i] for i in range(len(corners))]


@pytest.fixture(scope="module")
def good(pixels: Pixels, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_slide(tmp_path_factory.mktemp("good") / "good.tif", pixels[1536:2944, 800:1760], pyramid=True)


def test_every_kind_of_bad_slide_has_its_code() -> None:
    assert set(CODES) == set(BAD_SLIDES) - {"no_tissue"}


@pytest.mark.parametrize("kind", CODES)
def test_a_bad_slide_says_what_is_wrong_where_and_what_to_do(good: Path, tmp_path: Path, kind: str) -> None:
    path = BAD_SLIDES[kind](good, tmp_path, "patient_7")
    with pytest.raises(SlideError) as caught:
        read_all(path)
    assert caught.value.code is CODES[kind]
    assert str(path) in caught.value.message
    assert any(remedy in caught.value.message for remedy in REMEDIES)
    assert "\n" not in str(caught.value)


def test_damaged_tiles_are_an_error_in_those_tiles_alone(good: Path, tmp_path: Path, pixels: Pixels) -> None:
    path = BAD_SLIDES["flipped_tile_data"](good, tmp_path, "damaged")
    found = {"whole": 0, "damaged": 0}
    with open_slide(str(path)) as slide, open_slide(str(good)) as whole:
        slide.downsampled(16)  # from 1/4, which is whole
        for corner in kept_tiles(pixels[1536:2944, 800:1760]):
            [(_, expected)] = whole.read_tiles([corner])
            try:
                [(_, tile)] = slide.read_tiles([corner])
            except SlideError as error:
                assert "level-0 px" in error.message
                found["damaged"] += 1
            else:
                np.testing.assert_array_equal(tile, expected)
                found["whole"] += 1
    assert found["damaged"] >= 1


def test_what_tifffile_logs_of_a_slide_stays_out_of_the_log_of_its_reader_alone(
    good: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = BAD_SLIDES["bad_directory_entry"](good, tmp_path, "bad")
    with pytest.raises(SlideError):
        open_slide(str(path))
    assert not caplog.records
    with suppress(Exception), tifffile.TiffFile(path) as tiff:
        tiff.pages.first.dataoffsets  # noqa: B018
    assert {record.name for record in caplog.records} == {"tifffile"}


def test_a_slide_of_glass_is_no_error(good: Path, tmp_path: Path) -> None:
    small, tiles = read_all(BAD_SLIDES["no_tissue"](good, tmp_path, "glass"))
    assert small.min() > 190
    assert len(tiles) == 20


def test_a_folder_is_no_slide(tmp_path: Path) -> None:
    with pytest.raises(SlideError, match="folder") as caught:
        open_slide(str(tmp_path))
    assert caught.value.code is ErrorCode.NOT_A_SLIDE


def test_an_unknown_protocol_names_it() -> None:
    with pytest.raises(SlideError, match="protocol") as caught:
        open_slide("nosuch://bucket/slide.svs")
    assert caught.value.code is ErrorCode.READ_FAILED


def test_a_slide_error_survives_the_way_back_from_a_worker() -> None:
    error = SlideError(ErrorCode.TILE_DATA_CORRUPT, "a.svs: the block at x=1, y=2")
    again = pickle.loads(pickle.dumps(error))
    assert (type(again), again.code, again.message, str(again)) == (SlideError, error.code, error.message, str(error))


def test_a_codestream_that_claims_more_than_its_block_is_refused_before_it_is_decoded(
    pixels: Pixels, tmp_path: Path
) -> None:
    good = write_slide(tmp_path / "good.tif", pixels[1700:1956, 1000:1256], compression="jpeg2000")
    content = bytearray(good.read_bytes())
    size = content.index(b"\xff\x4f\xff\x51") + 8
    content[size : size + 8] = (60_000).to_bytes(4, "big") * 2  # 10 GB
    good.write_bytes(content)
    with pytest.raises(SlideError, match="60000 x 60000") as caught:
        read_all(good, 16, 256)
    assert caught.value.code is ErrorCode.TILE_DATA_CORRUPT


@pytest.mark.parametrize("tag", ["ImageWidth", "RowsPerStrip"])
def test_a_negative_size_is_a_damaged_header(pixels: Pixels, tmp_path: Path, tag: str) -> None:
    path = write_slide(tmp_path / "slide.tif", pixels[:64, :96], compression="deflate", tile_px=None)
    with tifffile.TiffFile(path) as tiff:
        at = tiff.pages.first.tags[tag].offset
    content = bytearray(path.read_bytes())
    content[at + 2 : at + 4] = (9).to_bytes(2, "little")  # signed
    content[at + 4 : at + 12] = (1).to_bytes(4, "little") + (-96).to_bytes(4, "little", signed=True)
    path.write_bytes(content)
    with pytest.raises(SlideError) as caught:
        read_all(path)
    assert caught.value.code is ErrorCode.HEADER_CORRUPT


def test_a_damaged_jpeg_is_never_patched_with_grey(pixels: Pixels, tmp_path: Path) -> None:
    """Libjpeg fills what it lacks with grey and a warning: here a cut stream is an error."""
    good = write_slide(tmp_path / "good.tif", pixels[1700:1956, 1000:1256])
    with tifffile.TiffFile(good) as tiff:
        offset, count = tiff.pages.first.dataoffsets[0], tiff.pages.first.databytecounts[0]
    content = bytearray(good.read_bytes())
    content[offset + count // 2 : offset + count] = bytes(count - count // 2)
    good.write_bytes(content)
    with pytest.raises(SlideError) as caught:
        read_all(good, 16, 256)
    assert caught.value.code is ErrorCode.TILE_DATA_CORRUPT


def test_a_damaged_lzw_block_does_not_kill_the_process(tmp_path: Path) -> None:
    """Its third code is far beyond the table. Read in a process of its own, which must end by itself."""
    path = write_slide(tmp_path / "slide.tif", np.zeros((64, 64, 3), np.uint8), compression="lzw", tile_px=64)
    with tifffile.TiffFile(path) as tiff:
        offset = tiff.pages.first.dataoffsets[0]
    content = bytearray(path.read_bytes())
    content[offset : offset + 4] = bytes.fromhex("8057df8f")
    path.write_bytes(content)
    program = "import sys; from udfs.wsi import open_slide; list(open_slide(sys.argv[1]).read_tiles([(0, 0)], 64))"
    root = Path(__file__).parents[2]
    done = subprocess.run(
        [sys.executable, "-c", program, str(path)], cwd=root, capture_output=True, text=True, check=False
    )
    assert done.returncode == 1, f"ended by signal {-done.returncode}"
    assert "SlideError: tile_data_corrupt" in done.stderr


def write_directories(
    path: Path, links: list[int], entries: dict[int, tuple[int, int, int]], big: bool = False
) -> Path:
    """A little-endian TIFF of directories alone, all with these entries: type, count, value.

    `links` says which directory follows each, by its number; what is past the last is none.
    """
    header, count, entry, link = ("HHQ", "Q", "HHQQ", "Q") if big else ("I", "H", "HHII", "I")
    begin, size = (16, 8 + 20 * len(entries) + 8) if big else (8, 2 + 12 * len(entries) + 4)
    first = (8, 0, begin) if big else (begin,)
    content = struct.pack(f"<2sH{header}", b"II", 43 if big else 42, *first)
    for following in links:
        content += struct.pack(f"<{count}", len(entries))
        content += b"".join(struct.pack(f"<{entry}", code, *told) for code, told in sorted(entries.items()))
        content += struct.pack(f"<{link}", begin + following * size if following < len(links) else 0)
    path.write_bytes(content)
    return path


def grey(width: int, height: int, block: int, count: int) -> dict[int, tuple[int, int, int]]:
    """A grey image in `count` deflated tiles, whose offsets and counts are both read from byte 0 on."""
    numbers = {256: width, 257: height, 258: 8, 259: 8, 262: 1, 277: 1, 322: block, 323: block}
    return {code: (4, 1, number) for code, number in numbers.items()} | {324: (4, count, 0), 325: (4, count, 0)}


@pytest.mark.parametrize(
    ("links", "entries", "said"),
    [
        ([1, 2, 3, 1], grey(64, 64, 64, 1), "follows itself"),
        ([0], grey(64, 64, 64, 1), "follows itself"),
        ([*range(1, 150), 140], grey(64, 64, 64, 1), "follows itself"),
        ([*range(1, 1_002)], grey(64, 64, 64, 1), "over the limit of 1,000"),
        ([1], grey(64, 64, 64, 1) | {330: (4, 10**9, 8)}, "over the limit of 1,000"),
        ([1], grey(240_000, 240_000, 16, 12), "need 225000000 blocks"),
        ([1], grey(240_000, 240_000, 16, 225_000_000), ""),
        ([1], grey(1_000_000, 60_000, 65_520, 16), "too large to read in parts"),
        ([1], grey(2**31, 1, 16, 12), "over the limit"),
    ],
    ids=["loop", "itself", "late loop", "many", "many below", "few blocks", "many blocks", "large blocks", "wide"],
)
@pytest.mark.parametrize("big", [False, True], ids=["classic", "bigtiff"])
def test_a_header_that_claims_much_costs_little(
    tmp_path: Path, links: list[int], entries: dict[int, tuple[int, int, int]], said: str, big: bool
) -> None:
    path = write_directories(tmp_path / "slide.tif", links, entries, big)
    open_slide_fails(path)  # what is imported and allocated once
    tracemalloc.start()
    try:
        assert said in open_slide_fails(path).message
        assert tracemalloc.get_traced_memory()[1] < MOST_BYTES
    finally:
        tracemalloc.stop()


def open_slide_fails(path: Path) -> SlideError:
    with pytest.raises(SlideError) as caught:
        open_slide(str(path))
    assert caught.value.code is not ErrorCode.INTERNAL_ERROR
    assert any(remedy in caught.value.message for remedy in REMEDIES)
    return caught.value


def test_a_block_past_the_largest_number_is_not_taken_for_one_that_is_left_out(tmp_path: Path) -> None:
    entries = grey(64, 64, 64, 1) | {324: (16, 1, 2**64 - 2), 325: (16, 1, 100)}
    path = write_directories(tmp_path / "slide.tif", [1], entries, big=True)
    assert open_slide_fails(path).code is ErrorCode.FILE_TRUNCATED


def test_a_parser_is_given_no_more_at_once_than_headers_need(tmp_path: Path) -> None:
    """They ask for what a damaged count says, which Python allocates before it reads."""
    path = tmp_path / "slide.tif"
    path.write_bytes(bytes(100))
    with open_stream(File(str(path))) as stream:
        for count in (2**31, 2**62, -1):
            with pytest.raises(ValueError, match="at once"):
                stream.read(count)
        assert len(stream.read(2**20)) == 100
