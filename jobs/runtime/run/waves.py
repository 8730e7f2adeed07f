"""The wave loop: survey the cohort, then bring wave after wave of patients through the stages of a job."""

import gc
import json
import logging
from collections.abc import Callable, Collection, Mapping

import pandas as pd
from pyspark.sql import functions as F

from jobs.runtime.cohort.locating import Located, locate
from jobs.runtime.run.run import ORIGINS, Run, check_licences
from jobs.runtime.run.snapshot import read_snapshot
from jobs.runtime.run.survey import plan_waves, take_survey
from jobs.runtime.settings.identity import Identity, Recipe, recorded_models
from jobs.runtime.spark.resources import ended_executors
from jobs.runtime.spark.session import slots
from udfs.wording import some
from udfs.wsi import ErrorCode

_log = logging.getLogger("slidelake.waves")
_SLIDES_A_SLOT, _MOST_SLIDES_A_WAVE = 8, 512
_MOST_MISSING_A_WAVE = 4096  # slides; their names are lists in queries
_OF_ENCODERS = ("features", "patients")
_FATE = ("status", "error_code", "error_message")  # of a slide


def work_in_waves(run: Run, *, retry_failed: bool, check: Callable[[], None] = lambda: None) -> pd.DataFrame:
    """Survey the cohort, then bring wave after wave of patients through the stages of the run's job.

    Args:
        run: the run.
        retry_failed: take failed slides for stale.
        check: may refuse `run.identity`, before anything is read.

    Returns:
        The survey as it was before.
    """
    job, progress = run.job, run.progress
    with progress.stage("plan"):
        located = locate(run.images, run.config)
        progress.step("tables")
        run.identity = Identity(run.config, _models(run))
        check()
        for name in (*job.writes, "runs"):
            run.tables.create(name, _origins_of(run, name, changed=False))
        survey = _survey(run, located, retry_failed=retry_failed)
        run.record.problems += [line for line in (_unreachable(survey), _waiting(survey, job.waits_for)) if line]
        work = survey[survey[list(job.stale)].any(axis=1)]
        slides_a_wave = run.config.run.wave_slides or min(_SLIDES_A_SLOT * slots(run.spark), _MOST_SLIDES_A_WAVE)
        waves = plan_waves(_effort(work, slides_a_wave), slides_a_wave)
    with progress.waves(len(work), len(waves)):
        for patients in waves:
            progress.wave(int(work["patient_id"].isin(patients).sum()))
            ended_before = ended_executors(run.spark)
            _through_stages(run, survey, patients)
            if given_up := _take_back(run, survey, patients, ended_before):
                _through_stages(run, _survey(run, located, retry_failed=True), given_up)
            # What py4j names of the JVM is in cycles: plans and broadcasts of a wave would stay until Python looks for these.
            gc.collect()
    for name in job.writes:  # now that no row is of the weights before
        run.tables.create(name, _origins_of(run, name, changed=True))
    run.record.counts["waves"] = len(waves)
    return survey


def _models(run: Run) -> dict[str, Recipe]:
    """What the models add to the identity of features, by encoder; not of those that no run recorded, or if the job does not use
    it.
    """
    if run.job.models == "loaded":
        _ = run.stage_resources  # a profile that no executor can give ends the run here
        identities = run.models.identities.items()  # weights by their numbers, from whatever file
        return {encoder: dict(part.split("=", 1) for part in parts) for encoder, parts in identities}
    if run.job.models == "recorded":
        check_licences(run.config, run.origins)
        run.progress.step("models of features")
        rows = run.tables.read("runs").select("started_at", "config", "features").where("size(features) > 0").collect()
        newest = sorted(rows, key=lambda row: row.started_at, reverse=True)
        found = {
            encoder: recorded_models(run.config, encoder, ((row.config, row.features) for row in newest))
            for encoder in run.config.encoders
        }
        return {encoder: recipe for encoder, recipe in found.items() if recipe is not None}
    return {}


def _origins_of(run: Run, table: str, *, changed: bool) -> dict[str, str]:
    """The property of a table that names the origin of its encoders; those that it has stay unless `changed`."""
    if table not in _OF_ENCODERS or not run.origins:
        return {}
    noted = json.loads(run.tables.property(table, ORIGINS) or "{}")
    return {ORIGINS: json.dumps(noted | run.origins if changed else run.origins | noted, sort_keys=True)}


def _survey(run: Run, located: Mapping[str, Located], *, retry_failed: bool) -> pd.DataFrame:
    run.progress.step(f"survey of {len(run.images):,} images")
    snapshot = read_snapshot(run.tables, run.config.tiling, with_patients="patients" in run.job.writes)
    return take_survey(run.images, located, snapshot, run.identity, retry_failed=retry_failed)


def _through_stages(run: Run, survey: pd.DataFrame, patients: Collection[str]) -> None:
    wave = survey[survey["patient_id"].isin(patients)]
    for stage in run.job.stages:
        stage(run, wave)


def _effort(work: pd.DataFrame, slides_a_wave: int) -> dict[str, float]:
    """Return how much work there is on each patient; 1 is a slide that is read."""
    is_missing = work["slide_stale"] & work["error_code"].notna()  # a row is written, nothing is read
    effort = pd.Series(1.0, work.index).mask(is_missing, min(1.0, slides_a_wave / _MOST_MISSING_A_WAVE))
    return {str(patient): total for patient, total in effort.groupby(work["patient_id"]).sum().items()}


def _take_back(run: Run, survey: pd.DataFrame, patients: Collection[str], ended_before: set[str]) -> set[str]:
    """Return the patients of slides that a wave gave up as `worker_died` while executors ended.

    Spark does not tell a new attempt of a task why the last one ended: its worker died of the slide, or its executor was taken
    away by a queue or with its node. So the slides get another chance, of two more deaths. Those that were given up while they
    were encoded are good again in table slides, because their tiles are there.
    """
    if ended_executors(run.spark) <= ended_before:
        return set()
    run.progress.step("slides that executors left behind")
    images = list(survey.loc[survey["patient_id"].isin(patients), "image_id"])
    died = (F.col("run_id") == run.record.run_id) & (F.col("error_code") == ErrorCode.WORKER_DIED.value)
    rows = run.tables.read("slides").where(died & F.col("image_id").isin(images))
    given_up = rows.select("image_id", "patient_id", "n_tiles").collect()
    if given_up:
        names = some(sorted(row.image_id for row in given_up))
        _log.warning(f"slidelake: executors ended while they worked on {names}: these slides are tried again")
    good = [(row.image_id, "ok", None, None) for row in given_up if row.n_tiles]
    if good:
        schema = "image_id string, status string, error_code string, error_message string"
        run.tables.upsert("slides", run.spark.createDataFrame(good, schema), "image_id", _FATE)
    return {row.patient_id for row in given_up}


def _unreachable(survey: pd.DataFrame) -> str:
    lost = survey[survey["unreachable"]]
    if lost.empty:
        return ""
    first = lost.iloc[0]
    return (
        f"{len(lost)} slides that were read before cannot be reached now, their rows are kept while the settings stay: "
        f"{first['error_code']}: {first['error_message']}"
    )


def _waiting(survey: pd.DataFrame, flag_of_job: Mapping[str, str]) -> str:
    flags, jobs = list(flag_of_job.values()), list(flag_of_job)
    number = survey.loc[survey[flags].any(axis=1), "patient_id"].nunique()
    remedy = f"{' and '.join(jobs)} {'job: run it' if len(jobs) == 1 else 'jobs: run them'}, then this again"
    return f"{number} patients wait for the {remedy}" if number else ""
