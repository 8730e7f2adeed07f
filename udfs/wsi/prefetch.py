"""An iterator that runs in a thread, some items ahead of its consumer."""

import os
from collections.abc import Callable, Generator, Iterable
from contextlib import closing, nullcontext
from queue import SimpleQueue
from threading import Semaphore, Thread
from typing import TypeVar

Item = TypeVar("Item")


def prefetch(items: Iterable[Item], depth: int, stop: Callable[[], None] = lambda: None) -> Generator[Item]:
    """Yields the items in order, while a thread makes the next ones.

    Args:
        items: iterated in the thread; a generator is closed there, too.
        depth: number of items, 1 or more, that are made or being made before the consumer takes them. With 1, the next item
            is made while the consumer uses the present one.
        stop: ends whatever `items` waits for; called when the generator is closed or ends.

    Raises:
        RuntimeError: the consumer is in another process than at the first item, forked without the thread.
        Exception: what making an item raises, in the place of the item.
    """
    made: SimpleQueue[tuple[Item] | BaseException | None] = SimpleQueue()  # None: the end
    free = Semaphore(depth)
    is_over = False
    iterator = iter(items)

    def work() -> None:
        end = None
        try:
            with closing(iterator) if isinstance(iterator, Generator) else nullcontext():
                while free.acquire() and not is_over:
                    made.put((next(iterator),))  # no name keeps the item: its memory is the consumer's
        except StopIteration:
            pass
        except BaseException as error:
            end = error
        made.put(end)

    thread = Thread(target=work, name="slidelake-prefetch", daemon=True)
    thread.start()
    home = os.getpid()
    try:
        while True:
            if os.getpid() != home:
                raise RuntimeError(
                    f"an iterator of process {home} cannot go on in process {os.getpid()}, which was forked from it: begin it "
                    "in the process that uses the items"
                )
            entry = made.get()
            if not isinstance(entry, tuple):
                break
            free.release()
            yield entry[0]
            del entry
        if entry is not None:
            raise entry
    finally:
        if os.getpid() == home:
            is_over = True
            stop()
            free.release()
            thread.join()
