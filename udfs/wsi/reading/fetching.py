"""Bytes of blocks in the order of their use, fetched ahead in few requests, with a bound on the bytes in memory."""

import numpy as np

from udfs.wsi.reading.blocks_of_tiles import merge_ranges
from udfs.wsi.store import File, Pending
from udfs.wsi.tiff.index import Numbers


class Fetcher:
    """Fetches ranges of a file; each is taken once, in the order given."""

    def __init__(
        self, file: File, starts: Numbers, counts: Numbers, *, ahead_bytes: int = 32 << 20, request_bytes: int = 2 << 20
    ) -> None:
        """Begins to fetch. `starts` and `counts`: int64 [n], bytes, in the order of use; a count of 0 is no range.

        `ahead_bytes` is the most that is requested and not used yet, beside what is needed now; `request_bytes` is the most of
        one request, unless one range is larger.
        """
        self._file, self._most_ahead_bytes = file, ahead_bytes
        self._starts, self._counts = starts.tolist(), counts.tolist()
        real = np.flatnonzero(counts)
        spans = merge_ranges(starts[real], counts[real], file.gap_bytes, request_bytes)
        self._spans = sorted(spans, key=lambda span: min(span.members))  # by the first use of a range
        numbers = real.tolist()
        self._span_of = {numbers[member]: i for i, span in enumerate(self._spans) for member in span.members}
        self._left = [len(span.members) for span in self._spans]
        self._pending: dict[int, Pending] = {}
        self._arrived: dict[int, memoryview] = {}
        self._next = 0  # span to request
        self._ahead_bytes = 0
        self._request_ahead()

    def take(self, i: int) -> memoryview:
        """Waits for the bytes of range `i`, empty if its count is 0. Raises what `File.request` raises."""
        if not self._counts[i]:
            return memoryview(b"")
        number = self._span_of[i]
        span = self._spans[number]
        while self._next <= number:  # needed now, whatever else is on its way
            self._request(self._next)
        if number not in self._arrived:
            self._arrived[number] = memoryview(self._pending.pop(number).result())
        begin = self._starts[i] - span.start
        data = self._arrived[number][begin : begin + self._counts[i]]
        self._left[number] -= 1
        if not self._left[number]:
            del self._arrived[number]
            self._ahead_bytes -= span.stop - span.start
            self._request_ahead()
        return data

    def close(self) -> None:
        """Gives up what is on its way."""
        for request in self._pending.values():
            request.cancel()
        self._pending.clear()
        self._arrived.clear()
        self._next = len(self._spans)

    def _request_ahead(self) -> None:
        for number in range(self._next, len(self._spans)):
            span = self._spans[number]
            if self._ahead_bytes + span.stop - span.start > self._most_ahead_bytes:
                return
            self._request(number)

    def _request(self, number: int) -> None:
        span = self._spans[number]
        self._pending[number] = self._file.request(span.start, span.stop - span.start)
        self._ahead_bytes += span.stop - span.start
        self._next = number + 1
