"""Thousands of damaged slides: each gives pixels or a SlideError, in time and in memory, and no process dies of one.

They are read in a process of its own, one after the other; a mutant that ends it is known by its name, and
`python -m tests.core.test_fuzz NAME` reads that one again.
"""

import faulthandler
import json
import math
import resource
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile

from tests.slides.make import Pixels, position_pixels, write_slide
from tests.slides.mutate import BOMB_BYTES, mutate
from tests.slides.ndpi import NdpiImage, write_ndpi
from udfs.wsi import ErrorCode, Slide, SlideError, open_slide
from udfs.wsi.tiff.decode import SUPPORTED
from udfs.wsi.tiff.index import SlideIndex

MUTANTS = 200  # of each layout
LAYOUTS: dict[str, dict[str, Any]] = {
    "jpeg": {"subifds": True},
    "jpeg-strips": {"tile_px": None, "photometric": "rgb"},
    "jpeg-planar": {"compression": "jpeg", "planar": True},
    "lzw": {"compression": "lzw", "predictor": True, "subifds": True},
    "lzw-strips": {"compression": "lzw", "tile_px": None},
    "deflate": {"compression": "deflate", "predictor": True, "planar": True},
    "deflate-32946": {"compression": "deflate", "tile_px": None, "bigtiff": True},
    "none": {"compression": "none", "bigtiff": True, "subifds": True},
    "none-strips": {"compression": "none", "tile_px": None},
    "packbits": {"compression": "packbits"},
    "zstd": {"compression": "zstd", "bigtiff": True},
    "webp": {"compression": "webp"},
    "jpeg2000": {"compression": "jpeg2000"},
    "jpeg2000-33003": {"compression": "jpeg2000"},
    "jpeg2000-33004": {"compression": "jpeg2000", "planar": True},
    "jpeg2000-33005": {"compression": "jpeg2000", "tile_px": None},
}
CODES = {  # what a damaged file may be told to be
    *(ErrorCode.NOT_A_SLIDE, ErrorCode.HEADER_CORRUPT, ErrorCode.FILE_TRUNCATED, ErrorCode.SIZE_IMPLAUSIBLE),
    *(ErrorCode.UNSUPPORTED_FORMAT, ErrorCode.TILE_DATA_CORRUPT, ErrorCode.FILE_EMPTY),
}
MOST_MESSAGE = 800  # characters: it goes into a table and onto a terminal
LONGEST_S = 20.0  # for one mutant, which takes milliseconds: what takes this long hangs
MOST_BYTES = 128 * 2**20  # beside the result, where headers claim no more than small blocks
ADDRESS_BYTES = 4 * 2**30  # that the process may grow by: more is asked for only by who believes a header
_DEATHS = 4


@dataclass(frozen=True)
class Outcome:
    """What became of a mutant."""

    name: str
    found: list[str]  # codes, or "pixels", or what must not be
    peak_bytes: int
    seconds: float


def write_layouts(folder: Path) -> dict[str, Path]:
    """A good slide of each layout: 192 x 160 px, levels 1/2 and 1/4, a few KB."""
    ramp = position_pixels(192, 160)
    ramp[..., 2] = np.random.default_rng(0).integers(0, 256, (160, 192))
    paths = {}
    for name, options in LAYOUTS.items():
        about = "Aperio Image Library v10|AppMag = 20|MPP = 0.5"
        settings = {"tile_px": 64, "pyramid": True, "levels": (2, 4), "description": about, **options}
        paths[name] = write_slide(folder / f"{name}.tif", ramp, **settings)
        number = name.rpartition("-")[2]
        if number.isdigit():
            rename_compression(paths[name], int(number))
    images = [NdpiImage(ramp, 20.0), NdpiImage(ramp[::2, ::2], 10.0)]
    return paths | {"ndpi": write_ndpi(folder / "ndpi.ndpi", images)}


def rename_compression(path: Path, number: int) -> None:
    with tifffile.TiffFile(path) as tiff:
        places = [page.aspage().tags[259].valueoffset for page in tiff.pages]
    content = bytearray(path.read_bytes())
    for place in places:
        content[place : place + 2] = number.to_bytes(2, "little")
    path.write_bytes(content)


def first_blocks(path: Path) -> list[bytes]:
    with tifffile.TiffFile(path) as tiff:
        page = tiff.pages.first
        content = path.read_bytes()
        return [content[o : o + c] for o, c in zip(page.dataoffsets[:2], page.databytecounts[:2], strict=True)]


def look(path: Path) -> tuple[set[str], int]:
    """Codes of what goes wrong, and how many bytes the reader may take; raises where a promise is broken."""
    errors: list[SlideError] = []
    most = MOST_BYTES
    try:
        with open_slide(str(path)) as slide:
            assert isinstance(slide, Slide)
            assert slide.width_px > 0 < slide.height_px
            assert all(mpp is None or math.isfinite(mpp) for mpp in (slide.mpp_x, slide.mpp_y))
            assert all(math.isfinite(level.downsample) and level.downsample >= 1 for level in slide.levels)
            again = SlideIndex.from_bytes(slide.index.to_bytes())
            assert again is not None
            assert (again.width_px, again.vendor, len(again.levels)) == (
                slide.width_px,
                slide.vendor,
                len(slide.levels),
            )
            small = (slide.height_px // 16, slide.width_px // 16, 3)
            block = max(level.block_width * level.block_height for level in slide.levels)
            most += 3 * math.prod(small) + 16 * block
            try:
                mask = slide.downsampled(16)
                assert mask.shape == small and mask.dtype == np.uint8
            except SlideError as error:
                errors.append(error)
            for number, read in enumerate(slide.levels):
                try:
                    look_at_tiles(slide, number, read.width_px, read.height_px, read.downsample)
                except SlideError as error:
                    errors.append(error)
    except SlideError as error:
        errors.append(error)
    for met in errors:
        assert met.code in CODES, met
        assert str(path) in met.message, met
        assert met.message.isprintable(), met
        assert len(met.message) < MOST_MESSAGE, f"{len(met.message)} characters: {met.message[:MOST_MESSAGE]}"
        assert "MemoryError" not in met.message, met
    return {met.code.value for met in errors} or {"pixels"}, most


def look_at_tiles(slide: Any, level: int, width: int, height: int, downsample: float) -> None:
    places = [(0, 0), (width // 2, height // 2), (width - 40, height - 40), (-32, 16), (width, height)]
    corners = [(int(x * downsample), int(y * downsample)) for x, y in places]
    tiles: dict[int, Pixels] = {}
    for i, pixels in slide.read_tiles(corners, 64, level):
        assert pixels.shape == (64, 64, 3) and pixels.dtype == np.uint8
        tiles[i] = pixels
    assert sorted(tiles) == list(range(len(corners)))


def read_mutants(names: Sequence[str], folder: Path) -> None:
    """In the process that may die: the outcome of each, a line of JSON after one with its name."""
    good = write_layouts(folder)
    donors = [block for path in good.values() for block in first_blocks(path)]
    contents = {layout: path.read_bytes() for layout, path in good.items()}
    look(good["jpeg"])  # what is imported and allocated once
    resource.setrlimit(resource.RLIMIT_AS, (memory("VmSize") + ADDRESS_BYTES,) * 2)
    faulthandler.enable()
    for name in names:
        layout = name.partition(":")[0]
        path = folder / f"mutant{good[layout].suffix}"
        path.write_bytes(mutate(contents[layout], donors, name))
        print(name, flush=True)
        faulthandler.dump_traceback_later(LONGEST_S, exit=True)
        Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
        before, begun, most = memory("VmRSS"), time.perf_counter(), MOST_BYTES
        try:
            codes, most = look(path)
            found = sorted(codes)
        except Exception as error:
            found = [f"{type(error).__name__}: {error}"]
        seconds, peak = time.perf_counter() - begun, memory("VmHWM") - before
        faulthandler.cancel_dump_traceback_later()
        if peak > most:
            found.append(f"{peak:,} bytes where {most:,} are enough")
        print(json.dumps([found, peak, seconds]), flush=True)


def memory(key: str) -> int:
    """A size of this process in bytes, as Linux tells it."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(key))
    return int(line.split()[1]) * 1024


def outcomes(names: Sequence[str]) -> Iterator[Outcome]:
    """Read the mutants in one process, in another from the next on where one ends it."""
    left = list(names)
    for _ in range(_DEATHS):
        program = [sys.executable, "-m", "tests.core.test_fuzz", "-"]
        done = subprocess.run(
            program, cwd=Path(__file__).parents[2], input="\n".join(left), capture_output=True, text=True, check=False
        )
        lines = done.stdout.splitlines()
        for name, told in zip(lines[::2], lines[1::2], strict=False):
            yield Outcome(name, *json.loads(told))
        left = left[len(lines) // 2 :]
        if not left:
            return
        assert len(lines) % 2, done.stderr  # it died between two mutants
        yield Outcome(left.pop(0), [f"the process ended with status {done.returncode}:\n{done.stderr[-3000:]}"], 0, 0.0)
    yield from (Outcome(name, [f"not read: {_DEATHS} others ended their process"], 0, 0.0) for name in left)


@pytest.fixture(scope="module")
def found() -> list[Outcome]:
    return list(outcomes([f"{layout}:{seed}" for layout in [*LAYOUTS, "ndpi"] for seed in range(MUTANTS)]))


def test_every_compression_that_is_read_is_damaged(tmp_path: Path) -> None:
    compressions = set()
    for path in write_layouts(tmp_path).values():
        with tifffile.TiffFile(path) as tiff:
            compressions.add(int(tiff.pages.first.compression))
        assert look(path)[0] == {"pixels"}, path.name
    assert compressions >= {int(number) for number in SUPPORTED}


def test_a_damaged_slide_gives_pixels_or_a_slide_error_in_time_and_in_memory(found: list[Outcome]) -> None:
    allowed = {code.value for code in CODES} | {"pixels"}
    bad = [f"{outcome.name}: {'; '.join(outcome.found)}" for outcome in found if not allowed.issuperset(outcome.found)]
    assert not bad, (
        f"{len(bad)} of {len(found)} mutants; python -m tests.core.test_fuzz NAME reads one again\n"
        + "\n".join(bad[:20])
    )


def test_no_mutant_is_left_out_and_each_kind_of_end_is_met(found: list[Outcome]) -> None:
    assert len(found) == MUTANTS * (len(LAYOUTS) + 1) >= 2000
    ends = Counter(code for outcome in found for code in outcome.found)
    print(dict(ends), f"peak {max(o.peak_bytes for o in found):,} bytes, slowest {max(o.seconds for o in found):.2f} s")
    for end in ("pixels", "not_a_slide", "header_corrupt", "file_truncated", "unsupported_format", "tile_data_corrupt"):
        assert ends[end] >= 20, ends
    assert BOMB_BYTES > MOST_BYTES


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as place:
        read_mutants(sys.stdin.read().split() if sys.argv[1:] == ["-"] else sys.argv[1:], Path(place))
