"""From a command line to an exit status: the same arguments, messages and summary for every job."""

import argparse
import logging
import traceback
import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress

import pandas as pd
import yaml

from jobs.runtime.cohort.locating import Cohort, read_cohort, secrets_in
from jobs.runtime.cohort.patient_csv import Image, unlabelled
from jobs.runtime.run.run import Job, Run
from jobs.runtime.run.summary import failed_slides, read_state, slide_warnings, summarise
from jobs.runtime.run.waves import work_in_waves
from jobs.runtime.settings.arguments import BAD_CONFIG, parse_arguments
from jobs.runtime.settings.config import Completion, Config, ConfigError, load_config
from jobs.runtime.spark.cancelling import Cancelling
from jobs.runtime.spark.resources import executors_of, telling_who_is_awaited
from jobs.runtime.spark.session import is_local, refuse_unusable_spark, start_session
from jobs.runtime.spark.signals import Stopped, name_of, stop_signals
from jobs.runtime.spark.streams import log_to_stderr
from jobs.runtime.tables.stopped import why_stopped
from jobs.runtime.tables.writable import refuse_unwritable
from udfs.wording import printable
from udfs.wsi.store import redact

DONE, FAILED, SLIDES_FAILED = 0, 1, 3
JobWork = Callable[[Run, argparse.Namespace], int]  # of a job; returns the exit status
_log = logging.getLogger("slidelake.run")


def run_job(job: Job, argv: Sequence[str] | None) -> int:
    """Bring tables up to date wave by wave; returns the exit status."""

    def work(run: Run, arguments: argparse.Namespace) -> int:
        return conclude(run, work_in_waves(run, retry_failed=getattr(arguments, "retry_failed", False)))

    return main(job, work, argv)


def conclude(run: Run, survey: pd.DataFrame, lines: Sequence[str] = ()) -> int:
    """Print the summary of a run and further lines, name failed slides and those with warnings; returns the exit status."""
    run.progress.step("summary")
    state = read_state(run.tables, run.job, survey)
    run.record.counts.update(state.counts())
    failed = failed_slides(state.slides)
    print("\n".join([summarise(run.job, run.record, run.config, state), *lines]))
    for line in (*slide_warnings(state.slides), *failed, *run.record.problems):
        _log.warning(printable(f"slidelake: {line}"))
    bad = bool(failed or run.record.problems) and run.config.on_failed_slides == "report"
    return SLIDES_FAILED if bad else DONE


def main(
    job: Job,
    work: JobWork,
    argv: Sequence[str] | None,
    *,
    check: Callable[[Config], None] = lambda _: None,
    complete: Completion | None = None,
) -> int:
    """Read arguments and settings, start Spark, do the work, leave a record; returns the exit status.

    `check` may refuse settings before Spark starts; `complete`: see `load_config`.
    """

    def work_with_spark(config: Config, arguments: argparse.Namespace) -> int:
        images: Sequence[Image] = ()
        try:
            refuse_unusable_spark()
            cohort = read_cohort(config)  # a bad CSV ends the run here: Spark takes long to start
            images = cohort.images
            report_unlabelled(job.name, images)
            check(config)
            refuse_unwritable(config, job.name)
            return _run(job, config, cohort, work, arguments)
        except ConfigError as error:
            return _refuse(job.name, error, secrets_in(config, images))

    return main_alone(job.name, work_with_spark, argv, complete)


def main_alone(
    job: str,
    work: Callable[[Config, argparse.Namespace], int],
    argv: Sequence[str] | None,
    complete: Completion | None = None,
) -> int:
    """As `main`, for a job that starts Spark itself if it needs to, and that has no row in table runs."""
    log_to_stderr()
    arguments = parse_arguments(job, argv)
    secrets: Sequence[str] = ()
    try:
        config = load_config(arguments.config, arguments.overrides, complete=complete)
        secrets = secrets_in(config)
        if arguments.print_config:
            print(yaml.safe_dump(config.masked(), sort_keys=False), end="")
            return DONE
        with stop_signals():
            return work(config, arguments)
    except ConfigError as error:
        return _refuse(job, error, secrets)
    except (Exception, KeyboardInterrupt) as error:
        if not isinstance(error, KeyboardInterrupt):
            _log.error(redact(traceback.format_exc(), secrets))
        _log.error("slidelake %s: stopped by %s", job, name_of(error))
        return FAILED


def report_unlabelled(job: str, images: Sequence[Image]) -> None:
    """Log how many rows of the CSV have no label, and which texts stand for no label."""
    if line := unlabelled(images):
        _log.warning(printable(f"slidelake {job}: {line}"))


def _refuse(job: str, error: ConfigError, secrets: Sequence[str]) -> int:
    _log.error(printable(redact(f"slidelake {job}: {error}", secrets)))
    return BAD_CONFIG


def _run(job: Job, config: Config, cohort: Cohort, work: JobWork, arguments: argparse.Namespace) -> int:
    run = Run(config, start_session(f"slidelake {job.name}"), job)
    run.cohort = cohort
    log_to_stderr(run.record.run_id)
    cancelling = Cancelling(run.spark)
    try:
        with cancelling, telling_who_is_awaited(run.spark), warnings.catch_warnings():
            # The error that follows says the same.
            warnings.filterwarnings("ignore", "toPandas attempted Arrow optimization")
            run.spark.sparkContext.setJobGroup(run.record.run_id, f"slidelake {job.name}")
            run.progress.step("tables")
            run.tables.open(*job.tables)
            status = work(run, arguments)
            if cancelling.stopped_by:  # in a call that was not Spark's to cancel
                raise Stopped(cancelling.stopped_by)
            run.write_record("done")
        return status
    except ConfigError:
        raise
    except (Exception, KeyboardInterrupt) as error:
        name = name_of(error)
        is_stop = isinstance(error, KeyboardInterrupt)
        why = None if is_stop else why_stopped(error, run.tables)
        if not (is_stop or why):
            _log.error(redact(traceback.format_exc(), secrets_in(config, cohort.images)))
        go_on = f"stopped by {name}; finished waves are in the tables, run the same command again to go on"
        _log.error(printable(f"slidelake {job.name}: {why or go_on}"))
        _record_early_end(run, f"stopped by {name}")
        return FAILED
    finally:
        run.spark.stop()


def _record_early_end(run: Run, status: str) -> None:
    """Append the run to table runs, or say that this is not possible: Spark has ended, or never had an executor."""
    with suppress(Exception):
        if is_local(run.spark) or executors_of(run.spark):
            # A thread has its own connection to the JVM: an interrupted call may have left its answer on this one's.
            with ThreadPoolExecutor(1) as thread:
                thread.submit(run.write_record, status).result()
            return
    _log.error("slidelake %s: this run has no row in table runs", run.job.name)
