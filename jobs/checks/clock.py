"""The check that takes a sample of the run's own work, and tells from it how long the cohort takes and how much it reads."""

import math
import statistics
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

from jobs.checks.place import Place
from jobs.checks.table import Row
from jobs.runtime.encoders import settle_runtime
from jobs.runtime.summary import readable_size
from udfs.patients import HEAP_A_BAG, MAX_BAG_BYTES
from udfs.sample import Sample, take_sample
from udfs.telling import some

SAMPLE_S = 30.0  # at most, but for what was begun; less where the cohort is small
_MOST_TASKS = 64  # of a sample: more tell nothing new
_SLIDES_A_TASK = 3
_OTHER_BYTES = 1_000  # of a tile in tables features and patients together, beside its embeddings


@dataclass(frozen=True)
class Cohort:
    """What there is to do."""

    slides: int  # that are there
    n_bytes: int  # of their files
    patients: Mapping[str, int]  # slides of each
    most_tiles: int | None  # a patient, tiling.max_tiles_per_patient

    def tiles(self, a_slide: float) -> float:
        """Tiles of all patients, where a slide has so many."""
        return sum(self._bags(a_slide))

    def most(self, a_slide: float) -> float:
        """Tiles of the patient with most of them."""
        return max(self._bags(a_slide))

    def _bags(self, a_slide: float) -> Iterator[float]:
        return (min(n * a_slide, self.most_tiles or math.inf) for n in self.patients.values())


@dataclass(frozen=True)
class Workforce:
    """Who does it."""

    tasks: int  # at once
    executors: int
    heap_bytes: int  # of each of these
    is_local: bool


def clock(place: Place) -> Row:
    """Tiles a second now; hours, bytes and, for a deadline, executors for the whole cohort."""
    found = [(image, place.located[image.image_id]) for image in place.images]
    slides = [(file.uri, image.mpp) for image, file in found if file.uri and file.info]
    if not slides:
        return Row("FAIL", "no slide of the cohort is there", "upload them, or mend slides.root and the CSV's uri")
    run = place.run
    run.encoder_runs_by = settle_runtime(run, [uri for uri, _ in slides], keep=False)  # as the run to come will
    at_once = place.stage.slots()
    n_tasks = min(at_once, _MOST_TASKS, len(slides))
    n_sampled = min(len(slides), n_tasks * _SLIDES_A_TASK)
    sampled = [slides[i * len(slides) // n_sampled] for i in range(n_sampled)]  # from all over the cohort
    samples = place.ask(
        *(
            partial(take_sample, sampled[i::n_tasks], run.tissue_spec, run.feature_spec, SAMPLE_S)
            for i in range(n_tasks)
        )
    )
    cohort = Cohort(
        len(slides),
        sum(file.info.size_bytes for _, file in found if file.info),
        Counter(image.patient_id for image, file in found if file.info),
        place.config.tiling.max_tiles_per_patient,
    )
    workforce = Workforce(at_once, place.n_executors, place.heap_bytes, place.is_local)
    numbers = 4 if place.config.output.embedding_dtype == "float32" else 2
    row = estimate(samples, cohort, workforce, bag_number_bytes=numbers, deadline_h=place.deadline_h)
    how = " ".join(run.encoder_runs_by)
    return replace(row, found=f"{how}: {row.found}")


def estimate(
    samples: Sequence[Sample],
    cohort: Cohort,
    workforce: Workforce,
    *,
    bag_number_bytes: int = 4,
    deadline_h: float | None = None,
) -> Row:
    """What the samples of some tasks that ran at once say of the whole cohort.

    Args:
        samples: one a task.
        cohort: what there is to do.
        workforce: all tasks at once; as fast as those of the samples.
        bag_number_bytes: what a number of an embedding takes in table patients; in table features it is 4.
        deadline_h: hours that the run may take.
    """
    seen = [slide for sample in samples for slide in sample.slides]
    errors = [slide.error for slide in seen if slide.error] + [error for sample in samples for error in sample.errors]
    busy = [sample for sample in samples if sample.n_tiles]
    good = [slide for slide in seen if not slide.error]
    if not busy:
        causes = errors or [slide.too_small for slide in seen if slide.too_small]
        said = some(causes, 1) if causes else f"no tissue on {len(seen)} slides"
        return Row("FAIL", said, "see README, How to read a failure" if errors else "check tiling and the slides")
    rate = statistics.fmean(sample.n_tiles / sample.seconds for sample in busy) * workforce.tasks
    n_tiles = cohort.tiles(statistics.fmean(slide.n_tiles for slide in good))
    masks_s = cohort.slides * statistics.fmean(slide.seconds for slide in good) / workforce.tasks
    hours = (masks_s + n_tiles / rate) / 3600
    encoded = sum(sample.n_tiles for sample in busy)
    reads = cohort.slides * statistics.fmean(slide.n_bytes for slide in good)
    reads += n_tiles * sum(sample.n_bytes for sample in busy) / encoded
    tables = n_tiles * (2 * busy[0].dim * (4 + bag_number_bytes) + _OTHER_BYTES)
    found = (
        f"{rate:,.1f} tiles/s by {workforce.tasks} tasks at once, from {encoded:,} tiles of {len(good)} slides. Cohort: "
        f"{cohort.slides:,} slides, about {_rounded(n_tiles)} tiles, {_hours(hours)}, reads {readable_size(round(reads))} of "
        f"{readable_size(cohort.n_bytes)}, writes {readable_size(round(tables))}"
    )
    remedies = []
    if errors:
        found += f"; {len(errors)} failures in the sample, such as {errors[0]}"
        remedies.append("see README, How to read a failure")
    most = cohort.most(statistics.fmean(slide.n_tiles for slide in good))
    tile = busy[0].dim * bag_number_bytes
    heap = HEAP_A_BAG * most * tile
    if most * tile > MAX_BAG_BYTES:
        found += f"; the largest patient's {_rounded(most)} tiles are more than a row can have"
        remedies.append(f"set tiling.max_tiles_per_patient to {MAX_BAG_BYTES // tile:,} or less")
    elif heap > workforce.heap_bytes:
        found += (
            f"; the largest patient's {_rounded(most)} tiles need a heap of {readable_size(round(heap))}, which is "
        )
        found += readable_size(workforce.heap_bytes)
        setting = "spark.driver.memory" if workforce.is_local else "spark.executor.memory"
        remedies.append(
            f"set {setting} to {math.ceil(heap / 2**30)}g or more, or tiling.max_tiles_per_patient, see README, Sizing"
        )
    if deadline_h is not None:
        needed = math.ceil(workforce.executors * hours / deadline_h)
        who, these = ("machine", "this") if workforce.is_local else ("executor", "these")
        found += f"; for {deadline_h:g} h: {_count(needed, who)} like {these}"
        if needed > workforce.executors:
            remedies.append(
                f"run on {_count(needed, who)}, of which there are {workforce.executors:,} now, or give it {_hours(hours)}"
            )
    return Row("warn" if remedies else "ok", found, "; ".join(remedies))


def _hours(hours: float) -> str:
    return f"{hours:.1f} h" if hours >= 1 else f"{60 * hours:.1f} min" if hours >= 1 / 60 else f"{3600 * hours:.0f} s"


def _count(n: int, what: str) -> str:
    return f"{n:,} {what}{'s' * (n != 1)}"


def _rounded(count: float) -> str:
    """Two digits, for more would claim too much."""
    digits = max(0, len(str(int(count))) - 2)
    return f"{round(count, -digits):,.0f}"
