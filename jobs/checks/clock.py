"""The check that samples the run's own work, and estimates how long the cohort takes and how much it reads."""

import math
import statistics
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial

from jobs.checks.extent import FEWEST_SLIDES, UNKNOWN_SPREAD, Bounds, CohortSize, PerSlide, spread_over, total
from jobs.checks.place import Place
from jobs.checks.table import Row
from jobs.runtime.run.run import runtime_text
from jobs.runtime.run.summary import readable_size
from udfs.bag_patients import HEAP_A_BAG, MAX_BAG_BYTES
from udfs.sample_cohort import Sample, take_sample
from udfs.wording import some

SAMPLE_S = 30.0  # at most, plus the work that was begun; less for a small cohort
_MOST_TASKS = 64  # of a sample: more tasks add nothing
_SLIDES_PER_TASK = 3
_OTHER_BYTES = 1_000  # per tile in tables features and patients together, beside its embeddings
_FAILURES = "see README, How to read a failure"


@dataclass(frozen=True)
class Workforce:
    """The tasks and executors that do the work."""

    tasks: int  # at once
    executors: int
    heap_bytes: int  # per executor
    is_local: bool


def clock(place: Place) -> Row:
    """Says tiles per second now; for the whole cohort hours between two bounds, bytes and, for a deadline, executors."""
    files = [(image, place.located[image.image_id]) for image in place.images]
    found = [(image, file.uri, file.info.size_bytes) for image, file in files if file.uri and file.info]
    if not found:
        return Row(
            "FAIL", "no slide of the cohort was found", "upload the slides, or correct slides.root and the CSV's uri"
        )
    run, at_once = place.run, place.stage.slots()
    n_tasks = min(at_once, _MOST_TASKS, len(found))
    chosen = spread_over([size for *_, size in found], min(len(found), n_tasks * _SLIDES_PER_TASK))
    slides = [(found[i][1], found[i][0].mpp) for i in chosen]
    samples = place.ask(
        *(partial(take_sample, slides[i::n_tasks], run.tissue_spec, run.feature_spec, SAMPLE_S) for i in range(n_tasks))
    )
    of_patient: dict[str, list[int]] = defaultdict(list)
    for image, _, size in found:
        of_patient[image.patient_id].append(size)
    cohort = CohortSize(of_patient, place.config.tiling.max_tiles_per_patient)
    workforce = Workforce(at_once, place.n_executors, place.heap_bytes, place.is_local)
    numbers = 4 if place.config.output.embedding_dtype == "float32" else 2
    row = estimate(samples, cohort, workforce, bag_number_bytes=numbers, deadline_h=place.deadline_h)
    return replace(row, found=f"{runtime_text(place.config)}: {row.found}")


def estimate(
    samples: Sequence[Sample],
    cohort: CohortSize,
    workforce: Workforce,
    *,
    bag_number_bytes: int = 4,
    deadline_h: float | None = None,
) -> Row:
    """Says what the samples of some tasks that ran at once, one per task, mean for the whole cohort and workforce.

    `bag_number_bytes` is the size of a number of an embedding in table patients; in table features it is 4. The run may take
    `deadline_h` hours.
    """
    seen = [slide for sample in samples for slide in sample.slides]
    errors = [slide.error for slide in seen if slide.error] + [error for sample in samples for error in sample.errors]
    busy = [sample for sample in samples if sample.n_tiles]
    good = [slide for slide in seen if not slide.error]
    if not busy:
        causes = errors or [slide.too_small for slide in seen if slide.too_small]
        reason = some(causes, 1) if causes else f"no tissue on {len(seen)} slides"
        return Row("FAIL", reason, _FAILURES if errors else "check tiling and the slides")
    rates = [sample.n_tiles / sample.seconds * workforce.tasks for sample in busy]
    rate, sizes = statistics.fmean(rates), cohort.sizes
    bags = cohort.bags(PerSlide([(slide.size_bytes, slide.n_tiles) for slide in good], sizes))
    n_tiles = total(bags)
    mask_seconds = PerSlide([(slide.size_bytes, slide.seconds) for slide in good], sizes)
    masks = [mask_seconds.of(size) for size in sizes]
    mask_s = total(masks)
    hours = Bounds(
        (mask_s.low / workforce.tasks + n_tiles.low / max(rates)) / 3600,
        (mask_s.likely / workforce.tasks + n_tiles.likely / rate) / 3600,
        # at worst, the slide that takes longest is begun last
        (mask_s.high / workforce.tasks + max(mask.high for mask in masks) + n_tiles.high / min(rates)) / 3600,
    )
    encoded = sum(sample.n_tiles for sample in busy)
    mask_bytes = PerSlide([(slide.size_bytes, slide.n_bytes) for slide in good], sizes)
    reads = total(map(mask_bytes.of, sizes)).likely
    reads += n_tiles.likely * sum(sample.n_bytes for sample in busy) / encoded
    dims = busy[0].dims.values()
    writes = n_tiles.likely * sum(sum(of_tile) * (4 + bag_number_bytes) + _OTHER_BYTES for of_tile in dims)
    found = (
        f"{rate:,.1f} tiles/s by {workforce.tasks} tasks at once, from {encoded:,} tiles of {len(good)} slides. Cohort: "
        f"{len(sizes):,} slides, about {_rounded(n_tiles.likely)} tiles{_between(n_tiles)}, {_span(hours)} beside the start-up, "
        f"reads {readable_size(round(reads))} of {readable_size(sum(sizes))}, writes {readable_size(round(writes))}"
    )
    remedies = []
    if len(good) < FEWEST_SLIDES and n_tiles.low < n_tiles.high:
        found += (
            f"; fewer than {FEWEST_SLIDES} slides were sampled, so tiles may be {UNKNOWN_SPREAD} times fewer or more"
        )
    if errors:
        found += f"; {len(errors)} failures in the sample, such as {errors[0]}"
        remedies.append(_FAILURES)
    most = max(bag.likely for bag in bags)
    tile_bytes = max(dim for of_tile in dims for dim in of_tile) * bag_number_bytes
    heap = HEAP_A_BAG * most * tile_bytes
    if most * tile_bytes > MAX_BAG_BYTES:
        found += f"; the largest patient's {_rounded(most)} tiles are more than a row can have"
        remedies.append(f"set tiling.max_tiles_per_patient to {MAX_BAG_BYTES // tile_bytes:,} or less")
    elif heap > workforce.heap_bytes:
        found += (
            f"; the largest patient's {_rounded(most)} tiles need a heap of {readable_size(round(heap))}, which is "
            f"{readable_size(workforce.heap_bytes)}"
        )
        setting = f"spark.{'driver' if workforce.is_local else 'executor'}.memory"
        remedies.append(
            f"set {setting} to {math.ceil(heap / 2**30)}g or more, or tiling.max_tiles_per_patient, see README, Sizing"
        )
    if deadline_h is not None:
        needed = math.ceil(workforce.executors * hours.high / deadline_h)
        kind, these = ("machine", "this") if workforce.is_local else ("executor", "these")
        count = f"{needed:,} {kind}{'s' * (needed != 1)}"
        found += f"; for {deadline_h:g} h: {count} like {these}"
        if needed > workforce.executors:
            remedies.append(f"run on {count} instead of {workforce.executors:,}, or give it {_hours(hours.high)}")
    return Row("warn" if remedies else "ok", found, "; ".join(remedies))


def _hours(hours: float) -> str:
    return f"{hours:.1f} h" if hours >= 1 else f"{60 * hours:.1f} min" if hours >= 1 / 60 else f"{3600 * hours:.0f} s"


def _span(hours: Bounds) -> str:
    low, high = _hours(hours.low), _hours(hours.high)
    return low if low == high else f"{low} to {high}"


def _between(tiles: Bounds) -> str:
    low, high = _rounded(tiles.low), _rounded(tiles.high)
    return "" if low == high else f" ({low} to {high})"


def _rounded(count: float) -> str:
    digits = max(0, len(str(int(count))) - 2)  # behind the first two: more would claim too much
    return f"{round(count, -digits):,.0f}"
