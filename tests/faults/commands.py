"""Jobs started as users start them, each in a session of its own, whose every process ends with the test."""

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import psutil
import yaml

from jobs.runtime.settings.config import Config

_ROOT = Path(__file__).parents[2]
_FEW_PARTITIONS = ("--conf", "spark.sql.shuffle.partitions=2")  # tables of a dozen rows
_ENVIRONMENT = {
    "SPARK_LOCAL_IP": "127.0.0.1",
    "PYSPARK_PYTHON": sys.executable,  # by which spark-submit finds Spark
    "PYSPARK_SUBMIT_ARGS": " ".join([*_FEW_PARTITIONS, "pyspark-shell"]),
}


@contextmanager
def preprocess_command(
    config: Config, log: Path, environment: Mapping[str, str] | None = None, *, submitted: bool = False
) -> Iterator[subprocess.Popen[bytes]]:
    """`slidelake preprocess`, or spark-submit, while it runs; what it says goes to the end of `log`.

    Its driver, or spark-submit's JVM, leads a session and a process group that the other joins; Spark's daemon of Python
    workers makes a group of its own in that session. On leaving, every process of the session is killed.
    """
    settings = log.with_suffix(".yaml")
    settings.write_text(yaml.safe_dump(config.model_dump(mode="json")))
    submit = [str(Path(sys.executable).parent / "spark-submit"), *_FEW_PARTITIONS, "jobs/preprocess.py"]
    job = submit if submitted else [sys.executable, "-m", "jobs", "preprocess"]
    command = [*job, "--config", str(settings)]
    with started(command, {**os.environ, **_ENVIRONMENT, **(environment or {})}, _ROOT, log) as process:
        yield process


@contextmanager
def started(
    command: Sequence[str], environment: Mapping[str, str], folder: Path, log: Path
) -> Iterator[subprocess.Popen[bytes]]:
    """A process while it runs, in that folder and with these variables and no others; what it says goes to the end of `log`.

    It leads a session, of which every process is killed on leaving.
    """
    with log.open("ab") as said:
        process = subprocess.Popen(
            command,
            cwd=folder,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=said,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        yield process
    finally:
        end_session(process.pid)
        process.wait()


def run_to_end(
    command: Sequence[str], environment: Mapping[str, str], seconds: float
) -> "subprocess.CompletedProcess[str]":
    """A command with these variables and no others, in the checkout and a session of its own; every process of it ends with
    the call, and it must end within so many seconds.
    """
    process = subprocess.Popen(
        command,
        cwd=_ROOT,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        out, err = process.communicate(timeout=seconds)
        return subprocess.CompletedProcess(command, process.returncode, out, err)
    finally:
        end_session(process.pid)
        process.wait()


def session_of(leader: int) -> list[psutil.Process]:
    """The processes of a session that still run, its leader among them or dead."""
    found = []
    for process in psutil.process_iter():
        try:
            if os.getsid(process.pid) == leader and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
        except (ProcessLookupError, PermissionError, psutil.Error):
            continue
    return found


def end_session(leader: int) -> None:
    """Kill every process of a session."""

    def gone() -> bool:
        left = session_of(leader)
        for process in left:
            try:
                process.kill()
            except psutil.NoSuchProcess:
                continue
        return not left

    wait_until(gone, 30, "the processes of a job are gone")


def wait_until(condition: Callable[[], bool], seconds: float, what: str, every: float = 0.02) -> None:
    """Poll a condition; fails where it does not come true in time."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"waited {seconds:g} s in vain until {what}"
        time.sleep(every)
