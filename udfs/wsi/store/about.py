"""What is known of a file without its content, what reading it has cost, and how fast its store answers."""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

_CONTENT_KEYS = ("ETag", "etag", "md5Hash", "Content-MD5", "Digest")  # of the content, whatever URL it has
_VERSION_KEYS = (*_CONTENT_KEYS, "mtime", "LastModified", "last_modified", "Last-Modified", "updated", "created")

_LARGE = 256 * 1024  # bytes; what is smaller tells of latency, not of width
_MEMORY = 0.1  # share of a new answer in the running estimate


@dataclass(frozen=True)
class FileInfo:
    """A file at one moment. `version` changes if the content may have changed: the store's etag, else size and mtime."""

    size_bytes: int
    version: str

    @classmethod
    def from_fsspec(cls, info: Mapping[str, Any]) -> "FileInfo":
        """Makes it of what `fs.info`, `fs.ls` and `fs.find` return; each store has its own word for the same thing."""
        size = int(info["size"])
        for key in _VERSION_KEYS:
            if info.get(key):
                return cls(size, f"{size}-{str(info[key]).strip(chr(34))}")
        return cls(size, str(size))

    @classmethod
    def from_stat(cls, stat: os.stat_result) -> "FileInfo":
        """Makes it of `Path.stat`, which follows links: size and time are those of the target."""
        return cls(stat.st_size, f"{stat.st_size}-{stat.st_mtime}")


def has_etag(info: Mapping[str, Any]) -> bool:
    """Returns whether the version of `FileInfo.from_fsspec` is a strong etag or a hash: it names a content, not a time."""
    return not str(next((info[key] for key in _CONTENT_KEYS if info.get(key)), "W/")).startswith("W/")


@dataclass
class Traffic:
    """The cost of reading: requests (each attempt counts), bytes received, seconds of waiting for them."""

    requests: int = 0
    bytes: int = 0
    waited_s: float = 0.0


@dataclass
class Link:
    """Latency and width of the way to a store, estimated from its answers so far on fsspec's one event loop."""

    latency_s: float = 0.03  # as of object stores, until there are answers to go by
    bytes_per_s: float = 50e6  # of one connection

    @property
    def gap_bytes(self) -> int:
        """A gap between two wanted ranges that takes as long to receive as one more request takes."""
        return int(self.latency_s * self.bytes_per_s)

    def learn(self, size_bytes: int, seconds: float) -> None:
        """Takes one answer into account."""
        if size_bytes < _LARGE:
            self.latency_s += _MEMORY * (seconds - self.latency_s)
        else:
            # an answer quicker than the latency so far tells little of width, but not that it has no end
            width = size_bytes / max(seconds - self.latency_s, seconds / 10)
            self.bytes_per_s += _MEMORY * (width - self.bytes_per_s)
