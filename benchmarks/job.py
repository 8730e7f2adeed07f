"""job: slides to patients on two cores, beside a pipeline as people write it by hand, and beside plain processes of ours.

Two slides of 31,000 x 33,000 px, one with lower levels and one without. A round is: the whole job as a command, at fp32 and at
the fastest setting; its features pass alone, by Spark that is warm (`tiles_per_s`) and in two plain processes (`loop`); the
classic pipeline on a sample of the tiles (see `classic`), which is given the tiles, so that no mask counts on its side.
`whole_seconds` is the first round's, which finds nothing cached: Java and Spark start, slides are looked at, the model is
converted, StainNet's table is built, and so on.
"""

import os
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median

import numpy as np
import polars as pl
import yaml
from numpy.typing import NDArray

from benchmarks import classic, inputs, loop, stage
from benchmarks.agreement import cosines
from benchmarks.machine import on_cores
from benchmarks.measure import Line, seconds
from benchmarks.processes import CORES, processes
from benchmarks.work import Unit, feature_spec, n_tiles, planned_units
from udfs.encode_tiles import FeatureSpec
from udfs.wsi.encoder.encoder_spec import Precision

_ROUNDS, _CLASSIC_TILES = 2, 192
_PRECISIONS: tuple[Precision, ...] = ("fp32", "bf16")


@dataclass(frozen=True)
class _Job:
    """One run of the job."""

    whole_s: float
    timings: dict[str, float]
    rows: pl.DataFrame  # of table features


@dataclass(frozen=True)
class _Classic:
    """One run of the classic pipeline."""

    tiles_per_s: float
    ms: dict[str, float]  # a tile, by step
    embeddings: classic.Embeddings


def run() -> Iterator[Line]:
    """A line for each precision."""
    slides = [inputs.section(), inputs.section_flat()]
    units = planned_units(slides)
    specs = {precision: feature_spec("openvino", precision) for precision in _PRECISIONS}
    jobs: dict[Precision, list[_Job]] = {precision: [] for precision in _PRECISIONS}
    stages: dict[Precision, list[float]] = {precision: [] for precision in _PRECISIONS}
    loops: dict[Precision, list[float]] = {precision: [] for precision in _PRECISIONS}
    classics: list[_Classic] = []
    with ExitStack() as stack:
        os.environ["SLIDELAKE_CACHE"] = stack.enter_context(tempfile.TemporaryDirectory())
        stack.callback(os.environ.pop, "SLIDELAKE_CACHE")
        for _ in range(_ROUNDS):
            for precision, spec in specs.items():
                jobs[precision].append(_job(spec, slides))
                with processes(1, stage.prepare, spec, units) as driver:
                    warm = [seconds(lambda: driver.submit(stage.encode).result()) for _ in range(2)]
                stages[precision].append(warm[1])
                with processes(CORES, loop.prepare, spec) as workers:
                    loop.encode_all(workers, [loop.cut(unit, 16) for unit in units])  # warm
                    loops[precision].append(seconds(partial(loop.encode_all, workers, units)))
            with processes(CORES, classic.prepare, next(iter(specs.values()))) as workers:
                _classic(workers, slides, 32)  # warm
                classics.append(_classic(workers, slides, _CLASSIC_TILES))
    for precision in _PRECISIONS:
        yield _line(precision, units, jobs[precision], stages[precision], loops[precision], classics)


def _line(
    precision: Precision,
    units: Sequence[Unit],
    jobs: list[_Job],
    stages: list[float],
    loops: list[float],
    classics: list[_Classic],
) -> Line:
    tiles = n_tiles(units)
    if any(len(job.rows) != tiles for job in jobs):
        raise AssertionError(f"{[len(job.rows) for job in jobs]} rows of {tiles} tiles")
    rate = tiles / median(stages)
    theirs = median(one.tiles_per_s for one in classics)
    cosine = _cosine(jobs[0].rows, classics[0].embeddings)
    return {
        "encoder": f"openvino_{precision}",
        "cores": CORES,
        "tiles": tiles,
        "tiles_per_s": rate,
        "loop_tiles_per_s": tiles / median(loops),
        "of_loop": rate * median(loops) / tiles,
        "classic_tiles": _CLASSIC_TILES,
        "classic_tiles_per_s": theirs,
        **{f"classic_{step}_ms": ms for step, ms in classics[0].ms.items()},
        "vs_classic": rate / theirs,
        "cosine_mean": f"{cosine.mean():.5f}",
        "cosine_min": f"{cosine.min():.5f}",
        **{f"{stage}_seconds": median(job.timings[stage] for job in jobs) for stage in jobs[0].timings},
        "whole_seconds": jobs[0].whole_s,
        "whole_vs_classic": tiles / theirs / jobs[0].whole_s,
        "later_whole_seconds": jobs[-1].whole_s,
    }


def _job(spec: FeatureSpec, slides: Sequence[Path]) -> _Job:
    """Run it as users do, into a folder of its own."""
    with tempfile.TemporaryDirectory() as folder, on_cores(CORES):
        rows = [f"{path.stem},1,{path.stem},0,{path}" for path in slides]
        (Path(folder) / "patients.csv").write_text("\n".join(["image_id,center_id,patient_id,image_num,uri", *rows]))
        [encoder] = spec.encoders.values()
        settings = {
            "patients": f"{folder}/patients.csv",
            "slides": {"root": str(inputs.FOLDER)},
            "output": {"root": f"{folder}/tables"},
            "stain": {"weights": spec.stain_weights},
            "encoders": {encoder.name: {"weights": encoder.weights}},
            "inference": {name: getattr(encoder, name) for name in ("runtime", "precision", "device")},
        }
        config = Path(folder) / "job.yaml"
        config.write_text(yaml.safe_dump(settings))
        command = [sys.executable, "-m", "jobs", "preprocess", "--config", str(config)]
        whole_s = seconds(lambda: subprocess.run(command, check=True, capture_output=True))
        [timings] = pl.read_delta(f"{folder}/tables/runs")["timings"].to_list()
        features = pl.read_delta(f"{folder}/tables/features")
        embeddings = features.select("image_id", "x_px", "y_px", "embedding", "embedding_max")
        return _Job(whole_s, dict(timings), embeddings)


def _classic(pool: ProcessPoolExecutor, slides: Sequence[Path], tiles: int) -> _Classic:
    """A sample of each slide's tiles, half of them to each process: from its middle, side by side."""
    kept = {path: inputs.kept_tiles(path) for path in slides}
    share = tiles // len(slides)
    parts = [(path, list(map(tuple, xy[len(xy) // 2 :][:share].tolist()))) for path, xy in kept.items()]
    done: list[tuple[classic.Embeddings, Counter[str]]] = []
    taken = seconds(lambda: done.extend(pool.map(classic.encode, *zip(*parts, strict=True))))
    embeddings = {key: both for some, _ in done for key, both in some.items()}
    spent = sum((each for _, each in done), Counter())
    return _Classic(tiles / taken, {step: 1000 * spent[step] / tiles for step in spent}, embeddings)


def _cosine(rows: pl.DataFrame, embeddings: classic.Embeddings) -> NDArray[np.float64]:
    """To the classic pipeline's, of its tiles: the worse of the two aggregates of each."""
    keys = ("image_id", "x_px", "y_px")
    of_sample = pl.DataFrame(list(embeddings), schema={key: rows.schema[key] for key in keys}, orient="row")
    found = of_sample.join(rows, on=keys, how="left", maintain_order="left")
    theirs = np.stack(list(embeddings.values()))
    worse = [
        cosines(np.stack(found[name].to_list()).astype(np.float32), theirs[:, i])
        for i, name in enumerate(("embedding", "embedding_max"))
    ]
    return np.minimum(*worse)
