"""growth: what slidelake itself takes of a cohort's time and memory, and that both grow as the cohort does, or not at all.

The main job, slides to patients, on simulated slides (see `growth_slides`): 754 of them have 10 million tiles, a line is a share
of these. Planning, waves, Spark, Delta and the driver are the real ones, on two cores, with a heap of 2 GiB; no pixel is read and
nothing is encoded. So what is measured is what comes on top of reading and encoding, less the writing of long embeddings.

`seconds` are those of the stages, which Spark's start and the gauges between waves are no part of; `cpu_seconds` those of the
processors in all processes, start included, on which other work on the machine has little say. `again` is a second run, with
nothing to do; `resumed` goes on where a run was killed in the middle of the cohort, and has to end with the same rows.
`heap_first_mb` and `heap_last_mb` are what the JVM's heap holds after the second and after the last wave, full collection done;
`late_vs_early` is what a slide takes of the processors in the last quarter of the waves beside the first one, without the first
wave. The last line is the straight line through the shares' processor seconds, and what it leaves unexplained.
"""

import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from statistics import fmean
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
    "patients": ["patient_id", "n_tiles", "embeddings_avg", "params_hash"],
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
        line |= {"cpu_ms_a_slide": 1000 * gauges[-1]["cpu"] / slides, "late_vs_early": _late_vs_early(gauges)}
        again = _run(folder, "tables")
        line["again_seconds"] = sum(_timings(folder, "tables").values())
        line |= {
            "heap_first_mb": gauges[1]["heap"] / 1e6,
            "heap_last_mb": gauges[-1]["heap"] / 1e6,
            "python_first_mb": gauges[1]["python"] / 1e6,
            "python_last_mb": gauges[-1]["python"] / 1e6,
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
    heap = np.polyfit(slides, [float(line["heap_last_mb"]) for line in lines], 1)[0]
    return {
        "share": "line",
        "cpu_seconds_at_0": float(start),
        "cpu_ms_a_slide": float(1000 * slope),
        "r_squared": f"{off:.5f}",
        "largest_deviation": float(np.abs(seconds / fitted - 1).max()),
        "last_vs_first": float(lines[-1]["ms_a_slide"]) / float(lines[0]["ms_a_slide"]),
        "heap_kb_a_slide": float(heap * 1000),
    }


def _run(folder: Path, tables: str) -> Watched:
    return watch(_command(folder, tables), folder)


def _command(folder: Path, tables: str, *arguments: str) -> list[str]:
    settings = {
        "patients": f"{folder}/patients.csv",
        "slides": {"root": f"{folder}/slides"},
        "output": {"root": f"{folder}/{tables}"},
        "encoder": {"device": "cpu"},
        "histogram": {"bins": BINS},
    }
    (folder / "job.yaml").write_text(yaml.safe_dump(settings))
    return [sys.executable, "-m", "benchmarks.growth_process", str(folder), *arguments]


def _timings(folder: Path, tables: str) -> dict[str, float]:
    """Of the run that ended last."""
    runs = pl.read_delta(f"{folder}/{tables}/runs").sort("finished_at")
    return dict(runs["timings"].to_list()[-1])


def _late_vs_early(gauges: Gauges) -> float:
    """How much longer a slide takes at the end of a run than at its beginning."""
    ends = [gauge["cpu"] for gauge in gauges]
    a_slide = [(end - begin) / gauge["images"] for begin, end, gauge in zip(ends, ends[1:], gauges[1:], strict=False)]
    quarter = max(1, len(a_slide) // 4)
    return fmean(a_slide[-quarter:]) / fmean(a_slide[:quarter])
