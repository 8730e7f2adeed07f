"""Ctrl-C, SIGTERM and SIGHUP where Spark is not at work: one line, exit status 1, and further signals disturb nothing.

Signals are sent to a process of its own, for slidelake keeps its handlers until the process ends.
"""

import argparse
import io
import os
import signal
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from multiprocessing import get_context
from pathlib import Path

import pytest

from jobs.runtime.run import cli
from jobs.runtime.run.run import Job
from jobs.runtime.settings.config import Config
from jobs.runtime.spark.signals import Stopped, stop_signals
from tests.messages import plain

SIGNALS = {signal.SIGINT: "Ctrl-C", signal.SIGTERM: "SIGTERM", signal.SIGHUP: "SIGHUP"}
Ended = tuple[int, list[str]]  # exit status, and the sorted lines on stderr


@pytest.fixture(scope="module")
def process() -> Iterator[ProcessPoolExecutor]:
    with ProcessPoolExecutor(1, get_context("spawn")) as pool:
        yield pool


@pytest.fixture
def arguments(tmp_path: Path) -> list[str]:
    (tmp_path / "p.csv").write_text("image_id,center_id,patient_id,image_num\na,b,c,0\n")
    (tmp_path / "c.yaml").write_text(f"patients: {tmp_path}/p.csv\noutput: {{root: {tmp_path}/tables}}\n")
    return ["--config", str(tmp_path / "c.yaml")]


def send(*numbers: signal.Signals) -> None:
    for number in numbers:
        os.kill(os.getpid(), number)
        time.sleep(0.05)


@contextmanager
def handlers_kept() -> Iterator[None]:
    """After a stop, slidelake keeps its own handlers until the process ends."""
    before = {number: signal.getsignal(number) for number in SIGNALS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def ended(job: Callable[[], int]) -> Ended:
    out, err = io.StringIO(), io.StringIO()
    with handlers_kept(), redirect_stdout(out), redirect_stderr(err):
        status = job()
        time.sleep(0.2)  # lines of handlers come from threads
    assert not out.getvalue()
    return status, sorted(plain(err.getvalue()).splitlines())


def stop_alone(number: signal.Signals, arguments: list[str]) -> Ended:
    """As train and doctor."""

    def work(_: Config, __: argparse.Namespace) -> int:
        try:
            send(number)
        finally:
            send(signal.SIGTERM, number, signal.SIGHUP)
        raise AssertionError("the signal raised nothing")

    return ended(lambda: cli.main_alone("doctor", work, arguments))


def stop_before_spark(number: signal.Signals, arguments: list[str]) -> Ended:
    def work(*_: object) -> int:
        raise AssertionError("Spark was started")

    return ended(lambda: cli.main(Job("slides"), work, arguments, check=lambda _: send(number)))


def ignore_and_stop() -> tuple[bool, str]:
    """Whether handlers are as before once a block ends, of which SIGHUP is ignored, as under nohup; and what stops one."""
    with handlers_kept():
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        before = {number: signal.getsignal(number) for number in SIGNALS}
        with stop_signals():
            send(signal.SIGHUP)
        are_back = {number: signal.getsignal(number) for number in SIGNALS} == before
        try:
            with stop_signals():
                send(signal.SIGHUP, signal.SIGTERM)
        except Stopped as error:
            return are_back, str(error)
    return are_back, ""


@pytest.mark.parametrize("number", SIGNALS)
def test_a_job_alone_ends_with_one_line(
    number: signal.Signals, arguments: list[str], process: ProcessPoolExecutor
) -> None:
    status, lines = process.submit(stop_alone, number, arguments).result()
    again = [r"slidelake: still ending, which takes some seconds; Ctrl-\ ends it at once"]
    assert status == cli.FAILED
    assert lines == sorted([f"slidelake doctor: stopped by {SIGNALS[number]}", *again * (number == signal.SIGINT)])


@pytest.mark.parametrize("number", SIGNALS)
def test_a_job_that_has_not_started_spark_ends_with_one_line(
    number: signal.Signals, arguments: list[str], process: ProcessPoolExecutor
) -> None:
    status, lines = process.submit(stop_before_spark, number, arguments).result()
    assert (status, lines) == (cli.FAILED, [f"slidelake slides: stopped by {SIGNALS[number]}"])


def test_a_signal_that_is_ignored_stays_so_and_handlers_come_back(process: ProcessPoolExecutor) -> None:
    assert process.submit(ignore_and_stop).result() == (True, "SIGTERM")
