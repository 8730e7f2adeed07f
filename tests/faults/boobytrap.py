"""A filesystem whose files can kill the process that reads certain bytes of them. What a run makes of it is for the tests.

A process knows the protocol `boobytrap://` where the folder that `install` fills is on its PYTHONPATH.
"""

import json
import os
import resource
import signal
from pathlib import Path
from typing import Any

from fsspec import AbstractFileSystem
from fsspec.implementations.local import LocalFileSystem

PROTOCOL = "boobytrap://"
_LOCAL = LocalFileSystem()


class BoobytrapFileSystem(AbstractFileSystem):  # type: ignore[misc]
    """Local files in the guise of a store; a trap fires where bytes of its range are fetched."""

    protocol = "boobytrap"

    def info(self, path: str, **options: Any) -> dict[str, Any]:
        told: dict[str, Any] = _LOCAL.info(self._strip_protocol(path), **options)
        return told

    def cat_file(self, path: str, start: int | None = None, end: int | None = None, **options: Any) -> bytes:
        slide = Path(self._strip_protocol(path))
        trap = _trap(slide)
        if trap.exists() and start is not None and end is not None:
            armed = json.loads(trap.read_text())
            if start < armed["stop"] and end > armed["start"]:
                _fire(slide, once=armed["once"])
        data: bytes = _LOCAL.cat_file(str(slide), start, end, **options)
        return data


def install(folder: Path) -> dict[str, str]:
    """Make the protocol known, by a package's entry point, where `folder` is on the path; the environment that it wants."""
    information = folder / "boobytrap-0.dist-info"
    information.mkdir(parents=True)
    (information / "METADATA").write_text("Metadata-Version: 2.1\nName: boobytrap\nVersion: 0\n")
    (information / "entry_points.txt").write_text(f"[fsspec.specs]\nboobytrap = {__name__}:BoobytrapFileSystem\n")
    return {"PYTHONPATH": os.pathsep.join([str(folder), str(Path(__file__).parents[2])])}


def set_trap(slide: Path, start: int, stop: int, *, once: bool) -> str:
    """The URI by which reading bytes [start, stop) of `slide` kills; `once` disarms the trap as it fires."""
    _trap(slide).write_text(json.dumps({"start": start, "stop": stop, "once": once}))
    return f"{PROTOCOL}{slide}"


def deaths(slide: Path) -> int:
    """How many processes the trap of `slide` has killed."""
    log = slide.with_suffix(".deaths")
    # a dying process may come by a second time, in another of its threads
    return len(set(log.read_text().splitlines())) if log.exists() else 0


def _trap(slide: Path) -> Path:
    return slide.with_suffix(".trap")


def _fire(slide: Path, *, once: bool) -> None:
    with slide.with_suffix(".deaths").open("a") as log:
        log.write(f"{os.getpid()}\n")
    if once:
        _trap(slide).unlink()
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    os.kill(os.getpid(), signal.SIGSEGV)
