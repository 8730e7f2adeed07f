"""Where what a job says goes, also under spark-submit: it runs Python with stdout and stderr in one pipe, which it copies
to its own stdout.
"""

import io
import os
import stat
import sys
from pathlib import Path
from typing import Any, TextIO

from pyspark import SparkContext

_PIPE = 2


def terminal() -> TextIO | None:
    """Where a bar can be drawn: stderr, or under spark-submit the terminal that is the stderr of its JVM."""
    if sys.stderr.isatty():
        return sys.stderr
    if not is_submitted():
        return None
    try:
        device = Path(f"/proc/{os.getppid()}/fd/2").readlink()
        return device.open("w") if str(device).startswith(("/dev/pts/", "/dev/tty")) else None
    except OSError:
        return None


def is_submitted() -> bool:
    """Whether spark-submit started this process, and a JVM before it."""
    return "PYSPARK_GATEWAY_PORT" in os.environ


def part_stderr_from_stdout() -> None:
    """Let `sys.stderr` be the stderr of spark-submit's JVM where spark-submit merged Python's own into stdout.

    The JVM is asked to write: another handle on its stderr would, where that is a file, write over what it writes.
    """
    out, err = os.fstat(1), os.fstat(2)
    merged = stat.S_ISFIFO(err.st_mode) and os.path.samestat(out, err)
    if is_submitted() and merged:
        sys.stderr = io.TextIOWrapper(io.BufferedWriter(_JvmStderr()), "utf-8", "backslashreplace", line_buffering=True)


class _JvmStderr(io.RawIOBase):
    def __init__(self) -> None:
        SparkContext._ensure_initialized()
        self._jvm: Any = SparkContext._jvm

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        text = bytes(data)
        try:
            self._jvm.java.lang.System.err.write(text, 0, len(text))
            self._jvm.java.lang.System.err.flush()
        except Exception:  # the JVM is gone: better in stdout than nowhere
            os.write(_PIPE, text)
        return len(text)
