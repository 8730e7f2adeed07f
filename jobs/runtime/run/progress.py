"""How far a run is, on stderr: a bar on a terminal, a line every half minute elsewhere. The same names are in Spark's UI."""

import logging
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from time import monotonic

from tqdm import tqdm

from jobs.runtime.spark.streams import terminal

_log = logging.getLogger("slidelake.progress")
_POLL_S = 0.5
LINE_EVERY_S = 30.0
# Parts of the work on a slide, for the bar: finding tissue is quick beside encoding.
_WEIGHTS = {"slides": 0.1, "features": 0.9}


class Progress:
    """Names and times stages, and counts slides and tiles over waves; a thread draws while a stage runs."""

    def __init__(self, timings: dict[str, float], describe: Callable[[str], None], idle: str) -> None:
        """Start outside waves.

        Args:
            timings: seconds by stage; each stage that ends adds its own.
            describe: shows a text with the Spark jobs that follow.
            idle: the text outside stages.
        """
        self._timings, self._describe, self._idle = timings, describe, idle
        self._stage = ""
        self._slides = self._waves = self._wave = self._before = self._in_wave = self._tiles = 0
        self._share = 0.0  # of the work on the wave's slides that is done
        self._begun = self._last_line = monotonic()
        self._bar = tqdm(disable=True)

    @contextmanager
    def waves(self, slides: int, waves: int) -> Iterator[None]:
        """Show how much is done of the work on so many slides in so many waves while the block runs."""
        self._slides, self._waves = slides, waves
        self._begun = self._last_line = monotonic()
        layout = "{percentage:3.0f}%|{bar}| {desc} [{elapsed}<{remaining}]"
        screen = terminal()
        hidden = screen is None or not slides
        self._bar = tqdm(total=max(slides, 1), bar_format=layout, file=screen, disable=hidden, leave=False)
        try:
            yield
        finally:
            self._bar.close()
            self._waves, self._stage = 0, ""

    def wave(self, slides: int) -> None:
        """Begin the next wave of so many slides."""
        self._before += self._in_wave
        self._wave, self._in_wave, self._share = self._wave + 1, slides, 0.0

    @contextmanager
    def stage(self, name: str, total: int = 0, done: Callable[[], int] = lambda: 0) -> Iterator[None]:
        """Time a stage and show how far it is while it runs.

        Args:
            name: of the stage.
            total: slides (stage slides) or tiles (stage features) that it works on.
            done: returns how many of them are done; called from another thread.
        """
        self._stage = name
        if not self._waves:
            _log.info(f"slidelake: {name} ...")
        begun, tiles, share = monotonic(), self._tiles, self._share

        def draw() -> None:
            count = min(done(), total)
            seconds = self._timings.get("features", 0.0)
            if name == "features":
                self._tiles = tiles + count
                seconds += monotonic() - begun
            self._share = share + _WEIGHTS.get(name, 0.0) * (count / total if total else 0.0)
            self._draw(self._tiles / seconds if seconds else 0.0)

        stop = threading.Event()

        def watch() -> None:
            while not stop.wait(_POLL_S):
                draw()

        thread = threading.Thread(target=watch, name="progress", daemon=True)
        thread.start()
        try:
            self.step("")
            yield
        finally:
            stop.set()
            thread.join()
            draw()
            self._describe(self._idle)
        self._timings[name] = self._timings.get(name, 0.0) + monotonic() - begun

    def step(self, what: str) -> None:
        """Name what Spark is given to do next: ``wave 3/12: features, write``; outside waves ``plan: survey of 16 images``."""
        if self._waves:
            where = f"wave {self._wave}/{self._waves}: {self._stage}"
            self._describe(f"{where}, {what}" if what else where)
        else:
            self._describe(": ".join(part for part in (self._stage, what) if part))

    def _draw(self, tiles_per_s: float) -> None:
        if not self._waves:
            return
        done = self._before + self._in_wave * self._share
        where = f"wave {self._wave}/{self._waves} {self._stage}"
        counts = f"{done:.0f}/{self._slides} slides, {self._tiles:,} tiles, {tiles_per_s:.1f} tiles/s"
        if not self._bar.disable:
            self._bar.set_description_str(f"{where}: {counts}", refresh=False)
            self._bar.n = done
            self._bar.refresh()
        elif monotonic() - self._last_line >= LINE_EVERY_S:
            self._last_line = monotonic()
            left = (self._last_line - self._begun) * (self._slides - done) / done if done else None
            eta = f", about {timedelta(seconds=round(left))} left" if left is not None else ""
            _log.info(f"slidelake: {where}: {counts}{eta}")
