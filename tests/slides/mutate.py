"""Mutations of slides: seeded damage to every field of a directory and to the data of every codec. Nothing here reads pixels.

`Mutant` finds what there is to damage by a TIFF parser of its own, so that a slide is damaged where readers look.
"""

import random
import struct
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import imagecodecs

BOMB_BYTES = 192 * 2**20
"""What a bomb unpacks to: far more than any block of the slides that are mutated."""

_TYPE_BYTES = {1: 1, 2: 1, 3: 2, 4: 4, 5: 8, 6: 1, 7: 1, 8: 2, 9: 4, 10: 8, 11: 4, 12: 8, 13: 4, 16: 8, 17: 8, 18: 8}
_SIGNED, _OFFSETS, _COUNTS, _SUBIFDS = 9, (273, 324), (279, 325), 330
_NUMBERS = [
    *(0, 1, 2, 3, 4, 5, 7, 8, 15, 16, 17, 255, 256, 4096, 32767, 65534, 65535, 2**16, 10**6, 10**6 + 1),
    *(2**31 - 1, 2**31, 2**32 - 16, 2**32 - 1, 2**32, 2**63 - 1, 2**63, 2**64 - 2, 2**64 - 1),
]
_GEOMETRY = (254, 256, 257, 258, 259, 262, 266, 277, 278, 284, 317, 322, 323, 338, 339)
_COMPRESSIONS = (1, 2, 5, 6, 7, 8, 32773, 32946, 33003, 33004, 33005, 34712, 34887, 34892, 50000, 50001, 50002, 65000)
_DIALECTS = (  # tags by which parsers know their vendors
    *(270, 271, 305, 330, 347, 513, 514, 529, 530, 532, 700, 32997, 33628, 33629, 34118, 34361, 34412, 34665, 34682),
    *(50838, 50839, 51123, 65200, 65326, 65420, 65421, 65422, 65424, 65426, 65427, 65432, 65441, 65449),
)
_LAUGHS = "".join(f'<!ENTITY l{i} "{f"&l{i - 1};" * 10}">' for i in range(1, 9))
_DESCRIPTIONS = (
    b"Aperio Image Library v10.0.51|AppMag = x|MPP = nan|Left = -1e999",
    b"Aperio Image Library|MPP = 0.5|ScannerType = " + b"A" * 4000,
    b"Aperio " + b"|" * 20_000,
    b"Aperio\0\xff\xfe\x80|MPP\xff = \xb5",
    b'{"shape": [100000000, 100000000, 3]}',
    b'{"shape": [-1, 0, 3], "axes": "\xff"}',
    b"ImageJ=1.11a\nimages=1000000000\nslices=1000000\nhyperstack=true\nmode=grayscale\n",
    b"state.configPath = ''\r\nscanimage.SI5.VERSION_MAJOR = 5\r\n",
    f'<?xml version="1.0"?><!DOCTYPE scn [<!ENTITY l0 "ha">{_LAUGHS}]><scn>&l8;</scn>'.encode(),
    b'<?xml version="1.0"?><scn xmlns="http://www.leica-microsystems.com/scn/2010/10/01"><collection sizeX="-1">',
    b'<?xml version="1.0"?><scn xmlns="http://www.leica-microsystems.com/scn/2010/10/01"><collection name="c" uuid="u" '
    b'sizeX="1e9" sizeY="0"><image name="i"><pixels sizeX="2147483648" sizeY="0"><dimension sizeX="0" ifd="999"/></pixels>'
    b"<view/></image></collection></scn>",
    b'<?xml version="1.0" encoding="UTF-8" ?><DataObject ObjectType="DPUfsImport"><Attribute/></DataObject>',
    b'<?xml version="1.0"?><OME xmlns="http://www.openmicroscopy.org/Schemas/OME/2016-06"><Image ID="Image:0">'
    b'<Pixels DimensionOrder="XYZCT" ID="P" SizeC="9999" SizeT="9999" SizeX="99999" SizeY="0" SizeZ="9" Type="uint8">'
    b'<TiffData IFD="99999"/></Pixels></Image></OME>',
    b"<?xml version='1.0'?><PerkinElmer-QPI-ImageDescription><ScanProfile/></PerkinElmer-QPI-ImageDescription>",
    b"Intelligent Imaging Innovations|MicroManager|<MetaData>" + b"<a>" * 10_000,
)


@dataclass(frozen=True)
class Entry:
    """An entry of a directory."""

    place: int  # of the entry, bytes from the file's begin
    code: int
    type: int
    count: int
    values: int  # where the values are

    @property
    def width(self) -> int:
        """Of one value, bytes."""
        return _TYPE_BYTES.get(self.type, 1)


class Mutant:
    """A slide that is being damaged. `content` is the file; `entries` are those of the good one."""

    def __init__(self, good: bytes, donors: Sequence[bytes], seed: str) -> None:
        """`donors` are blocks of any codec, in exchange for its own."""
        self.content, self.donors, self.random = bytearray(good), donors, random.Random(seed)
        self.order: Literal["little", "big"] = "little" if good[:2] == b"II" else "big"
        self.big = good[2 if self.order == "little" else 3] == 43
        self.offset_bytes, self.entry_bytes = (8, 20) if self.big else (4, 12)
        self.links = [8 if self.big else 4]  # places of pointers to directories
        self.counters: list[int] = []  # places of the numbers of entries
        self.entries: list[Entry] = []
        self._walk(self.number(self.links[0], self.offset_bytes))

    def number(self, place: int, width: int) -> int:
        """The unsigned number there."""
        return int.from_bytes(self.content[place : place + width], self.order)

    def put(self, place: int, width: int, number: int) -> None:
        """Write a number there, cut to its width."""
        if place + width <= len(self.content):
            self.content[place : place + width] = (number % 256**width).to_bytes(width, self.order)

    def append(self, data: bytes) -> int:
        """Where it is now, in bytes."""
        self.content += data
        return len(self.content) - len(data)

    def any_number(self) -> int:
        """One that a reader may stumble over."""
        size = len(self.content)
        near = (size - 1, size, size + 1, self.random.randrange(size), self.random.randrange(2 * size))
        return self.random.choice([*_NUMBERS, *near])

    def any_entry(self, *codes: int) -> Entry:
        """One of these codes, any where there is none of them."""
        return self.random.choice([entry for entry in self.entries if entry.code in codes] or self.entries)

    def blocks(self) -> list[tuple[Entry, Entry, int]]:
        """The entries of offsets and of counts, and the index of a block in both."""
        offsets = [entry for entry in self.entries if entry.code in _OFFSETS]
        counts = [entry for entry in self.entries if entry.code in _COUNTS]
        return [(a, b, i) for a, b in zip(offsets, counts, strict=True) for i in range(a.count)]

    def block(self) -> tuple[int, int]:
        """Offset and count of any block."""
        offsets, counts, i = self.random.choice(self.blocks())
        return (
            self.number(offsets.values + i * offsets.width, offsets.width),
            self.number(counts.values + i * counts.width, counts.width),
        )

    def replace_block(self, data: bytes) -> None:
        """Other data for any block, at the end of the file."""
        offsets, counts, i = self.random.choice(self.blocks())
        self.put(offsets.values + i * offsets.width, offsets.width, self.append(data))
        self.put(counts.values + i * counts.width, counts.width, len(data))

    def _walk(self, directory: int) -> None:
        width = 8 if self.big else 2
        while directory:
            self.counters.append(directory)
            for i in range(self.number(directory, width)):
                place = directory + width + i * self.entry_bytes
                code, kind = self.number(place, 2), self.number(place + 2, 2)
                count = self.number(place + 4, self.offset_bytes)
                inline = place + 4 + self.offset_bytes
                fits = count * _TYPE_BYTES[kind] <= self.offset_bytes
                entry = Entry(place, code, kind, count, inline if fits else self.number(inline, self.offset_bytes))
                self.entries.append(entry)
                if code == _SUBIFDS:
                    for n in range(count):
                        self.links.append(entry.values + n * entry.width)
                        self._walk(self.number(self.links[-1], entry.width))
            self.links.append(directory + width + self.number(directory, width) * self.entry_bytes)
            directory = self.number(self.links[-1], self.offset_bytes)


Mutation = Callable[[Mutant], None]


def flip_header(mutant: Mutant) -> None:
    """Bits of the header, of entries and of what they point at."""
    entry = mutant.any_entry()
    places = [
        *range(16),
        *range(entry.place, entry.place + mutant.entry_bytes),
        *range(entry.values, entry.values + min(64, entry.count * entry.width)),
    ]
    for place in mutant.random.sample(places, mutant.random.randint(1, 4)):
        mutant.content[place % len(mutant.content)] ^= mutant.random.randint(1, 255)


def change_field(mutant: Mutant) -> None:
    """Type, count or value of an entry."""
    entry, wide = mutant.any_entry(), mutant.offset_bytes
    field = mutant.random.choice(("type", "count", "value", "negative"))
    if field == "type":
        mutant.put(entry.place + 2, 2, mutant.random.choice([*range(20), 255, 65535]))
    elif field == "count":
        mutant.put(entry.place + 4, wide, mutant.random.choice([mutant.any_number(), entry.count + 1, entry.count - 1]))
    elif field == "value":
        mutant.put(entry.place + 4 + wide, wide, mutant.any_number())
    else:
        mutant.put(entry.place + 2, 2, _SIGNED)
        mutant.put(entry.place + 4 + wide, 4, -mutant.random.randint(1, 70_000))


def change_geometry(mutant: Mutant) -> None:
    """Sizes, samples, compression, predictor and the like."""
    entry = mutant.any_entry(*_GEOMETRY)
    codes = [*_COMPRESSIONS] if entry.code == 259 else [mutant.any_number(), mutant.random.randrange(400)]
    mutant.put(entry.values, entry.width, mutant.random.choice(codes))


def change_tag(mutant: Mutant) -> None:
    """What an entry is about: a dialect that this file is not written in."""
    entry = mutant.any_entry()
    mutant.put(entry.place, 2, mutant.random.choice([*_DIALECTS, *_GEOMETRY, *_OFFSETS, *_COUNTS]))


def change_array(mutant: Mutant) -> None:
    """Some of the offsets or counts of blocks."""
    entry = mutant.any_entry(*_OFFSETS, *_COUNTS)
    for _ in range(mutant.random.randint(1, 3)):
        place = entry.values + mutant.random.randrange(entry.count) * entry.width
        mutant.put(place, entry.width, mutant.any_number())


def relink(mutant: Mutant) -> None:
    """The chain of directories: loops, dead ends, the middle of something."""
    link = mutant.random.choice(mutant.links)
    mutant.put(link, mutant.offset_bytes, mutant.random.choice([*mutant.counters, *mutant.links, mutant.any_number()]))


def recount_entries(mutant: Mutant) -> None:
    """How many entries a directory has."""
    mutant.put(mutant.random.choice(mutant.counters), 8 if mutant.big else 2, mutant.any_number())


def describe(mutant: Mutant) -> None:
    """A description in the dialect of a vendor, hostile."""
    text, entry = mutant.random.choice(_DESCRIPTIONS), mutant.any_entry(270, 305, 282)
    mutant.put(entry.place, 2, mutant.random.choice((270, 270, 270, 305, 700, 65449)))
    mutant.put(entry.place + 2, 2, mutant.random.choice((2, 1, 7)))
    mutant.put(entry.place + 4, mutant.offset_bytes, len(text))
    mutant.put(entry.place + 4 + mutant.offset_bytes, mutant.offset_bytes, mutant.append(text))


def cut_file(mutant: Mutant) -> None:
    """The rest of the file is not there."""
    del mutant.content[mutant.random.randrange(len(mutant.content)) :]


def flip_block(mutant: Mutant) -> None:
    """Bits of a block, at its begin, where codecs keep headers, or anywhere."""
    start, count = mutant.block()
    reach = mutant.random.choice((min(count, 64), count))
    for _ in range(mutant.random.randint(1, 4)):
        mutant.content[start + mutant.random.randrange(reach)] ^= mutant.random.randint(1, 255)


def spoil_block(mutant: Mutant) -> None:
    """A part of a block zeroed, random or of one value; or its count shortened, or nothing."""
    offsets, counts, i = mutant.random.choice(mutant.blocks())
    start = mutant.number(offsets.values + i * offsets.width, offsets.width)
    count = mutant.number(counts.values + i * counts.width, counts.width)
    begin, end = sorted(mutant.random.randrange(count + 1) for _ in range(2))
    way = mutant.random.randrange(4)
    if way == 0:
        mutant.content[start + begin : start + end] = bytes(end - begin)
    elif way == 1:
        mutant.content[start + begin : start + end] = mutant.random.randbytes(end - begin)
    elif way == 2:
        mutant.content[start + begin : start + end] = b"\xff" * (end - begin)
    else:
        mutant.put(counts.values + i * counts.width, counts.width, mutant.random.choice((0, 1, 2, 3, begin, end)))


def swap_block(mutant: Mutant) -> None:
    """A block of this slide in place of another, of the same or another level."""
    start, count = mutant.block()
    mutant.replace_block(bytes(mutant.content[start : start + count]))


def exchange_block(mutant: Mutant) -> None:
    """A block of another codec, now and then cut."""
    data = mutant.random.choice(mutant.donors)
    mutant.replace_block(data if mutant.random.random() < 0.7 else data[: mutant.random.randrange(len(data) + 1)])


def bomb(mutant: Mutant) -> None:
    """Little data that unpacks to much."""
    mutant.replace_block(mutant.random.choice(bombs()))


def claim(mutant: Mutant) -> None:
    """A codestream that claims another size, depth or number of components than its block has."""
    start, count = mutant.block()
    data = bytearray(mutant.content[start : start + count])
    for marker, fields in _CLAIMS.items():
        at = data.find(marker)
        if at < 0:
            continue
        for _ in range(mutant.random.randint(1, 2)):
            place, width = mutant.random.choice(fields)
            number = mutant.any_number() if mutant.random.random() < 0.8 else mutant.random.randrange(256)
            data[at + place : at + place + width] = (number % 256**width).to_bytes(width, "big")
    mutant.replace_block(bytes(data))


HEADER: tuple[Mutation, ...] = (
    *(flip_header, change_field, change_field, change_geometry, change_geometry, change_tag, change_array, relink),
    *(recount_entries, describe, cut_file),
)
BLOCKS: tuple[Mutation, ...] = (flip_block, flip_block, spoil_block, swap_block, exchange_block, bomb, claim, claim)

_CLAIMS: dict[bytes, list[tuple[int, int]]] = {
    # JPEG: precision, height, width, components, sampling factors; of baseline, progressive and other frames
    b"\xff\xc0": [(1, 1), (4, 1), (5, 2), (7, 2), (9, 1), (11, 1), (14, 1)],
    b"\xff\xc2": [(1, 1), (4, 1), (5, 2), (7, 2), (9, 1), (11, 1)],
    b"\xff\xda": [(2, 2), (4, 1), (5, 1), (6, 1)],
    # JPEG 2000: reference grid, offsets, tiles, components, depth and subsampling; then coding style and quantisation
    b"\xff\x4f\xff\x51": [*((6 + 4 * i, 4) for i in range(9)), (42, 2), (44, 1), (45, 1), (46, 1)],
    b"\xff\x52": [(4, 1), (5, 1), (6, 2), (8, 1), (9, 1), (10, 1), (11, 1), (12, 1)],
    b"\xff\x90": [(4, 2), (6, 4), (10, 1), (11, 1)],
    # WebP: sizes of chunks, lossy and lossless sizes
    b"RIFF": [(4, 4), (15, 1), (16, 4), (20, 4), (21, 4), (26, 2), (28, 2)],
    # zstd: frame header; zlib: window and dictionary
    b"\x28\xb5\x2f\xfd": [(4, 1), (5, 1), (5, 4), (5, 8)],
    b"\x78": [(0, 1), (1, 1), (2, 1)],
}

_bombs: list[bytes] = []


def bombs() -> list[bytes]:
    """Each unpacks to BOMB_BYTES of one value."""
    if not _bombs:
        zeros = bytes(BOMB_BYTES)
        packed = struct.pack("BB", 0x81, 0) * (BOMB_BYTES // 128)  # PackBits: 128 zeros
        _bombs.extend(
            [zlib.compress(zeros), bytes(imagecodecs.zstd_encode(zeros)), bytes(imagecodecs.lzw_encode(zeros)), packed]
        )
    return _bombs


def mutate(good: bytes, donors: Sequence[bytes], seed: str) -> bytes:
    """A damaged slide, the same for the same seed: one to three mutations, of the directories or of the blocks."""
    mutant = Mutant(good, donors, seed)
    kind = mutant.random.choice((HEADER, BLOCKS))
    for mutation in mutant.random.choices(kind, k=mutant.random.choice((1, 1, 1, 2, 3))):
        try:
            mutation(mutant)
        except (IndexError, ValueError):  # an earlier one took away what it damages
            break
    return bytes(mutant.content)
