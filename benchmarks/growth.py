"""growth: what slidelake itself takes of a cohort's time and memory, and that both grow as the cohort does, or not at all.

The main job, slides to patients, on simulated slides (see `growth_slides`): 754 of them have 10 million tiles, a line is a share
of these. Planning, waves, Spark, Delta and the driver are the real ones, on two cores, with a heap of 2 GiB; no pixel is read and
nothing is encoded. So what is measured is what comes on top of reading and encoding, less the writing of long embeddings.

`seconds` are those of the stages, which Spark's start and the gauges between waves are no part of; `cpu_seconds` those of the
processors in all processes, start included, on which other work on the machine has little say. `again` is a second run, with
nothing to do; `resumed` goes on where a run was killed in the middle of the cohort, and has to end with the same rows.
The first wave, which starts workers, aside: `heap_early_mb` and `heap_late_mb` are what the JVM's heap holds in the first and in
the last quarter of the waves, full collection done, the medians; `late_vs_early` is what a slide takes of the processors in the
last quarter beside the first. The last line is the straight line through the shares' processor seconds, and what it leaves
unexplained.
"""

import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from itertools import pairwise
from pathlib import Path
from statistics import fmean, median
from typing import Any

import numpy as np
import polars as pl
import yaml

from benchmarks.growth_slides import BINS, write_cohort
from benchmarks.machine import on_cores
from benchmarks.measure import Line
from benchmarks.processes import CORES
from benchmarks.watched import Watched, watch

_SLIDES, _SHARES, _RESUMED = 754, (0.1, 0.2, 0.4, 0.8), 0.2
_HEAP = "2g"
_KEYS = {
    "slides": ["image_id", "status", "n_tiles", "params_hash"],
    "tiles": ["image_id", "x_px", "y_px", "params_hash"],
    "indexes": ["image_id", "file_version", "params_hash"],
    "features": ["image_id", "x_px", "y_px", "patient_id", "params_hash"],
    "patients": ["patient_id", "n_tiles", "embeddings", "params_hash"],
}
Gauges = list[dict[str, Any]]


def run() -> Iterator[Line]:
    """A line a share, then the straight line."""
    with ExitStack() as stack:
        stack.enter_context(on_cores(CORES))
        os.environ["PYSPARK_SUBMIT_ARGS"] = f"--driver-memory {_HEAP} pyspark-shell"
        stack.callback(os.environ.pop, "PYSPARK_SUBMIT_ARGS")
        lines = []
        for share in _SHARES:
            lines.append(measured(share))
            yield lines[-1]
    yield straight(lines)


def measured(share: float) -> Line:
    """A cohort of that share: run, run again, and where it is to be, killed and resumed."""
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made)
        slides = round(share * _SLIDES)
        write_cohort(folder, slides)
        whole = _run(folder, "tables")
        gauges: Gauges = json.loads((folder / "gauges.json").read_text())
        timings = _timings(folder, "tables")
        tiles = pl.scan_delta(f"{folder}/tables/tiles").select(pl.len()).collect().item()
        line: Line = {"share": share, "slides": slides, "tiles": tiles, "waves": len(gauges)}
        line |= {"seconds": sum(timings.values())} | {f"{stage}_seconds": taken for stage, taken in timings.items()}
        line |= {"ms_a_slide": 1000 * sum(timings.values()) / slides, "cpu_seconds": gauges[-1]["cpu"]}
        line |= {"cpu_ms_a_slide": 1000 * gauges[-1]["cpu"] / slides, **_early_and_late(gauges)}
        again = _run(folder, "tables")
        line["again_seconds"] = sum(_timings(folder, "tables").values())
        line |= {
            "jvm_mb": max(whole.jvm, again.jvm) / 1e6,
            "workers_mb": whole.workers / 1e6,
        }
        if share == _RESUMED:
            line |= _resumed(folder, len(gauges) // 2 + 1)
    return line


def _resumed(folder: Path, wave: int) -> Line:
    """Killed in a wave and run again, into other tables, which have to become the same."""
    killed = subprocess.run(_command(folder, "resumed", str(wave)), stderr=subprocess.DEVNULL)  # noqa: PLW1510
    if killed.returncode != -signal.SIGKILL:
        raise AssertionError(f"it was to be killed, and ended with {killed.returncode}")
    done = pl.scan_delta(f"{folder}/resumed/patients").select(pl.len()).collect().item()
    _run(folder, "resumed")
    for name, keys in _KEYS.items():
        if _digest(folder / "resumed" / name, keys) != _digest(folder / "tables" / name, keys):
            raise AssertionError(f"table {name} of the run that was killed has other rows")
    return {
        "killed_in_wave": wave,
        "patients_at_kill": done,
        "resumed_seconds": sum(_timings(folder, "resumed").values()),
    }


def _digest(table: Path, keys: Sequence[str]) -> tuple[int, int]:
    """Rows, and a hash of all of them in any order."""
    hashes = pl.read_delta(str(table), columns=list(keys)).hash_rows()
    return len(hashes), int(hashes.to_numpy().sum(dtype=np.uint64))


def straight(lines: Sequence[Line]) -> Line:
    """The line of least squares through processor seconds by slides, a share's deviations weighed by its own seconds."""
    slides, seconds = (np.array([float(line[key]) for line in lines]) for key in ("slides", "cpu_seconds"))
    slope, start = np.polyfit(slides, seconds, 1, w=1 / seconds)
    fitted = start + slope * slides
    off = 1 - ((seconds - fitted) ** 2).sum() / ((seconds - seconds.mean()) ** 2).sum()
    heap = np.polyfit(slides, [float(line["heap_late_mb"]) for line in lines], 1)[0]
    return {
        "share": "line",
        "cpu_seconds_at_0": float(start),
        "cpu_ms_a_slide": float(1000 * slope),
        "r_squared": f"{off:.5f}",
        "largest_deviation": float(np.abs(seconds / fitted - 1).max()),
        "last_vs_first": float(lines[-1]["cpu_ms_a_slide"]) / float(lines[0]["cpu_ms_a_slide"]),
        "heap_kb_a_slide": float(heap * 1000),
    }


def _run(folder: Path, tables: str) -> Watched:
    return watch(_command(folder, tables), folder)


def _command(folder: Path, tables: str, *arguments: str) -> list[str]:
    settings = {
        "patients": f"{folder}/patients.csv",
        "slides": {"root": f"{folder}/slides"},
        "output": {"root": f"{folder}/{tables}"},
        "inference": {"device": "cpu"},
        "histogram": {"bins": BINS},
    }
    (folder / "job.yaml").write_text(yaml.safe_dump(settings))
    return [sys.executable, "-m", "benchmarks.growth_process", str(folder), *arguments]


def _timings(folder: Path, tables: str) -> dict[str, float]:
    """Of the run that ended last."""
    runs = pl.read_delta(f"{folder}/{tables}/runs").sort("finished_at")
    return dict(runs["timings"].to_list()[-1])


def _early_and_late(gauges: Gauges) -> Line:
    """The first and the last quarter of the waves, without the first wave."""
    cpu_a_slide = [(end["cpu"] - begin["cpu"]) / end["images"] for begin, end in pairwise(gauges)]
    quarter = max(1, len(cpu_a_slide) // 4)
    line: Line = {"late_vs_early": fmean(cpu_a_slide[-quarter:]) / fmean(cpu_a_slide[:quarter])}
    for when, some in (("early", gauges[1 : quarter + 1]), ("late", gauges[-quarter:])):
        line |= {f"{what}_{when}_mb": median(gauge[what] for gauge in some) / 1e6 for what in ("heap", "python")}
    return line
