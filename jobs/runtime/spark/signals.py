"""The signals that ask a process to end: Ctrl-C, SIGTERM (YARN, Kubernetes) and SIGHUP (a terminal that closes)."""

import logging
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

NAMES = {signal.SIGINT: "Ctrl-C", signal.SIGTERM: "SIGTERM", signal.SIGHUP: "SIGHUP"}
Handler = Callable[[int, FrameType | None], None]
_log = logging.getLogger("slidelake.signals")


class Stopped(KeyboardInterrupt):
    """A signal asks this process to end; the text is the name of the signal."""


@contextmanager
def stop_signals() -> Iterator[None]:
    """Lets the first of these signals raise `Stopped` in the main thread while the block runs; no other disturbs the end.

    A signal that is ignored when the block begins stays ignored: nohup and a shell's background jobs want that.
    """
    before = {number: signal.getsignal(number) for number in NAMES}
    handle_stop_signals(_raise)
    try:
        yield
    finally:
        if _is_main_thread():
            for number, handler in before.items():
                if signal.getsignal(number) is not already_ending:
                    signal.signal(number, handler)


def handle_stop_signals(handler: Handler) -> None:
    """Sets the handler of the stop signals that are not ignored; for use in a `stop_signals` block."""
    if _is_main_thread():
        for number in NAMES:
            if signal.getsignal(number) is not signal.SIG_IGN:
                signal.signal(number, handler)


def already_ending(number: int, frame: FrameType | None) -> None:
    """Handles a signal while the process is ending: Ctrl-C gets a line, others may have been sent to all processes."""
    del frame
    if number == signal.SIGINT:
        say(r"still ending, which takes some seconds; Ctrl-\ ends it at once")


def say(text: str) -> None:
    """Logs a line from a thread of its own: a handler may run in the middle of another line."""
    threading.Thread(target=_log.warning, args=("slidelake: %s", text)).start()


def name_of(error: BaseException) -> str:
    """Returns what stopped a run, for people: the signal, else the type of the error."""
    if isinstance(error, KeyboardInterrupt):
        return str(error) or NAMES[signal.SIGINT]
    return type(error).__name__


def _is_main_thread() -> bool:
    return threading.current_thread() is threading.main_thread()  # others get no signals


def _raise(number: int, frame: FrameType | None) -> None:
    del frame
    handle_stop_signals(already_ending)
    raise Stopped(NAMES[signal.Signals(number)])
