"""The chain of a TIFF's directories, checked before a parser follows a loop or reads whatever sizes they claim."""

import io
import struct
from collections.abc import Iterator
from typing import BinaryIO, Literal, NamedTuple

from udfs.wsi.errors import ErrorCode, SlideError, damaged_header

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

_SUBIFDS, _NDPI = 330, 65420
_PER_BLOCK = (273, 279, 324, 325, 65426, 65432)  # one number per block: of strips, of tiles, Hamamatsu's McuStarts
_FIRST_OTHER = 1000  # TIFF's own tags, and XMP, have lower codes; of the others, large values are never read
_VALUE_BYTES = {3: 2, 4: 4, 5: 8, 8: 2, 9: 4, 10: 8, 11: 4, 12: 8, 13: 4, 16: 8, 17: 8, 18: 8}  # by type; else 1


def check_chain(stream: BinaryIO) -> bool:
    """Follows the chain of a TIFF to its end, and returns whether the file is in Hamamatsu's dialect.

    A link out of the file ends the chain, too, and is left to the parser. Leaves the stream at its beginning. Raises SlideError:
    `header_corrupt` if the chain is a loop, or has too many directories, entries or texts; `size_implausible` if it lists too
    many blocks.
    """
    entries = numbers = text_bytes = parts = 0
    chain = _Chain(stream)
    for directory in chain.directories():
        entries += len(directory)
        for entry in directory:
            if entry.n_bytes > chain.file_bytes:  # a parser does not read it
                continue
            if entry.code in _PER_BLOCK:
                numbers += entry.n_values
                if entry.n_values > _MAX_BLOCKS or numbers > _MAX_NUMBERS_IN_ALL:
                    raise SlideError(
                        ErrorCode.SIZE_IMPLAUSIBLE,
                        f"the header lists {entry.n_values:,} blocks; the limit is {_MAX_BLOCKS:,}, and "
                        f"{_MAX_NUMBERS_IN_ALL // 2:,} in all levels: upload the slide again, or export it in tiles of 256 px",
                    )
            elif entry.code < _FIRST_OTHER and entry.code != _SUBIFDS:
                text_bytes += entry.n_bytes
                if entry.n_bytes > _LONG_TEXT_BYTES and text_bytes <= _MAX_TEXT_BYTES:
                    text = chain.value(entry)
                    parts += sum(text.count(mark) for mark in (b"<", b"=", b"|", b"\n"))
        _check(entries, _MAX_ENTRIES_IN_ALL, "entries in its directories")
        _check(text_bytes, _MAX_TEXT_BYTES, "bytes of descriptions")
        _check(parts, _MAX_PARTS, "elements, fields and lines in its descriptions")
    stream.seek(0)
    return chain.is_ndpi


class _Entry(NamedTuple):
    code: int
    type: int
    n_values: int
    field: bytes  # the value, or its place in the file

    @property
    def n_bytes(self) -> int:
        return self.n_values * _VALUE_BYTES.get(self.type, 1)


class _Chain:
    def __init__(self, stream: BinaryIO) -> None:
        self._stream = stream
        self.file_bytes = stream.seek(0, io.SEEK_END)  # which costs the stream its buffer
        stream.seek(0)
        head = stream.read(16)
        self._order: Literal["little", "big"] = "little" if head[:2] == b"II" else "big"
        is_big = self._number(head[2:4]) == 43
        self._count_bytes, self._offset_bytes, fields = (8, 8, "HHQ8s") if is_big else (2, 4, "HHI4s")
        self._entry = struct.Struct(("<" if self._order == "little" else ">") + fields)
        # Hamamatsu's dialect has 64-bit links behind the magic number of the 32-bit ones.
        first = self._directory(self._number(head[4:12])) if head.startswith(b"II*\0") else None
        self.is_ndpi = first is not None and any(entry.code == _NDPI for entry in first[0])
        self._link_bytes = 8 if self.is_ndpi else self._offset_bytes
        self._first = self._number(head[8:16] if is_big else head[4 : 4 + self._link_bytes])

    def directories(self) -> Iterator[list[_Entry]]:
        """Yields the entries of each directory, then those of their SubIFDs."""
        seen: set[int] = set()
        below: list[_Entry] = []
        at = self._first
        while found := self._directory(at):
            if at in seen:
                raise damaged_header(f"the directory at byte {at:,} follows itself")
            seen.add(at)
            entries, link = found
            at = self._number(link[: self._link_bytes])
            below += [entry for entry in entries if entry.code == _SUBIFDS]
            _check(len(seen) + sum(entry.n_values for entry in below), _MAX_DIRECTORIES, "directories")
            yield entries
        for entry in below:
            places, width = self.value(entry), _VALUE_BYTES.get(entry.type, 1)
            for begin in range(0, len(places), width):
                if found := self._directory(self._number(places[begin : begin + width])):
                    yield found[0]

    def value(self, entry: _Entry) -> bytes:
        if entry.n_bytes <= self._offset_bytes:
            return entry.field[: entry.n_bytes]
        self._stream.seek(self._number(entry.field))
        return self._stream.read(entry.n_bytes)

    def _directory(self, at: int) -> tuple[list[_Entry], bytes] | None:
        """Returns the entries at a place, and the 8 bytes behind them; None if a parser does not read them."""
        if not 0 < at < self.file_bytes:
            return None
        self._stream.seek(at)
        count = self._number(self._stream.read(self._count_bytes))
        if count > _MAX_ENTRIES:
            return None
        content = self._stream.read(count * self._entry.size).ljust(count * self._entry.size, b"\0")
        return [_Entry(*values) for values in self._entry.iter_unpack(content)], self._stream.read(8)

    def _number(self, data: bytes) -> int:
        return int.from_bytes(data, self._order)


def _check(count: int, limit: int, what: str) -> None:
    if count > limit:
        raise damaged_header(f"{count:,} {what} or more, over the limit of {limit:,}")
