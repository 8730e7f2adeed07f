"""The chain of a TIFF's directories, checked before a parser follows a loop or reads whatever sizes they claim."""

import io
from collections.abc import Iterator
from typing import BinaryIO, Literal, NamedTuple

from udfs.wsi.errors import ErrorCode, SlideError

_MAX_DIRECTORIES = 1000  # slides have some tens: levels, focal planes, label and macro
_MAX_ENTRIES = 4096  # of a directory; tifffile stops at more
_MAX_ENTRIES_IN_ALL = 50_000  # slides have some twenty per directory
_MAX_BLOCKS = 4_000_000  # of a directory; 60 Gpx have one million tiles of 256 px, or three million of Hamamatsu's
_MAX_NUMBERS_IN_ALL = 4 * _MAX_BLOCKS  # offsets and sizes of the blocks of all levels and focal planes
_MAX_TEXT_BYTES = 16 * 1024 * 1024  # in all, of descriptions and the like; Philips puts pictures there
_LONG_TEXT_BYTES = 64 * 1024
# Of long texts: elements, attributes, fields, lines, each of which parsers make an object of, of up to 400 bytes. Ventana's
# XMP has 16 for each tile, and 60 Gpx have 57,000 tiles of 1024 px.
_MAX_PARTS = 1_000_000

_SUBIFDS = 330
_PER_BLOCK = (273, 279, 324, 325, 65426, 65432)  # one number per block: of strips, of tiles, Hamamatsu's McuStarts
_FIRST_OTHER = 1000  # TIFF's own tags, and XMP, have lower codes; of the others, large values are never read
_VALUE_BYTES = {3: 2, 4: 4, 5: 8, 8: 2, 9: 4, 10: 8, 11: 4, 12: 8, 13: 4, 16: 8, 17: 8, 18: 8}  # by type; else 1


class _Entry(NamedTuple):
    code: int
    type: int
    n_values: int
    value: bytes  # or its place in the file
    place: int  # the value as a number

    @property
    def n_bytes(self) -> int:
        return self.n_values * _VALUE_BYTES.get(self.type, 1)


def check_chain(stream: BinaryIO, *, is_ndpi: bool) -> None:
    """Follow the chain to its end. A link out of the file ends it, too, and is left to the parser.

    Args:
        stream: a TIFF; left at its beginning.
        is_ndpi: whether the file is in Hamamatsu's dialect.

    Raises:
        SlideError: `header_corrupt` if the chain is a loop, or has too many directories, entries or texts;
            `size_implausible` if it lists too many blocks.
    """
    entries = numbers = text_bytes = parts = 0
    size = stream.seek(0, io.SEEK_END)  # which costs the stream its buffer
    for directory in _directories(stream, size, is_ndpi=is_ndpi):
        entries += len(directory)
        for entry in directory:
            if entry.n_bytes > size:  # a parser does not read it
                continue
            if entry.code in _PER_BLOCK:
                numbers += entry.n_values
                if entry.n_values > _MAX_BLOCKS or numbers > _MAX_NUMBERS_IN_ALL:
                    raise _too_many_blocks(entry.n_values)
            elif entry.code < _FIRST_OTHER and entry.code != _SUBIFDS:
                text_bytes += entry.n_bytes
                if entry.n_bytes > _LONG_TEXT_BYTES and text_bytes <= _MAX_TEXT_BYTES:
                    parts += _parts(stream, entry)
        if entries > _MAX_ENTRIES_IN_ALL:
            raise _damaged(
                f"{entries:,} entries or more in its directories, where {_MAX_ENTRIES_IN_ALL:,} are the limit"
            )
        if text_bytes > _MAX_TEXT_BYTES:
            raise _damaged(f"descriptions of {text_bytes:,} bytes or more, where {_MAX_TEXT_BYTES:,} are the limit")
        if parts > _MAX_PARTS:
            raise _damaged(f"descriptions of {parts:,} elements, fields or lines, where {_MAX_PARTS:,} are the limit")
    stream.seek(0)


def _parts(stream: BinaryIO, entry: _Entry) -> int:
    """The approximate number of elements, attributes, fields and lines in a text."""
    stream.seek(entry.place)
    text = stream.read(entry.n_bytes)
    return sum(text.count(mark) for mark in (b"<", b"=", b"|", b"\n"))


def _directories(stream: BinaryIO, end: int, *, is_ndpi: bool) -> Iterator[list[_Entry]]:
    """Yields the entries of each directory of the chain, then those of their SubIFDs. `end` is the size of the file."""
    stream.seek(0)
    head = stream.read(16)
    order: Literal["little", "big"] = "little" if head[:2] == b"II" else "big"
    is_big = int.from_bytes(head[2:4], order) == 43
    count_bytes, entry_bytes, offset_bytes = (8, 20, 8) if is_big else (2, 12, 4)
    link_bytes, value_at = 8 if is_ndpi else offset_bytes, 4 + offset_bytes

    def read(at: int) -> tuple[list[_Entry], int] | None:
        """Returns the entries of a directory and the place of the next; None if there are more than a parser takes."""
        stream.seek(at)
        count = int.from_bytes(stream.read(count_bytes), order)
        if count > _MAX_ENTRIES:
            return None
        content = stream.read(count * entry_bytes + link_bytes)
        entries = []
        for begin in range(0, count * entry_bytes, entry_bytes):
            code, kind, n_values = (
                int.from_bytes(content[begin + at : begin + to], order) for at, to in ((0, 2), (2, 4), (4, value_at))
            )
            value = content[begin + value_at : begin + entry_bytes]
            entries.append(_Entry(code, kind, n_values, value, int.from_bytes(value, order)))
        return entries, int.from_bytes(content[count * entry_bytes :], order)

    seen: set[int] = set()
    below: list[_Entry] = []
    directory = int.from_bytes(head[8:16] if is_big else head[4 : 4 + link_bytes], order)
    while 0 < directory < end:
        if directory in seen:
            raise SlideError(
                ErrorCode.HEADER_CORRUPT,
                f"the directory at byte {directory:,} follows upon itself: the header is damaged; upload the slide again",
            )
        seen.add(directory)
        found = read(directory)
        if found is None:
            break
        entries, directory = found
        below += [entry for entry in entries if entry.code == _SUBIFDS]
        _check_directories(len(seen) + sum(entry.n_values for entry in below))
        yield entries
    for entry in below:
        width = _VALUE_BYTES.get(entry.type, 1)
        if entry.n_bytes > offset_bytes:
            stream.seek(entry.place)
        numbers = stream.read(entry.n_bytes) if entry.n_bytes > offset_bytes else entry.value[: entry.n_bytes]
        for at in range(0, len(numbers), width):
            directory = int.from_bytes(numbers[at : at + width], order)
            found = read(directory) if 0 < directory < end else None
            if found:
                yield found[0]


def _check_directories(count: int) -> None:
    if count > _MAX_DIRECTORIES:
        raise _damaged(f"{count:,} directories or more, where {_MAX_DIRECTORIES:,} are the limit")


def _too_many_blocks(count: int) -> SlideError:
    return SlideError(
        ErrorCode.SIZE_IMPLAUSIBLE,
        f"the header lists {count:,} blocks, where {_MAX_BLOCKS:,} are the limit, and {_MAX_NUMBERS_IN_ALL // 2:,} in all "
        "levels: the header is damaged, or its blocks are too small; upload the slide again, or export it in tiles of 256 px",
    )


def _damaged(what: str) -> SlideError:
    return SlideError(
        ErrorCode.HEADER_CORRUPT,
        f"{what}: the header is damaged, or this is no slide; upload or export the slide again",
    )
