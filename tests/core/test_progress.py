"""What a run names, times and shows while its stages are at work."""

import logging
from functools import partial

import pytest

from jobs.runtime.run import progress as progress_module
from jobs.runtime.run.progress import Progress


def test_stages_and_steps_are_named_for_sparks_ui_and_stages_are_timed() -> None:
    timings: dict[str, float] = {}
    texts: list[str] = []
    progress = Progress(timings, texts.append, "slidelake mine")
    with progress.stage("plan"):
        progress.step("survey")
    with progress.waves(slides=3, waves=2):
        for slides in (2, 1):
            progress.wave(slides)
            with progress.stage("slides", slides, partial(int, slides)):
                progress.step("write")
    progress.step("record")
    assert texts[:3] == ["plan", "plan: survey", "slidelake mine"]
    assert texts[3:6] == ["wave 1/2: slides", "wave 1/2: slides, write", "slidelake mine"]
    assert texts[6:] == ["wave 2/2: slides", "wave 2/2: slides, write", "slidelake mine", "record"]
    assert list(timings) == ["plan", "slides"] and min(timings.values()) >= 0


def test_a_stage_that_fails_is_not_timed_and_leaves_its_name() -> None:
    timings: dict[str, float] = {}
    texts: list[str] = []
    with pytest.raises(ZeroDivisionError), Progress(timings, texts.append, "idle").stage("plan"):
        raise ZeroDivisionError
    assert (timings, texts) == ({}, ["plan", "idle"])


def test_without_a_terminal_a_line_says_how_far_the_waves_are(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(progress_module, "terminal", lambda: None)
    monkeypatch.setattr(progress_module, "LINE_EVERY_S", 0.0)
    progress = Progress({}, lambda text: None, "idle")
    with caplog.at_level(logging.INFO), progress.waves(slides=4, waves=1):
        progress.wave(4)
        with progress.stage("slides", 4, lambda: 4):
            pass
        with progress.stage("features", 100, lambda: 50):
            pass
    assert caplog.messages[0].startswith("slidelake: wave 1/1 slides: 0/4 slides, 0 tiles, 0.0 tiles/s, about ")
    assert caplog.messages[-1].startswith("slidelake: wave 1/1 features: 2/4 slides, 50 tiles, ")
