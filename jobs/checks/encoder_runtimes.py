"""The check that measures all runtimes and precisions on tiles of the run, and names the fastest one that is right."""

from functools import partial

from jobs.checks.extent import spread_over
from jobs.checks.place import Place
from jobs.checks.table import Row
from udfs.sample_cohort import MeasuredRuntime, measure_runtimes

MEASURE_S = 5.0  # of PyTorch in fp32, at most; the other ways encode as many tiles
LEAST_COSINE = 0.999  # to PyTorch's fp32
_WORTHWHILE = 1.1  # times as fast as the settings
_SLIDES = 64  # at most, spread over the cohort: the first that has tissue gives the tiles


def encoder_runtimes(place: Place) -> Row:
    """Says how fast each runtime and precision of the executors is, and which settings to take."""
    files = [(place.located[image.image_id], image.mpp) for image in place.images]
    slides = [(file.uri, mpp, file.info.size_bytes) for file, mpp in files if file.uri and file.info]
    chosen = [slides[i][:2] for i in spread_over([size for *_, size in slides], min(_SLIDES, len(slides)))]
    run = place.run
    [measured] = place.ask(partial(measure_runtimes, chosen, run.tissue_spec, run.feature_spec, MEASURE_S))
    specs = run.feature_spec.encoders.values()
    return recommended(measured, place.config.inference.runtime, "/".join(sorted({one.precision for one in specs})))


def recommended(measured: list[MeasuredRuntime], runtime: str, precision: str) -> Row:
    """Says what the measurement means for these settings."""
    right = [way for way in measured if way.cosine >= LEAST_COSINE]
    if not right:
        return Row("skip", "no tile with tissue to measure runtimes by")
    ways = [
        f"{way.runtime} {way.precision} {way.tiles_per_s:,.1f}{'' if way in right else f' (cosine {way.cosine:.5f})'}"
        for way in sorted(measured, key=lambda way: -way.tiles_per_s)
    ]
    found = f"tiles/s of one task: {', '.join(ways)}"
    best = max(right, key=lambda way: way.tiles_per_s)
    settings = f"inference.runtime={best.runtime} inference.precision={best.precision}"
    now = next((way for way in measured if (way.runtime, way.precision) == (runtime, precision)), None)
    if now and now not in right:
        return Row("warn", f"{found}; {precision} changes embeddings: its cosine to fp32 is too low", f"set {settings}")
    if now is None or best.tiles_per_s >= _WORTHWHILE * now.tiles_per_s:
        found += f"; fastest with a cosine of {LEAST_COSINE} to fp32: {settings}"
    return Row("ok", found)
