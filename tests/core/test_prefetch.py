"""An iterator in a thread: the same items in the same order, at most `depth` ahead, and nothing left behind."""

import os
import threading
import time
import weakref
from collections.abc import Generator

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from udfs.wsi.prefetch import prefetch


def threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name == "slidelake-prefetch"]


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
@given(count=st.integers(0, 30), depth=st.integers(1, 4))
def test_items_come_in_order(count: int, depth: int) -> None:
    source = Source(count)
    assert list(prefetch(source.items(), depth)) == list(range(count))
    assert source.closed and not threads()


@pytest.mark.parametrize("depth", [1, 3])
def test_it_runs_ahead_but_no_further_than_its_depth(depth: int) -> None:
    source = Source(100)
    items = prefetch(source.items(), depth)
    assert next(items) == 0
    until(lambda: source.made == depth + 1)  # one is taken
    time.sleep(0.2)
    assert source.made == depth + 1
    items.close()
    assert source.closed and not threads()


def test_an_error_comes_in_its_place() -> None:
    items = prefetch(Source(9, broken=3).items(), 2)
    assert [next(items) for _ in range(3)] == [0, 1, 2]
    with pytest.raises(ValueError, match="item 3"):
        next(items)
    assert not threads()


def test_whoever_stops_early_leaves_no_thread() -> None:
    source = Source(100)
    items = prefetch(source.items(), 1)
    next(items)
    items.close()
    assert source.closed and not threads()


def test_an_item_that_waits_for_something_is_told_to_stop() -> None:
    wanted, over = threading.Event(), threading.Event()

    def items() -> Generator[int]:
        yield 0
        wanted.set()
        over.wait(10)

    generator = prefetch(items(), 1, over.set)
    assert next(generator) == 0
    assert wanted.wait(10)
    generator.close()
    assert over.is_set() and not threads()


def test_any_iterable_will_do() -> None:
    assert list(prefetch(range(5), 2)) == [0, 1, 2, 3, 4]


def test_an_item_that_the_consumer_gave_up_is_freed() -> None:
    arrays = prefetch((np.zeros(9) for _ in range(9)), 2)
    for _ in range(3):
        array = next(arrays)
        first = weakref.ref(array)
        del array
        next(arrays)
        assert first() is None
    arrays.close()


def test_a_forked_process_is_refused_instead_of_waiting_forever() -> None:
    items = prefetch(iter(range(9)), 1)
    next(items)
    reader, writer = os.pipe()
    if not os.fork():
        try:
            next(items)
        except RuntimeError as error:
            os.write(writer, str(error).encode())
        finally:
            os._exit(0)
    assert b"was forked from it" in os.read(reader, 1000)
    os.wait()
    assert next(items) == 1
    items.close()
