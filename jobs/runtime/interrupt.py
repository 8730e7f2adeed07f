"""Ctrl-C: what Spark works on is cancelled, and the run ends in order, with its record."""

import signal
import sys
import threading
from contextlib import suppress
from types import FrameType, TracebackType
from typing import Any, Self

from py4j.protocol import Py4JError
from pyspark.sql import SparkSession

_AGAIN_S = 0.2
_PATIENCE_S = 5.0  # with a JVM that answers no more


class CtrlC:
    """While the block runs, Ctrl-C is this job's, not Spark's; `came` tells whether it came.

    The JVM of spark-submit, which is in the terminal's process group, too, would end at once, and with it the record of the run.
    And PySpark's own handler asks the JVM to cancel jobs on the connection on which the program may be in the middle of asking
    something else. So here a thread with a connection of its own asks for that: a call that is on its way ends by itself, with an
    error, as soon as its job is cancelled. Anywhere else KeyboardInterrupt is raised as well, and by a second Ctrl-C in any case.
    """

    def __init__(self, session: SparkSession) -> None:
        self.came = False
        self._session = session
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._cancel, name="ctrl-c", daemon=True)
        self._before: Any = None

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():  # others get no signals
            jvm: Any = self._session._jvm
            with suppress(Py4JError):  # where the JVM is not ours to tell: it ignores Ctrl-C as it is
                jvm.sun.misc.Signal.handle(jvm.sun.misc.Signal("INT"), jvm.sun.misc.SignalHandler.SIG_IGN)
            self._before = signal.signal(signal.SIGINT, self._handle)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """From here on Spark's jobs run again; a further Ctrl-C raises KeyboardInterrupt."""
        self._ended.set()
        if self._thread.is_alive():
            self._thread.join(_PATIENCE_S)
        if self._before is not None:
            signal.signal(signal.SIGINT, signal.default_int_handler if self.came else self._before)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        del number
        is_first, self.came = not self.came, True
        if is_first:
            self._thread.start()
        if not (is_first and _asks_the_jvm(frame)):
            raise KeyboardInterrupt

    def _cancel(self) -> None:
        """Cancel all jobs, over and over: the next may not have begun yet."""
        print("\nslidelake: interrupted: Spark cancels what it works on ...", file=sys.stderr)
        while True:
            with suppress(Py4JError):
                self._session.sparkContext.cancelAllJobs()
            if self._ended.wait(_AGAIN_S):
                return


def _asks_the_jvm(frame: FrameType | None) -> bool:
    while frame is not None:
        if str(frame.f_globals.get("__name__")).startswith("py4j."):
            return True
        frame = frame.f_back
    return False
