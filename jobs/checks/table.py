"""Checks and their rows: each check by itself and within its time, whatever happens to the others; the table for people."""

import threading
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Literal

from jobs.checks.place import MissingPackageError, NoPythonError, Place, telling_line
from jobs.runtime.settings.config import ConfigError
from jobs.runtime.spark.resources import REQUEST_REMEDY, ended_executors, executor_request, executors_of
from udfs.wording import printable

Status = Literal["ok", "warn", "FAIL", "skip"]
INSTALL = (
    "install slidelake and its extras on every node from the driver's lock file, or ship an environment by --archives"
)
_SETTINGS = "correct what it names, in the settings or where they point: conf/cohort.yaml explains each setting"
_DEAD_EXECUTORS = "look at their logs, and at the page of the master or ResourceManager for how they ended"
_SILENT_STORE = (
    "the driver waits: give it a route to slides, tables and weights (proxy, firewall, endpoint), and look at its log"
)


@dataclass(frozen=True)
class Row:
    """What a check found, and what to do about it; a check that failed always names a remedy."""

    status: Status
    found: str
    remedy: str = ""
    what: str = ""  # the check

    def __post_init__(self) -> None:
        if self.status == "FAIL" and not self.remedy:
            raise ValueError(f"no remedy for {self.found!r}")


@dataclass(frozen=True)
class Check:
    """One thing to look at."""

    what: str
    look: Callable[[Place], Row]
    limit_s: float
    needs: tuple[str, ...] = ()  # checks whose faults this check could not tell from its own
    is_advice: bool = False  # a run works without the result of this check: the check warns and does not fail


def look(place: Place, checks: Iterable[Check]) -> Iterator[Row]:
    """Yields a row for each check as soon as the check is done."""
    failed: set[str] = set()
    for check in checks:
        missing = [name for name in check.needs if name in failed]
        row = _skipped(", ".join(missing)) if missing else _in_time(place, check, failed)
        if row.status in ("FAIL", "skip"):
            failed.add(check.what)
        if check.is_advice and row.status == "FAIL":
            row = replace(row, status="warn")
        yield replace(row, what=check.what)


def as_text(row: Row) -> str:
    """Returns the row as a line, with the remedy on a second line."""
    line = printable(f"  {row.status:<4}  {row.what:<9} {row.found}")
    return f"{line}\n{'':18}-> {printable(row.remedy)}" if row.remedy else line


def _skipped(needs: str) -> Row:
    return Row("skip", f"not checked: it needs {needs}")


def _in_time(place: Place, check: Check, failed: Collection[str]) -> Row:
    """Returns what the check finds. One that takes too long goes on in its thread (`Place.left`); its jobs are cancelled."""
    context, rows = place.spark.sparkContext, list[Row]()

    def run() -> None:
        context.setJobGroup(check.what, f"slidelake doctor: {check.what}", interruptOnCancel=True)
        try:
            rows.append(check.look(place))
        except ConfigError as error:
            rows.append(Row("FAIL", error.reason, error.remedy or _SETTINGS))
        except NoPythonError:
            rows.append(_skipped("python"))
        except MissingPackageError as error:
            is_known = "packages" in failed
            rows.append(_skipped(f"packages ({error})") if is_known else Row("FAIL", str(error), INSTALL))
        except Exception as error:
            rows.append(Row("FAIL", telling_line(error), "look for it in the logs of driver and executors"))

    thread = threading.Thread(target=run, name=check.what, daemon=True)
    thread.start()
    thread.join(check.limit_s)
    if not thread.is_alive():
        return rows[0]
    place.left.append(check.what)
    tracker = context.statusTracker()
    jobs = [tracker.getJobInfo(job) for job in tracker.getJobIdsForGroup(check.what)]
    context.cancelJobGroup(check.what)
    return _overdue(place, check.limit_s, waits_for_tasks=any(job and job.status == "RUNNING" for job in jobs))


def _overdue(place: Place, limit_s: float, *, waits_for_tasks: bool) -> Row:
    """Returns what does not answer: executors, executors that never started, or a store that the driver waits for."""
    no_answer = f"no answer in {limit_s:g} s"
    if not waits_for_tasks:
        return Row("FAIL", no_answer, _SILENT_STORE)
    if place.is_local or executors_of(place.spark):
        return Row("FAIL", no_answer, "look at the logs of the executors for what holds the check up")
    if n_ended := len(ended_executors(place.spark)):
        return Row("FAIL", f"no executor after {limit_s:g} s: {n_ended} started and ended", _DEAD_EXECUTORS)
    found = f"no executor started in {limit_s:g} s, of those that Spark requests: {executor_request(place.spark)}"
    return Row("FAIL", found, REQUEST_REMEDY)
