"""Messages: Python's logging, by one handler of the entry points; with time, level and run id where there is no terminal."""

import logging
import re
import sys

import pytest

from jobs.runtime.spark.streams import log_to_stderr, terminal

RUN = "20260102T030405-abcdef"
log = logging.getLogger("slidelake.test")


def test_a_line_of_a_log_file_begins_with_time_level_and_run(capsys: pytest.CaptureFixture[str]) -> None:
    log_to_stderr()
    log.info("slidelake: %s ...", "plan")
    log_to_stderr(RUN)
    log.warning("slidelake: failed: a1")
    log.debug("too much")
    out, err = capsys.readouterr()
    time = r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ"
    assert out == "" and terminal() is None
    assert re.fullmatch(rf"{time} INFO - slidelake: plan \.\.\.\n{time} WARNING {RUN} slidelake: failed: a1\n", err), (
        err
    )


def test_on_a_terminal_a_message_stands_alone(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    log_to_stderr(RUN)
    log.error("slidelake slides: stopped by Ctrl-C")
    assert capsys.readouterr() == ("", "slidelake slides: stopped by Ctrl-C\n")
    assert terminal() is sys.stderr


def test_who_uses_the_modules_configures_logging(caplog: pytest.LogCaptureFixture) -> None:
    assert not logging.getLogger("slidelake").handlers
    log.warning("for the handlers of whoever imports slidelake")
    assert caplog.messages == ["for the handlers of whoever imports slidelake"]
