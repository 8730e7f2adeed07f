"""The signals that ask a process to end: Ctrl-C, SIGTERM (YARN, Kubernetes) and SIGHUP (a terminal that closes)."""

import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import Any

from py4j.protocol import Py4JError

NAMES = {signal.SIGINT: "Ctrl-C", signal.SIGTERM: "SIGTERM", signal.SIGHUP: "SIGHUP"}
Handler = Callable[[int, FrameType | None], None]


class Stopped(KeyboardInterrupt):
    """A signal asked this process to end; its text is the signal's name."""


@contextmanager
def stop_signals() -> Iterator[None]:
    """While the block runs, the first of these signals raises `Stopped` in the main thread, and no other disturbs the end.

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
    """Let another handler have those of the signals that are not ignored; for use in a `stop_signals` block."""
    if _is_main_thread():
        for number in NAMES:
            if signal.getsignal(number) is not signal.SIG_IGN:
                signal.signal(number, handler)


def already_ending(number: int, frame: FrameType | None) -> None:
    """Handle a signal that comes when the process is about to end: Ctrl-C gets a line, others may have been sent to all."""
    del frame
    if number == signal.SIGINT:
        say(r"still ending, which takes some seconds; Ctrl-\ ends it at once")


def pass_signals_on(jvm: Any) -> None:
    """Let the JVM send the signals that it gets to this process, and not end by them.

    The JVM may get a signal instead of Python, as its parent under spark-submit, or as well, in the same process group. By itself
    it would end at once, and no record of the run could be written. Java has no other interface for signals than sun.misc.Signal,
    which its module jdk.unsupported exports for such uses. A signal that was ignored when the JVM started stays ignored. A
    terminal sends Ctrl-C to Python, too, so it is passed on as SIGTERM and does not count as pressed twice.

    Args:
        jvm: of py4j.
    """
    with suppress(Py4JError):  # a platform whose JVM takes no such calls
        interface = jvm.java.lang.Class.forName("sun.misc.SignalHandler")
        for name, sent in (("INT", "TERM"), ("TERM", "TERM"), ("HUP", "HUP")):
            words = jvm.java.util.ArrayList()
            for word in ("sh", "-c", f"kill -{sent} {os.getpid()}"):
                words.add(word)
            send = jvm.java.beans.EventHandler.create(interface, jvm.java.lang.ProcessBuilder(words), "start")
            jvm.sun.misc.Signal.handle(jvm.sun.misc.Signal(name), send)


def say(text: str) -> None:
    """Print a line from a thread of its own: a handler may have come in the middle of another print."""
    threading.Thread(target=print, args=(f"slidelake: {text}",), kwargs={"file": sys.stderr}).start()


def name_of(error: BaseException) -> str:
    """What stopped a run, for people: the signal, else the type of the error."""
    if isinstance(error, KeyboardInterrupt):
        return str(error) or NAMES[signal.SIGINT]
    return type(error).__name__


def _is_main_thread() -> bool:
    return threading.current_thread() is threading.main_thread()  # others get no signals


def _raise(number: int, frame: FrameType | None) -> None:
    del frame
    handle_stop_signals(already_ending)
    raise Stopped(NAMES[signal.Signals(number)])
