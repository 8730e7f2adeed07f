"""The main job on a simulated cohort, `python -m benchmarks.growth_process FOLDER [WAVE]`: what it holds after each wave.

FOLDER has `job.yaml`; into its `gauges.json` go, a wave each: its images; seconds of all stages and of the processors in all
processes, so far; and the bytes that the JVM's heap and the driver's Python have in use after a full collection. With WAVE, this
process and its JVM are killed in that wave, between the commits of slides and of features.
"""

import gc
import json
import os
import signal
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pandas as pd
import psutil

from benchmarks import growth_slides
from jobs import features, preprocess, slides
from jobs.runtime.run.run import Run

_CLEANED_S = 0.3  # Spark lets go of broadcasts when a collection has shown that nobody has them, and beside it


def main(folder: Path, last_wave: int | None) -> int:
    """Run the job; returns its exit status."""
    os.setsid()  # a process group that the JVM joins
    gauges: list[dict[str, Any]] = []

    def die(run: Run, wave: pd.DataFrame) -> None:
        del run, wave
        if len(gauges) + 1 == last_wave:
            os.killpg(0, signal.SIGKILL)

    def gauge(run: Run, wave: pd.DataFrame) -> None:
        gc.collect()  # as the run does after each wave
        took = {"images": len(wave), "seconds": sum(run.record.timings.values()), "cpu": _cpu_s()}
        gauges.append(took | {"heap": _heap_in_use(run), "python": psutil.Process().memory_info().rss})

    models = SimpleNamespace(identities={"efficientnet_b0": ("encoder.weights=none",)})
    stages = (*slides.JOB.stages, die, *preprocess.JOB.stages[1:], gauge)
    for owner, name, stand_in in (
        (slides, "find_tissue", growth_slides.find_tissue),
        (features, "encode_tiles", growth_slides.encode_tiles),
        (Run, "models", models),
        (preprocess, "JOB", replace(preprocess.JOB, stages=stages)),
    ):
        setattr(owner, name, stand_in)
    status = preprocess.main(["--config", str(folder / "job.yaml")])
    (folder / "gauges.json").write_text(json.dumps(gauges))
    return status


def _cpu_s() -> float:
    """Of this process and all that it has started, those that ended included."""
    this = psutil.Process()
    return sum(sum(process.cpu_times()[:4]) for process in (this, *this.children(recursive=True)))


def _heap_in_use(run: Run) -> int:
    jvm: Any = run.spark._jvm
    jvm.java.lang.System.gc()
    time.sleep(_CLEANED_S)
    jvm.java.lang.System.gc()
    memory = jvm.java.lang.Runtime.getRuntime()
    return int(memory.totalMemory()) - int(memory.freeMemory())


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else None))
