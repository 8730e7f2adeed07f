"""How far a run is, on stderr: a bar on a terminal, a line every so often elsewhere; stages outside waves by name."""

import logging
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta

from tqdm import tqdm

from jobs.runtime.spark.streams import terminal

_log = logging.getLogger("slidelake.progress")
_POLL_S = 0.5
_LINE_EVERY_S = 30.0
_MASK_SHARE = 0.1  # of the work on a slide, for the bar: finding tissue is quick beside encoding


class Progress:
    """Counts slides and tiles over waves. Stages report through `stage`; a thread draws."""

    def __init__(self, slides: int, waves: int) -> None:
        """Start a run of so many slides to work on in so many waves."""
        self._waves, self._wave, self._stage = waves, 0, ""
        self._slides, self._before, self._in_wave, self._share = slides, 0, 0, 0.0
        self._tiles = 0
        self._tile_seconds = 0.0
        self._begun = self._last_line = time.monotonic()
        layout = "{percentage:3.0f}%|{bar}| {desc} [{elapsed}<{remaining}]"
        screen = terminal()
        hidden = screen is None or not slides
        self._bar = tqdm(total=max(slides, 1), bar_format=layout, file=screen, disable=hidden, leave=False)

    def wave(self, slides: int) -> None:
        """Begin the next wave of so many slides."""
        self._before += self._in_wave
        self._wave, self._in_wave, self._share = self._wave + 1, slides, 0.0

    @contextmanager
    def stage(self, name: str, total: int = 0, done: Callable[[], int] = lambda: 0) -> Iterator[None]:
        """Show a stage while it runs.

        Args:
            name: slides, features or patients.
            total: slides (stage slides) or tiles (stage features) that it works on.
            done: how many of them are done; asked from another thread.
        """
        self._stage = name
        if not self._waves:
            self.say(f"slidelake: {name} ...")
        begun, tiles, share = time.monotonic(), self._tiles, self._share
        weight = {"slides": _MASK_SHARE, "features": 1 - _MASK_SHARE}.get(name, 0.0)

        def draw() -> None:
            count = min(done(), total)
            if name == "features":
                self._tiles = tiles + count
            self._share = share + weight * (count / total if total else 0.0)
            self._draw(self._tile_seconds + (time.monotonic() - begun if name == "features" else 0.0))

        stop = threading.Event()

        def watch() -> None:
            while not stop.wait(_POLL_S):
                draw()

        thread = threading.Thread(target=watch, name="progress", daemon=True)
        thread.start()
        try:
            yield
        finally:
            stop.set()
            thread.join()
            draw()
            if name == "features":
                self._tile_seconds += time.monotonic() - begun

    def describe(self, step: str = "") -> str:
        """Where the run is, for Spark's UI: ``wave 3/12: features, write``, outside waves ``plan: survey of 16 images``."""
        if self._waves:
            return f"wave {self._wave}/{self._waves}: {', '.join(part for part in (self._stage, step) if part)}"
        return ": ".join(part for part in (self._stage, step) if part)

    def close(self) -> None:
        """Take the bar off the screen."""
        self._bar.close()

    def say(self, text: str) -> None:
        """A line for people, above the bar."""
        _log.info(text)

    def _draw(self, tile_seconds: float) -> None:
        if not self._waves:
            return
        done = self._before + self._in_wave * self._share
        rate = self._tiles / tile_seconds if tile_seconds else 0.0
        where = f"wave {self._wave}/{self._waves} {self._stage}"
        counts = f"{done:.0f}/{self._slides} slides, {self._tiles:,} tiles, {rate:.1f} tiles/s"
        if not self._bar.disable:
            self._bar.set_description_str(f"{where}: {counts}", refresh=False)
            self._bar.n = done
            self._bar.refresh()
        elif time.monotonic() - self._last_line >= _LINE_EVERY_S:
            self._last_line = time.monotonic()
            left = (self._last_line - self._begun) * (self._slides - done) / done if done else None
            eta = f", about {timedelta(seconds=round(left))} left" if left is not None else ""
            self.say(f"slidelake: {where}: {counts}{eta}")
