"""Bytes ahead of their use: each fetched once, in the order of use, no more on their way than the bound allows."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from udfs.wsi.reading.fetching import Fetcher

CONTENT = np.random.default_rng(1).integers(0, 256, 20_000, np.uint8).tobytes()


class Store:
    """A file whose requests are seen: begun, waited for, cancelled."""

    def __init__(self, gap_bytes: int) -> None:
        self.gap_bytes = gap_bytes
        self.begun: list[tuple[int, int]] = []
        self.under_way: dict[int, int] = {}
        self.cancelled = 0

    def request(self, start: int, count: int) -> Any:
        self.begun.append((start, count))
        self.under_way[start] = count
        store = self

        class Bytes:
            def result(self) -> bytes:
                store.under_way.pop(start)
                return CONTENT[start : start + count]

            def cancel(self) -> None:
                store.cancelled += 1

        return Bytes()


def reader(store: Store, ranges: Sequence[tuple[int, int]], **bounds: int) -> Fetcher:
    starts, counts = np.array(ranges, np.int64).reshape(-1, 2).T
    return Fetcher(store, starts, counts, **bounds)  # type: ignore[arg-type]


@settings(derandomize=True, deadline=None, max_examples=200)
@given(
    ranges=st.lists(st.tuples(st.integers(0, 19_000), st.integers(0, 900)), max_size=50),
    gap=st.integers(0, 500),
    most=st.integers(1000, 8000),
)
def test_every_range_comes_and_no_byte_twice(ranges: list[tuple[int, int]], gap: int, most: int) -> None:
    store = Store(gap)
    reading = reader(store, ranges, ahead_bytes=most, request_bytes=1000)
    for i, (start, count) in enumerate(ranges):
        assert bytes(reading.take(i)) == CONTENT[start : start + count]
    fetched = np.zeros(len(CONTENT), int)
    for start, count in store.begun:
        fetched[start : start + count] += 1
    assert fetched.max(initial=0) <= 1
    assert not store.under_way


def test_what_comes_next_is_on_its_way_within_the_bound() -> None:
    ranges = [(start, 1000) for start in range(0, 20_000, 2000)]
    store = Store(gap_bytes=10)
    reading = reader(store, ranges, ahead_bytes=3000, request_bytes=1000)
    assert store.begun == ranges[:3]  # before anybody waits for any
    for i in range(10):
        reading.take(i)
        assert store.begun == ranges[: i + 4]
        assert sum(store.under_way.values()) <= 3000


def test_a_range_larger_than_the_bound_still_comes() -> None:
    reading = reader(Store(0), [(0, 500), (600, 500)], ahead_bytes=10)
    assert bytes(reading.take(0)) == CONTENT[:500]
    assert bytes(reading.take(1)) == CONTENT[600:1100]


def test_what_is_given_up_is_cancelled() -> None:
    store = Store(0)
    reading = reader(store, [(0, 10), (100, 10), (200, 10)])
    reading.take(0)
    reading.close()
    assert store.cancelled == 2
