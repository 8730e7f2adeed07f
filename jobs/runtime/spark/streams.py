"""Where messages and bars go: stderr, also under spark-submit, which runs Python with stdout and stderr in one pipe."""

import logging
import os
import stat
import sys
import time
from typing import TextIO

from tqdm import tqdm


def is_submitted() -> bool:
    """Returns whether spark-submit started this process, and a JVM before it."""
    return "PYSPARK_GATEWAY_PORT" in os.environ


def terminal() -> TextIO | None:
    """Returns the terminal that a bar can be drawn on; None if there is none."""
    if sys.stderr.isatty():
        return sys.stderr
    try:
        return open("/dev/tty", "w") if _is_submitted_from_a_terminal() else None
    except OSError:
        return None


def log_to_stderr(run_id: str = "-") -> None:
    """Lets one handler write what `slidelake.*` logs; for entry points, at their start and once their run has an id."""
    logging.captureWarnings(is_submitted())  # else spark-submit's one pipe would put Python's warnings on stdout
    for name in ("slidelake", "py.warnings"):
        logger = logging.getLogger(name)
        logger.setLevel(logging.INFO)
        logger.propagate = False  # a platform's own handlers would write every line twice
        logger.handlers = [_Messages(run_id)]


class _Messages(logging.Handler):
    """Writes above the bar: on a terminal the message alone, elsewhere behind time (UTC), level and run id."""

    def __init__(self, run_id: str) -> None:
        super().__init__()
        self._dated = logging.Formatter(f"%(asctime)s %(levelname)s {run_id} %(message)s", "%Y-%m-%dT%H:%M:%SZ")
        self._dated.converter = time.gmtime
        self._submitted_from_a_terminal = _is_submitted_from_a_terminal()

    def emit(self, record: logging.LogRecord) -> None:
        has_terminal = sys.stderr.isatty() or self._submitted_from_a_terminal
        text = record.getMessage() if has_terminal else self._dated.format(record)
        if is_submitted() and _is_merged():
            from jobs.runtime.spark.jvm import StderrOfSparkSubmit  # noqa: PLC0415 - pyspark, which --help need not load

            tqdm.write(text, StderrOfSparkSubmit())
        else:
            tqdm.write(text, sys.stderr)


def _is_submitted_from_a_terminal() -> bool:
    if not is_submitted():
        return False
    from jobs.runtime.spark.jvm import spark_submit_has_a_terminal  # noqa: PLC0415 - as above

    return spark_submit_has_a_terminal()


def _is_merged() -> bool:
    """Returns whether stdout and stderr are one pipe."""
    out, err = os.fstat(1), os.fstat(2)
    return stat.S_ISFIFO(err.st_mode) and os.path.samestat(out, err)
