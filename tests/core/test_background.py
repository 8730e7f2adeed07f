"""An iterator in a thread: the same items in the same order, no further ahead than told, and nothing left behind."""

import threading
import time
from collections.abc import Generator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from udfs.wsi.prefetch import in_background


def threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name == "slidelake-background"]


def until(condition: object) -> None:
    deadline = time.monotonic() + 10
    while not condition():  # type: ignore[operator]
        assert time.monotonic() < deadline
        time.sleep(0.01)


class Source:
    """Counts; tells how far it got and whether it was closed. Fails at `broken`."""

    def __init__(self, count: int, broken: int | None = None) -> None:
        self.made, self.closed = 0, False
        self._count, self._broken = count, broken

    def items(self) -> Generator[int, None, None]:
        try:
            for i in range(self._count):
                if i == self._broken:
                    raise ValueError(f"item {i}")
                self.made += 1
                yield i
        finally:
            self.closed = True


@settings(derandomize=True, deadline=None, max_examples=30)
@given(count=st.integers(0, 30), ahead=st.integers(1, 4))
def test_items_come_in_order(count: int, ahead: int) -> None:
    source = Source(count)
    assert list(in_background(source.items(), ahead)) == list(range(count))
    assert source.closed and not threads()


@pytest.mark.parametrize("ahead", [1, 3])
def test_it_runs_ahead_but_not_further_than_told(ahead: int) -> None:
    source = Source(100)
    items = in_background(source.items(), ahead)
    assert next(items) == 0
    until(lambda: source.made == ahead + 2)  # one taken, so many waiting, one made and not put yet
    time.sleep(0.2)
    assert source.made == ahead + 2
    items.close()
    assert source.closed and not threads()


def test_an_error_comes_in_its_place() -> None:
    items = in_background(Source(9, broken=3).items(), 2)
    assert [next(items) for _ in range(3)] == [0, 1, 2]
    with pytest.raises(ValueError, match="item 3"):
        next(items)
    assert not threads()


def test_whoever_stops_early_leaves_no_thread() -> None:
    source = Source(100)
    items = in_background(source.items(), 1)
    next(items)
    items.close()
    assert source.closed and not threads()
