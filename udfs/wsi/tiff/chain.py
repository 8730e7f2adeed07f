"""The chain of a TIFF's directories, walked before a parser does that would follow a loop until memory ends."""

import io
from typing import BinaryIO, Literal

from udfs.wsi.errors import ErrorCode, SlideError

_MAX_DIRECTORIES = 1000  # slides have some tens: levels, focal planes, label and macro
_MAX_ENTRIES = 4096  # of a directory; tifffile stops at more
_SUBIFDS = 330


def check_chain(stream: BinaryIO, *, is_ndpi: bool) -> None:
    """Follow the chain to its end, or to where it leads nowhere, which is for the parser to judge.

    Args:
        stream: of a file that begins as a TIFF does; left at its beginning.
        is_ndpi: it is in Hamamatsu's dialect.

    Raises:
        SlideError: `header_corrupt` where a directory comes a second time, or there are too many of them.
    """
    stream.seek(0)
    head = stream.read(16)
    order: Literal["little", "big"] = "little" if head[:2] == b"II" else "big"
    is_big = int.from_bytes(head[2:4], order) == 43
    count_bytes, entry_bytes, value_at, offset_bytes = (8, 20, 12, 8) if is_big else (2, 12, 8, 4)
    link_bytes = 8 if is_ndpi else offset_bytes
    begin = 8 if is_big else 4
    directory = int.from_bytes(head[begin : begin + link_bytes], order)
    end = stream.seek(0, io.SEEK_END)
    seen: set[int] = set()
    children = 0
    while 0 < directory < end:
        if directory in seen:
            raise SlideError(
                ErrorCode.HEADER_CORRUPT,
                f"the directory at byte {directory:,} follows upon itself: the header is damaged; upload the slide again",
            )
        seen.add(directory)
        stream.seek(directory)
        count = int.from_bytes(stream.read(count_bytes), order)
        if count > _MAX_ENTRIES:
            break
        content = stream.read(count * entry_bytes + link_bytes)
        for at in range(0, count * entry_bytes, entry_bytes):
            if int.from_bytes(content[at : at + 2], order) == _SUBIFDS:
                children += int.from_bytes(content[at + 4 : at + value_at], order)
        if len(seen) + children > _MAX_DIRECTORIES:
            raise SlideError(
                ErrorCode.HEADER_CORRUPT,
                f"{len(seen) + children:,} directories or more, where {_MAX_DIRECTORIES:,} are the limit: the header is "
                "damaged, or this is no slide; upload or export the slide again",
            )
        directory = int.from_bytes(content[count * entry_bytes :], order)
    stream.seek(0)
