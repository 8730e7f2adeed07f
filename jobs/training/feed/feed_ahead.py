"""A generator that runs in a thread, one item ahead of who takes them."""

import os
import threading
from collections.abc import Callable, Generator
from dataclasses import dataclass
from queue import SimpleQueue
from typing import TypeVar

from jobs.training.training_errors import FeedError

Item = TypeVar("Item")


@dataclass(frozen=True)
class _End:
    error: BaseException | None


def one_ahead(items: Generator[Item], stop: Callable[[], None]) -> Generator[Item]:
    """The items; the next one is made while one is in use.

    Args:
        items: what makes them; it is closed in its thread.
        stop: called when nothing is wanted any more: ends whatever `items` waits for.

    Raises:
        FeedError: the process was forked since it began, which leaves the thread behind.
    """
    made: SimpleQueue[Item | _End] = SimpleQueue()
    turn = threading.Semaphore(0)
    is_over = False

    def work() -> None:
        error = None
        try:
            for item in items:
                made.put(item)
                del item  # its memory is whose it is now
                turn.acquire()
                if is_over:
                    break
        except BaseException as raised:
            error = raised
        finally:
            items.close()
            made.put(_End(error))

    worker = threading.Thread(target=work, name="feed", daemon=True)
    worker.start()
    home = os.getpid()
    try:
        while not isinstance(item := _received(made, home), _End):
            turn.release()
            yield item
            del item
        if item.error:
            raise item.error
    finally:
        is_over = True
        if os.getpid() == home:
            stop()
            turn.release()
            worker.join()


def _received(made: "SimpleQueue[Item | _End]", home: int) -> Item | _End:
    if os.getpid() != home:
        raise FeedError(
            f"this epoch began in process {home} and can't go on in process {os.getpid()}, which was forked from it: call "
            "Feed.epoch where its batches are used"
        )
    return made.get()
