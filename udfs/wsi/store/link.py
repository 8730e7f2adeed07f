"""How far and how wide the way to a store is, as its answers tell."""

from dataclasses import dataclass, field
from threading import Lock

_FIRST_LATENCY_S, _FIRST_BYTES_PER_S = 0.03, 50e6  # of object stores, until there are answers to go by
_LARGE = 256 * 1024  # bytes; what is smaller tells of latency, not of width
_MEMORY = 0.1  # share of a new answer in the running estimate


@dataclass
class Link:
    """Running estimates from the requests made so far. Safe to share between threads."""

    latency_s: float = _FIRST_LATENCY_S
    bytes_per_s: float = _FIRST_BYTES_PER_S  # of one connection
    _lock: Lock = field(default_factory=Lock, repr=False)

    @property
    def gap_bytes(self) -> int:
        """A gap between two wanted ranges that takes as long to bring as a request of its own costs."""
        return int(self.latency_s * self.bytes_per_s)

    def learn(self, size_bytes: int, seconds: float) -> None:
        """Take one answer into account."""
        with self._lock:
            if size_bytes < _LARGE:
                self.latency_s += _MEMORY * (seconds - self.latency_s)
            else:
                # an answer quicker than the latency so far tells little of width, but not that it has no end
                width = size_bytes / max(seconds - self.latency_s, seconds / 10)
                self.bytes_per_s += _MEMORY * (width - self.bytes_per_s)
