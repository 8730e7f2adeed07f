"""Files of little that claim much are refused before anything is allocated or decoded for the claim; and good ones are read.

They are read one after the other in a process of its own, which says what each took.
"""

import json
import resource
import subprocess
import sys
import tempfile
import time
import zlib
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest

from tests.slides import bombs
from tests.slides.bombs import (
    DEFLATE,
    EDGE,
    JPEG,
    JPEG2000,
    PACKBITS,
    WEBP,
    ZSTD,
    image,
    write_block,
    write_header,
)
from udfs.wsi import SlideError, open_slide

MOST_SECONDS = 1.0  # of a processor
MOST_BYTES = 500 * 2**20
ADDRESS_BYTES = 8 * 2**30  # that the process may grow by: a bomb ends in MemoryError, not in a dead machine
MB = 2**20
HOLE = 4096  # where zeros lie

GREY = image(64, 64, 64, offsets=(1, HOLE))
SCN = b'<?xml version="1.0"?><scn xmlns="http://www.leica-microsystems.com/scn/2010/10/01">'
JOINT = b'<TileJointInfo FlagJoined="1" Confidence="98" Direction="UP" Tile1="1" Tile2="2" OverlapX="0" OverlapY="0"/>'
LAUGHS = b"".join(b'<!ENTITY l%d "%s">' % (i, b"&l%d;" % (i - 1) * 10) for i in range(1, 12))

Maker = Callable[[Path], Path]


def block(data: Callable[[], bytes], compression: int, samples: int = 3) -> Maker:
    return lambda path: write_block(path, data(), compression, samples=samples)


def header(*directories: dict[int, bombs.Values], below: int = 0, n_bytes: int = 2 * HOLE) -> Maker:
    """`below` times the last directory as SubIFDs of the first."""
    chain = directories[:1] if below else directories
    return lambda path: write_header(path, chain, below=[directories[-1]] * below, n_bytes=n_bytes)


def boxed(stream: Callable[[], bytes], before: bytes = b"", palette: bytes = b"") -> Callable[[], bytes]:
    return lambda: bombs.jp2(stream(), before=before, palette=palette)


DECOY = bombs.codestream()[:100]
PALETTE = bombs.box(b"pclr", b"\x01\x00\xff" + b"\x07" * 255 + bytes(256 * 255))
REFUSED: dict[str, tuple[Maker, str]] = {
    **{
        f"jpeg2000 of {count:,} components": (
            block(partial(bombs.with_components, count), JPEG2000),
            "tile_data_corrupt",
        )
        for count in (1, 2, 4, 255, 16_384)
    },
    **{
        f"jpeg2000 of {bits} bits": (block(partial(bombs.with_components, 3, bits), JPEG2000), "tile_data_corrupt")
        for bits in (1, 16, 38)
    },
    **{
        f"jpeg2000 in tiles of {edge} px": (block(partial(bombs.with_tiles_of, edge), JPEG2000), "tile_data_corrupt")
        for edge in (0, 1, 16)
    },
    "jpeg2000 of many layers": (block(partial(bombs.with_layers, 65_535), JPEG2000), "tile_data_corrupt"),
    "jpeg2000 of many layers, said in a tile": (
        block(partial(bombs.with_layers, 65_535, None, True), JPEG2000),
        "tile_data_corrupt",
    ),
    "jpeg2000 of many precincts": (block(partial(bombs.with_layers, 1, 0), JPEG2000), "tile_data_corrupt"),
    "jpeg2000, large": (block(bombs.large_codestream, JPEG2000), "tile_data_corrupt"),
    "jpeg2000, large, in 33003": (block(bombs.large_codestream, 33003), "tile_data_corrupt"),
    **{
        f"jp2, large, decoy in {kind.decode()}": (
            block(boxed(bombs.large_codestream, before=bombs.box(kind, bytes(DECOY))), JPEG2000),
            "tile_data_corrupt",
        )
        for kind in (b"xml ", b"uuid", b"free")
    },
    "jp2, large, a decoy in the palette": (
        block(boxed(bombs.large_codestream, palette=bombs.box(b"res ", bytes(DECOY))), JPEG2000),
        "tile_data_corrupt",
    ),
    "jp2 with a palette": (
        block(
            lambda: bombs.jp2(bytes(bombs.codestream(bombs.picture()[..., 0])), palette=PALETTE, colours=1), JPEG2000, 1
        ),
        "tile_data_corrupt",
    ),
    **{
        f"jpeg of {count:,} scans": (block(partial(bombs.jpeg_of_scans, count), JPEG), "tile_data_corrupt")
        for count in (91, 20_000)
    },
    "jpeg, arithmetic, of many scans": (
        block(partial(bombs.jpeg_of_scans, 20_000, arithmetic=True), JPEG),
        "tile_data_corrupt",
    ),
    "sequential jpeg of many scans": (block(partial(bombs.sequential_jpeg, 20_000), JPEG), "tile_data_corrupt"),
    **{
        f"jpeg of many scans of one colour, behind {fill!r}": (
            block(partial(bombs.jpeg_of_planes, 1_000, fill), JPEG),
            "tile_data_corrupt",
        )
        for fill in (b"", b"\xff\xff", b"\xff\x01", b"\xff\xd0")
    },
    "jpeg with large tables": (header(GREY | {259: JPEG, 347: b"\xff\xd8" + bytes(100_000)}), "header_corrupt"),
    **{
        f"bomb of {name}": (block(partial(bombs.packed, compression, 192 * MB), compression), "tile_data_corrupt")
        for name, compression in (("deflate", DEFLATE), ("zstd", ZSTD), ("packbits", PACKBITS))
    },
    "webp, large": (block(partial(bombs.webp_of, 16_384, 16_384), WEBP), "tile_data_corrupt"),
    "a block of 4 GB": (header(GREY | {324: 2 * HOLE, 325: 4_000 * MB}, n_bytes=6_000 * MB), "tile_data_corrupt"),
    "six million tiles of a pixel": (
        header(image(2450, 2450, 1, offsets=(2450**2, HOLE)), n_bytes=2450**2 * 8 + 2 * HOLE),
        "size_implausible",
    ),
    "six million strips of a row": (
        header(image(2, 6_000_000, 0, offsets=(6_000_000, HOLE), rows=1), n_bytes=50 * MB),
        "size_implausible",
    ),
    "a million tiles of 16 px": (
        header(image(16_000, 16_000, 16, offsets=(10**6, HOLE)), n_bytes=10 * MB),
        "size_implausible",
    ),
    "seven million sizes of a block": (header(GREY | {325: (7 * 10**6, HOLE)}, n_bytes=64 * MB), "size_implausible"),
    "900 directories of many blocks": (
        header(*[GREY | {324: (3 * 10**6, HOLE)}] * 900, n_bytes=64 * MB),
        "size_implausible",
    ),
    "900 directories of many blocks below": (
        header(GREY, GREY | {324: (3 * 10**6, HOLE)}, below=900, n_bytes=64 * MB),
        "size_implausible",
    ),
    "900 directories of 100 entries": (header(*[GREY | dict.fromkeys(range(2000, 2100), 1)] * 900), "header_corrupt"),
    "900 directories of 100 entries below": (
        header(GREY, GREY | dict.fromkeys(range(2000, 2100), 1), below=900),
        "header_corrupt",
    ),
    "two thousand directories below": (header(GREY, GREY, below=2000), "header_corrupt"),
    "a long description": (header(GREY | {270: b"a" * 40 * MB}), "header_corrupt"),
    "one description a hundred times": (header(*[GREY | {270: (MB, HOLE)}] * 100, n_bytes=10 * MB), "header_corrupt"),
    "a description of elements": (header(GREY | {270: SCN + b"<a/>" * 10**6 + b"</scn>"}), "header_corrupt"),
    "a description in a description": (header(GREY | {270: SCN + b"<a>" * 10**6}), "header_corrupt"),
    "a description of attributes": (
        header(GREY | {270: SCN + b"<a " + b" ".join(b'a%d=""' % i for i in range(1_100_000)) + b"/></scn>"}),
        "header_corrupt",
    ),
    "a description of fields": (header(GREY | {270: b"Aperio Image Library|" + b"a=b|" * 10**6}), "header_corrupt"),
    "laughs": (
        header(GREY | {270: b'<?xml version="1.0"?><!DOCTYPE scn [<!ENTITY l0 "ha">' + LAUGHS + b"]><scn>&l11;</scn>"}),
        "header_corrupt",
    ),
    "a description of lines": (header(GREY | {270: b"ImageJ=1.54f\n" + b"a\n" * 2 * 10**6}), "header_corrupt"),
    "XMP of elements": (header(GREY | {700: b"<x>" + b"<a/>" * 10**6 + b"</x>"}), "header_corrupt"),
}
READ: dict[str, Maker] = {
    "a joint without end": header(GREY | {700: b"<TileJointInfo " * 20_000}),
    "many joints without end": header(GREY | {700: b"<TileJointInfo " * 190_000}),
    "the joints of a large slide": header(GREY | {700: b"<iScan>" + JOINT * 60_000 + b"</iScan>"}),
    "jpeg2000": block(lambda: bytes(bombs.codestream()), JPEG2000),
    "jpeg2000 of twenty layers": block(partial(bombs.with_layers, 20), JPEG2000),
    "jpeg2000 in tiles of 64 px": block(bombs.in_tiles_of_64_px, JPEG2000),
    **{
        f"jp2, {form}": block(lambda form=form: bombs.jp2(bytes(bombs.codestream()), form=form), JPEG2000)  # type: ignore[misc]
        for form in ("short", "long", "open")
    },
    "jp2 with other boxes": block(
        boxed(lambda: bytes(bombs.codestream()), before=bombs.box(b"xml ", b"<a/>")), JPEG2000
    ),
    "progressive jpeg": block(partial(bombs.jpeg_of_scans, 0), JPEG),
    "progressive jpeg of 100 scans": block(partial(bombs.jpeg_of_scans, 90), JPEG),
    **{
        f"jpeg of a scan for each colour, behind {fill!r}": block(partial(bombs.jpeg_of_planes, 1, fill), JPEG)
        for fill in (b"", b"\xff\xff", b"\xff\x01")
    },
}


class Took(NamedTuple):
    """What reading a file came to."""

    end: str  # a code or "pixels"
    message: str
    seconds: float
    n_bytes: int


def memory(key: str) -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(key))
    return int(line.split()[1]) * 1024


def read(path: Path) -> Took:
    Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
    before, begun = memory("VmRSS"), time.process_time()
    try:
        with open_slide(str(path)) as slide:
            slide.downsampled(16)
            list(slide.read_tiles([(0, 0)], 64))
        end = "pixels", ""
    except SlideError as error:
        end = error.code.value, error.message
    except Exception as error:
        end = type(error).__name__, str(error)
    return Took(*end, time.process_time() - begun, memory("VmHWM") - before)


def read_all() -> None:
    """In the process that may die."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "slide.tif"
        read(READ["jpeg2000"](path))  # what is imported and allocated once
        makers = READ | {name: maker for name, (maker, _) in REFUSED.items()}
        limit = memory("VmSize") + ADDRESS_BYTES
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
        for name, maker in makers.items():
            path.unlink(missing_ok=True)
            print(json.dumps([name, *read(maker(path))]), flush=True)


@pytest.fixture(scope="module")
def took() -> dict[str, Took]:
    done = subprocess.run(
        [sys.executable, "-m", "tests.core.test_bombs"],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-500:] + done.stderr[-3000:]
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    return {name: Took(*told) for name, *told in rows}


@pytest.mark.parametrize("name", REFUSED)
def test_what_claims_much_is_refused_at_once_and_costs_little(took: dict[str, Took], name: str) -> None:
    found = took[name]
    assert found.end == REFUSED[name][1], found
    assert found.seconds < MOST_SECONDS
    assert found.n_bytes < MOST_BYTES
    assert any(remedy in found.message for remedy in ("upload", "export", "scan"))


@pytest.mark.parametrize("name", READ)
def test_what_only_looks_like_it_is_read(took: dict[str, Took], name: str) -> None:
    assert took[name].end == "pixels", took[name]
    assert took[name].seconds < 10 * MOST_SECONDS
    assert took[name].n_bytes < MOST_BYTES


def sparse(path: Path, tiles_there: tuple[int, ...]) -> Path:
    """240,000 x 240,000 px, grey, in tiles of 256 px of which these alone have bytes."""
    columns = -(-240_000 // EDGE)
    n_bytes = columns**2 * 8
    entries = image(240_000, 240_000, EDGE, offsets=(columns**2, HOLE), compression=DEFLATE)
    write_header(path, [entries | {325: (columns**2, HOLE + n_bytes)}], n_bytes=HOLE + 2 * n_bytes)
    data = zlib.compress(bytes([40]) * EDGE**2)
    with path.open("r+b") as file:
        for tile in tiles_there:
            place = file.seek(0, 2)
            file.write(data)
            for at, number in ((HOLE, place), (HOLE + n_bytes, len(data))):
                file.seek(at + 8 * tile)
                file.write(number.to_bytes(8, "little"))
    return path


def test_a_mask_takes_as_long_as_the_bytes_that_are_there(tmp_path: Path) -> None:
    """A million tiles are left out, three are there: the first, one in the middle, the last."""
    columns = -(-240_000 // EDGE)
    tiles = (0, 400 * columns + 500, columns**2 - 1)
    path = sparse(tmp_path / "sparse.tif", tiles)
    begun = time.process_time()
    with open_slide(str(path)) as slide:
        small = slide.downsampled(16)
    assert time.process_time() - begun < 10  # 0.5 s where nothing else runs; a block at a time it was 196 s
    assert small.shape == (15_000, 15_000, 3)
    edge = EDGE // 16
    for tile in tiles:
        row, column = divmod(tile, columns)
        square = small[row * edge :, column * edge :][:edge, :edge]
        assert (square == 40).all() and square.size
        square[:] = 255
    assert all((rows == 255).all() for rows in np.array_split(small, 50))


if __name__ == "__main__":
    read_all()
