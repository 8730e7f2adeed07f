"""What is known of a file without its content: its size and version, and what reading it has cost."""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

_VERSION_KEYS = (
    *("ETag", "etag", "md5Hash", "Content-MD5", "Digest"),
    *("mtime", "LastModified", "last_modified", "Last-Modified", "updated", "created"),
)


@dataclass(frozen=True)
class FileInfo:
    """A file at one moment. `version` changes whenever its content may have: the store's etag, else size and mtime."""

    size_bytes: int
    version: str

    @classmethod
    def from_fsspec(cls, info: Mapping[str, Any]) -> "FileInfo":
        """From what `fs.info`, `fs.ls` and `fs.find` give; each store has its own word for the same thing."""
        size = int(info["size"])
        for key in _VERSION_KEYS:
            if info.get(key):
                return cls(size, f"{size}-{str(info[key]).strip(chr(34))}")
        return cls(size, str(size))

    @classmethod
    def from_stat(cls, stat: os.stat_result) -> "FileInfo":
        """From `Path.stat` of a file on a disk, which follows links: size and time are those of the file they lead to."""
        return cls(stat.st_size, f"{stat.st_size}-{stat.st_mtime}")


@dataclass
class Traffic:
    """What reading cost: requests (each attempt counts), bytes that came, seconds that somebody waited for them."""

    requests: int = 0
    bytes: int = 0
    waited_s: float = 0.0

    def __add__(self, other: "Traffic") -> "Traffic":
        return Traffic(self.requests + other.requests, self.bytes + other.bytes, self.waited_s + other.waited_s)
