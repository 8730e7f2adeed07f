"""The part of a slide's directories that reading needs: parsed once, kept as bytes, cut down for workers that read a part."""

import io
import json
import zlib
from base64 import b64decode, b64encode
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import BinaryIO

import numpy as np
from numpy.typing import ArrayLike, NDArray

from udfs.wsi.store import FileInfo

FORMAT = 1  # of the bytes; others are not read
_NUMBERS = ("width_px", "height_px", "block_width", "block_height", "planes", "downsample")

Numbers = NDArray[np.int64]


@dataclass(frozen=True)
class Coding:
    """How the blocks of a level are stored; numbers are TIFF's own."""

    compression: int
    photometric: int
    samples: int  # per pixel, each of 8 bits
    predictor: int = 1
    premultiplied: bool = False  # what kind of alpha 2 or 4 samples have
    is_tiled: bool = True
    jpeg_tables: bytes = field(default=b"", repr=False)  # shared by all blocks, without which none decodes
    jpeg_header: bytes = field(default=b"", repr=False)  # NDPI: what stands before the scan that blocks are parts of


@dataclass(frozen=True, eq=False)
class PyramidLevel:
    """One resolution of a slide, in a TIFF or in another format."""

    width_px: int
    height_px: int
    downsample: float  # level-0 pixels per pixel, along an edge


@dataclass(frozen=True, eq=False)
class Level(PyramidLevel):
    """A level in a TIFF, a grid of blocks numbered row by row; `planes` > 1 if colours are stored apart."""

    block_width: int
    block_height: int
    planes: int
    coding: Coding
    offsets: NDArray[np.uint64] = field(repr=False)  # of each block, plane after plane; 0: sparse, background
    counts: NDArray[np.uint64] = field(repr=False)
    listed: Numbers | None = field(default=None, repr=False)  # the blocks that offsets and counts list; None: all
    # Of the listed blocks, those that the writer left out while finer levels have data there; None: finer levels tell.
    lost: frozenset[int] | None = None

    @property
    def columns(self) -> int:
        """Number of blocks per row."""
        return -(-self.width_px // self.block_width)

    @property
    def rows(self) -> int:
        """Number of rows of blocks."""
        return -(-self.height_px // self.block_height)

    def has_bytes(self) -> NDArray[np.bool_]:
        """Returns whether the writer stored each listed block, bool [n]."""
        flags: NDArray[np.bool_] = ((self.offsets > 0) & (self.counts > 0)).reshape(self.planes, -1).any(axis=0)
        return flags

    def stored(self) -> Numbers:
        """Returns the numbers of the listed blocks that the writer did not leave out, int64 [n], ascending."""
        at = np.flatnonzero(self.has_bytes())
        return at if self.listed is None else self.listed[at]

    def byte_ranges(self, blocks: ArrayLike) -> tuple[Numbers, Numbers]:
        """Returns the place of blocks: starts and counts, int64 [n, planes], bytes; count 0 if the writer left the block out.

        Raises KeyError if this is a part of an index and does not list one of the blocks.
        """
        at = np.asarray(blocks, np.int64)
        if self.listed is not None:
            if not np.isin(at, self.listed).all():
                raise KeyError("the index was cut down to other blocks")
            at = np.searchsorted(self.listed, at)
        at = at[:, None] + np.arange(self.planes) * (len(self.offsets) // self.planes)
        starts = self.offsets[at].astype(np.int64)
        return starts, np.where(starts > 0, self.counts[at], 0).astype(np.int64)

    def only(self, blocks: ArrayLike) -> "Level":
        """Returns the level with just these blocks listed."""
        listed = np.unique(np.asarray(blocks, np.int64))
        starts, counts = self.byte_ranges(listed)
        offsets, sizes = (numbers.T.reshape(-1).astype("u8") for numbers in (starts, counts))
        return replace(self, listed=listed, offsets=offsets, counts=sizes)


@dataclass(frozen=True, eq=False)
class SlideIndex:
    """The content of a file's directories, and which file it was."""

    file: FileInfo
    width_px: int  # level 0
    height_px: int
    mpp_x: float | None  # um/px of level 0; None if the header has no plausible value
    mpp_y: float | None
    vendor: str
    levels: tuple[Level, ...]  # level 0 first
    warnings: tuple[str, ...] = ()  # what to know about the slide; `to_bytes` leaves them out

    def only(self, level: int, blocks: ArrayLike) -> "SlideIndex":
        """Returns the index for reading just these blocks of one level."""
        levels = [lv.only(blocks if i == level else []) for i, lv in enumerate(self.levels)]
        if levels[level].lost is None and all(finer.listed is None for finer in self.levels[:level]):
            levels[level] = replace(levels[level], lost=lost_blocks(self.levels[:level], levels[level]))
        return replace(self, levels=tuple(levels))

    def to_bytes(self) -> bytes:
        """Returns the index in compact form, some 2 bytes per block."""
        head = {"format": FORMAT, "file": asdict(self.file)}
        head |= {name: getattr(self, name) for name in ("width_px", "height_px", "mpp_x", "mpp_y", "vendor")}
        arrays: list[bytes] = []
        levels = []
        for level in self.levels:
            numbers = {name: getattr(level, name) for name in _NUMBERS}
            listed = None if level.listed is None else len(level.listed)
            lost = {} if level.lost is None else {"lost": sorted(level.lost)}
            coding = asdict(level.coding)
            levels.append(numbers | {"coding": coding, "listed": listed, "blocks": len(level.offsets)} | lost)
            if level.listed is not None:
                arrays.append(_pack(np.diff(level.listed, prepend=0)))
            offsets, counts = level.offsets.astype(np.int64), level.counts.astype(np.int64)
            # Writers put block after block, so the gap between two is nearly always the same.
            arrays += [_pack(offsets - np.append(0, (offsets + counts)[:-1])), _pack(counts)]
        text = json.dumps(head | {"levels": levels}, default=lambda data: b64encode(data).decode()).encode()
        return zlib.compress(len(text).to_bytes(4, "little") + text + b"".join(arrays))

    @classmethod
    def from_bytes(cls, data: bytes) -> "SlideIndex | None":
        """Returns the index from `to_bytes`; None if another version of slidelake wrote it."""
        content = zlib.decompress(data)
        end = 4 + int.from_bytes(content[:4], "little")
        head, arrays = json.loads(content[4:end]), io.BytesIO(content[end:])
        if head.pop("format") != FORMAT:
            return None
        levels = []
        for stored in head.pop("levels"):
            listed = None if stored["listed"] is None else np.cumsum(_unpack(arrays, stored["listed"]))
            gaps, counts = _unpack(arrays, stored["blocks"]), _unpack(arrays, stored["blocks"])
            coding = stored["coding"]
            coding |= {name: b64decode(coding[name]) for name in ("jpeg_tables", "jpeg_header")}
            level = Level(
                **{name: stored[name] for name in _NUMBERS},
                coding=Coding(**coding),
                offsets=(np.cumsum(gaps + counts) - counts).astype("u8"),
                counts=counts.astype("u8"),
                listed=listed,
                lost=frozenset(stored["lost"]) if "lost" in stored else None,
            )
            levels.append(level)
        return cls(FileInfo(**head.pop("file")), levels=tuple(levels), **head)


def lost_blocks(finer: Sequence[Level], level: Level) -> frozenset[int]:
    """Returns the listed blocks of a level that are missing while finer levels, which must list all their blocks, have data."""
    listed = np.arange(level.columns * level.rows) if level.listed is None else level.listed
    left_out = np.setdiff1d(listed, level.stored())
    if not len(left_out):
        return frozenset()
    rows, columns = np.divmod(left_out, level.columns)
    has_data = np.zeros(len(rows), bool)
    for source in finer:
        ratio = level.downsample / source.downsample
        top, bottom = _spanned(rows, level.block_height * ratio / source.block_height, source.rows)
        left, right = _spanned(columns, level.block_width * ratio / source.block_width, source.columns)
        table = np.zeros((source.rows + 1, source.columns + 1), np.int64)  # of sums, read between its corners
        table[1:, 1:] = source.has_bytes().reshape(source.rows, -1).cumsum(axis=0).cumsum(axis=1)
        has_data |= table[bottom, right] - table[top, right] - table[bottom, left] + table[top, left] > 0
    return frozenset(left_out[has_data].tolist())


def _spanned(at: Numbers, ratio: float, count: int) -> tuple[Numbers, Numbers]:
    """Returns the first block that blocks `at` span along an axis of `count` finer blocks, and the one after the last."""
    first, last = np.floor(at * ratio), np.ceil((at + 1) * ratio)
    return np.minimum(first, count).astype(np.int64), np.minimum(last, count).astype(np.int64)


def _pack(numbers: Numbers) -> bytes:
    """Returns the byte planes of numbers: the upper bytes are nearly all equal, so they compress to nothing."""
    return np.ascontiguousarray(numbers.astype("<i8").view(np.uint8).reshape(-1, 8).T).tobytes()


def _unpack(arrays: BinaryIO, count: int) -> Numbers:
    planes = np.frombuffer(arrays.read(8 * count), np.uint8).reshape(8, count)
    return np.ascontiguousarray(planes.T).view("<i8").reshape(-1).astype(np.int64)
