"""Ctrl-C, SIGTERM and SIGHUP where Spark is not at work: one line, exit status 1, and further signals disturb nothing."""

import argparse
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from jobs.runtime import cli
from jobs.runtime.config import Config
from jobs.runtime.interrupt import Stopped, stop_signals

SIGNALS = {signal.SIGINT: "Ctrl-C", signal.SIGTERM: "SIGTERM", signal.SIGHUP: "SIGHUP"}


@pytest.fixture(autouse=True)
def _handlers() -> Iterator[None]:
    """Those of pytest, back again: after a stop, slidelake keeps its own until the process ends."""
    before = {number: signal.getsignal(number) for number in SIGNALS}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture
def arguments(tmp_path: Path) -> list[str]:
    (tmp_path / "p.csv").write_text("image_id,center_id,patient_id,image_num\na,b,c,0\n")
    (tmp_path / "c.yaml").write_text(f"patients: {tmp_path}/p.csv\noutput: {{root: {tmp_path}/tables}}\n")
    return ["--config", str(tmp_path / "c.yaml")]


def send(*numbers: signal.Signals) -> None:
    for number in numbers:
        os.kill(os.getpid(), number)
        time.sleep(0.05)


def said(capfd: pytest.CaptureFixture[str]) -> list[str]:
    time.sleep(0.2)  # lines of handlers come from threads
    out, err = capfd.readouterr()
    assert out == ""
    return sorted(err.splitlines())


@pytest.mark.parametrize("number", SIGNALS)
def test_a_job_alone_ends_with_one_line(
    number: signal.Signals, arguments: list[str], capfd: pytest.CaptureFixture[str]
) -> None:
    """As train and doctor."""
    tidied = []

    def work(config: Config, _: argparse.Namespace) -> int:
        try:
            send(number)
        finally:
            send(signal.SIGTERM, number, signal.SIGHUP)
            tidied.append(config)
        return 0

    assert cli.main_alone("doctor", "", work, arguments, lambda _: None) == cli.FAILED
    assert len(tidied) == 1
    again = [r"slidelake: still ending, which takes some seconds; Ctrl-\ ends it at once"]
    assert said(capfd) == sorted(
        [f"slidelake doctor: stopped by {SIGNALS[number]}", *again * (number == signal.SIGINT)]
    )


@pytest.mark.parametrize("number", SIGNALS)
def test_a_job_that_has_not_started_spark_ends_with_one_line(
    number: signal.Signals, arguments: list[str], capfd: pytest.CaptureFixture[str]
) -> None:
    def work(*_: object) -> int:
        raise AssertionError("Spark was started")

    assert cli.main("slides", "", work, arguments, check=lambda _: send(number)) == cli.FAILED
    assert said(capfd) == [f"slidelake slides: stopped by {SIGNALS[number]}"]


def test_a_signal_that_is_ignored_stays_so_and_handlers_come_back() -> None:
    """As under nohup."""
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    before = {number: signal.getsignal(number) for number in SIGNALS}
    with stop_signals():
        send(signal.SIGHUP)
    assert {number: signal.getsignal(number) for number in SIGNALS} == before
    with pytest.raises(Stopped, match="SIGTERM"), stop_signals():
        send(signal.SIGHUP, signal.SIGTERM)
