"""An iterator that runs in a thread, some items ahead of who takes them."""

import queue
import threading
from collections.abc import Generator
from contextlib import closing
from typing import TypeVar

Item = TypeVar("Item")


def in_background(items: Generator[Item, None, None], ahead: int) -> Generator[Item, None, None]:
    """The items, in order; what making them raises is raised here, in its place.

    The thread ends with the last item, or soon after the generator is closed.

    Args:
        items: iterated and closed in that thread, so what it hands out must not change afterwards.
        ahead: at most so many wait to be taken.
    """
    waiting: queue.Queue[tuple[Item | None, BaseException | None]] = queue.Queue(ahead)
    given_up = threading.Event()

    def put(entry: tuple[Item | None, BaseException | None]) -> None:
        while not given_up.is_set():
            try:
                waiting.put(entry, timeout=0.1)
                return
            except queue.Full:
                continue

    def run() -> None:
        try:
            with closing(items):
                for item in items:
                    put((item, None))
                    if given_up.is_set():
                        return
            put((None, StopIteration()))
        except BaseException as error:
            put((None, error))

    thread = threading.Thread(target=run, name="slidelake-background", daemon=True)
    thread.start()
    try:
        while True:
            item, error = waiting.get()
            if isinstance(error, StopIteration):
                return
            if error is not None:
                raise error
            yield item  # type: ignore[misc]  # an entry has one of the two
    finally:
        given_up.set()
        thread.join()
