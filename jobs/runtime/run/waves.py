"""The wave loop: survey the cohort, then bring wave after wave of patients through the stages of a job."""

import gc
from collections.abc import Callable

import pandas as pd
from pyspark.sql import functions as F

from jobs.runtime.cohort.locating import locate, read_cohort
from jobs.runtime.run.encoder_runtime import settle_runtime
from jobs.runtime.run.progress import Progress
from jobs.runtime.run.run import Run
from jobs.runtime.run.survey import plan_waves, take_survey
from jobs.runtime.settings.recipe import full_recipe
from jobs.runtime.spark.resources import executors_gone
from jobs.runtime.spark.session import slots
from udfs.wording import some
from udfs.wsi import ErrorCode

_SLIDES_A_SLOT, _MOST_SLIDES_A_WAVE = 8, 512
_MOST_MISSING_A_WAVE = 4096  # slides; their names are lists in queries
_FATE = ("status", "error_code", "error_message")  # of a slide


def work_in_waves(run: Run, *, retry_failed: bool, check: Callable[[], None] = lambda: None) -> pd.DataFrame:
    """Survey the cohort, then bring wave after wave of patients through the stages of the run's job.

    Args:
        run: the run.
        retry_failed: take failed slides for stale.
        check: may refuse `run.recipe`, before anything is read.

    Returns:
        The survey as it was before.
    """
    config, job = run.config, run.job
    if job.stale is None:
        raise ValueError(f"job {job.name} has no stages")
    with run.stage("plan"):
        images = read_cohort(config)
        located = locate(images, config)
        run.step("tables")
        for name in (*job.writes, "runs"):
            run.tables.create(name)
        models = None
        if job.encodes:
            _ = run.stage_resources  # what no executor can give ends the run here
            run.step("encoder runtimes")
            run.encoder_runs_by = settle_runtime(run, [place.uri for place in located.values() if place.uri])
            models = (*run.models.fingerprint, *_numerics(run))
            run.recipe = full_recipe(config, run.models, run.encoder_runs_by)
            check()
        run.step(f"survey of {len(images):,} images")
        survey = take_survey(images, located, run.tables, config, models, retry_failed=retry_failed)
        run.record.problems += [line for line in (_unreachable(survey), job.waiting(survey)) if line]
        work = survey[job.stale(run, survey)]
        slides_a_wave = config.run.wave_slides or min(_SLIDES_A_SLOT * slots(run.spark), _MOST_SLIDES_A_WAVE)
        waves = plan_waves(_effort(work, slides_a_wave), slides_a_wave)
    run.progress = Progress(len(work), len(waves))
    try:
        for patients in waves:
            wave = survey[survey["patient_id"].isin(patients)]
            run.progress.wave(int(work["patient_id"].isin(patients).sum()))
            gone = executors_gone(run.spark)
            _through_stages(run, wave)
            if given_up := _take_back(run, wave, gone):
                survey_now = take_survey(images, located, run.tables, config, models, retry_failed=True)
                _through_stages(run, survey_now[survey_now["patient_id"].isin(given_up)])
            # What py4j names of the JVM is in cycles: plans and broadcasts of a wave would stay until Python looks for these.
            gc.collect()
    finally:
        run.progress.close()
        run.progress = Progress(0, 0)
    run.record.counts["waves"] = len(waves)
    return survey


def _through_stages(run: Run, wave: pd.DataFrame) -> None:
    for stage in run.job.stages:
        stage(run, wave)


def _effort(work: pd.DataFrame, slides_a_wave: int) -> dict[str, float]:
    """How much work there is on each patient; 1 is a slide that is read."""
    is_missing = work["slide_stale"] & work["error_code"].notna()  # a row is written, nothing is read
    effort = pd.Series(1.0, work.index).mask(is_missing, min(1.0, slides_a_wave / _MOST_MISSING_A_WAVE))
    return {str(patient): total for patient, total in effort.groupby(work["patient_id"]).sum().items()}


def _take_back(run: Run, wave: pd.DataFrame, gone: set[str]) -> set[str]:
    """The patients of slides that this wave gave up as `worker_died` while executors went, beside those of `gone`.

    A task that begins anew is not told why: because its worker died of the slide, or because its executor was taken away, by a
    queue whose share it was in or with its node. So the slides get another chance, of two more deaths. Those that were given up
    while they were encoded are good again in table slides, for their tiles are there.
    """
    if executors_gone(run.spark) <= gone:
        return set()
    run.step("slides that executors left behind")
    died = (F.col("run_id") == run.record.run_id) & (F.col("error_code") == ErrorCode.WORKER_DIED.value)
    rows = run.tables.read("slides").where(died & F.col("image_id").isin(list(wave["image_id"])))
    given_up = rows.select("image_id", "patient_id", "n_tiles").collect()
    if given_up:
        names = some(sorted(row.image_id for row in given_up))
        run.progress.say(f"slidelake: executors went while they worked on {names}: these are taken up again")
    good = [(row.image_id, "ok", None, None) for row in given_up if row.n_tiles]
    if good:
        schema = "image_id string, status string, error_code string, error_message string"
        run.tables.upsert("slides", run.spark.createDataFrame(good, schema), "image_id", _FATE)
    return {row.patient_id for row in given_up}


def _numerics(run: Run) -> tuple[str, ...]:
    """What of how the encoder runs tells rows apart: every runtime's fp32 is the same but for rounding."""
    encoder, (runtime, precision) = run.models.encoder, run.encoder_runs_by
    parts: list[str] = []
    if encoder.pooling != "map":
        parts.append(encoder.pooling)
    elif not encoder.is_channels_first:
        parts.append("channels last")
    if precision != "fp32":
        parts += [runtime, precision]
    return tuple(parts)


def _unreachable(survey: pd.DataFrame) -> str:
    lost = survey[survey["unreachable"] == True]  # noqa: E712 - missing for images that are gone
    if lost.empty:
        return ""
    first = lost.iloc[0]
    return (
        f"{len(lost)} slides that were read before can't be reached now, their rows are kept while the settings stay: "
        f"{first['error_code']}: {first['error_message']}"
    )
