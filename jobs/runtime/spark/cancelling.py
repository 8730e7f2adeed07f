"""A stop signal during Spark's work: its jobs are cancelled, so that the call that waits for them ends by itself."""

import signal
import threading
from contextlib import suppress
from types import FrameType
from typing import Self

from py4j.protocol import Py4JError
from pyspark.sql import SparkSession

from jobs.runtime.spark.signals import NAMES, Stopped, already_ending, handle_stop_signals, say

_AGAIN_S = 0.2
_PATIENCE_S = 5.0  # with a call that does not wait for Spark's jobs, and with a JVM that does not answer


class Cancelling:
    """While the block runs, a stop signal cancels Spark's jobs; `stopped_by` is the name of the first signal, or None.

    An exception in the middle of a call to the JVM would leave the answer of that call to the next one. So the first signal
    raises nothing: a thread with a connection of its own cancels all jobs, over and over, and the call that waits for one of
    them ends with an error. Code that has not ended after some seconds waits for something else, and gets `Stopped`.
    """

    def __init__(self, session: SparkSession) -> None:
        self.stopped_by: str | None = None
        self._session = session
        self._number, self._is_overdue = 0, False
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._cancel, name="cancelling", daemon=True)

    def __enter__(self) -> Self:
        handle_stop_signals(self._handle)
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        """Lets Spark's jobs run again, so that the run can be recorded; from here on no signal raises anything.

        Raises `Stopped` in place of the error that a cancelled job ended in.
        """
        self._ended.set()
        if self.stopped_by is None:
            return
        handle_stop_signals(already_ending)
        self._thread.join(_PATIENCE_S)
        if error is not None and not isinstance(error, Stopped):
            raise Stopped(self.stopped_by) from error

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self._is_overdue:
            self._is_overdue = False
            raise Stopped(self.stopped_by)
        if self.stopped_by or self._ended.is_set():
            already_ending(number, frame)
            return
        self._number, self.stopped_by = number, NAMES[signal.Signals(number)]
        self._thread.start()

    def _cancel(self) -> None:
        say(f"{self.stopped_by}: Spark's work is cancelled ...")
        main = threading.main_thread().ident
        waited_s = 0.0
        while True:  # the next job may not have begun yet
            with suppress(Py4JError):
                self._session.sparkContext.cancelAllJobs()
            if self._ended.wait(_AGAIN_S):
                return
            waited_s += _AGAIN_S
            if waited_s >= _PATIENCE_S and main is not None:
                waited_s, self._is_overdue = 0.0, True
                signal.pthread_kill(main, self._number)
