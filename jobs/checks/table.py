"""Checks and their rows: each check by itself and within its time, whatever becomes of the others; the table for people."""

import threading
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Literal

from jobs.checks.place import NoPythonError, Place, cause_of
from jobs.runtime.config import ConfigError

Status = Literal["ok", "warn", "FAIL", "skip"]
_SILENT_EXECUTORS = "look at the logs of the executors for what holds it up"
_SILENT_STORE = (
    "it is the driver that waits: give it, too, a route to slides, tables and weights (proxy, firewall, endpoint), "
    "and look at its log"
)


@dataclass(frozen=True)
class Row:
    """What a check found, and what to do about it; nothing where all is well."""

    status: Status
    found: str
    remedy: str = ""
    what: str = ""  # the check


@dataclass(frozen=True)
class Check:
    """One thing to look at."""

    what: str
    look: Callable[[Place], Row]
    limit_s: float
    needs: tuple[str, ...] = ()  # checks without which this one could not tell its own fault from theirs


def look(place: Place, checks: Iterable[Check]) -> Iterator[Row]:
    """A row for each check, as soon as it is there."""
    failed: set[str] = set()
    for check in checks:
        missing = [name for name in check.needs if name in failed]
        skipped = Row("skip", f"not looked at, for it needs {', '.join(missing)}")
        row = skipped if missing else _in_time(place, check)
        if row.status in ("FAIL", "skip"):
            failed.add(check.what)
        yield replace(row, what=check.what)


def as_text(row: Row) -> str:
    """A line, and below it the remedy."""
    remedy = f"\n{'':18}-> {row.remedy}" if row.remedy else ""
    return f"  {row.status:<4}  {row.what:<9} {row.found}{remedy}"


def _in_time(place: Place, check: Check) -> Row:
    """What the check finds. One that takes too long is left to itself (`Place.left`), and the jobs that it waits for are
    cancelled.
    """
    context = place.spark.sparkContext
    rows: list[Row] = []

    def run() -> None:
        context.setJobGroup(check.what, f"slidelake doctor: {check.what}", interruptOnCancel=True)
        try:
            rows.append(check.look(place))
        except ConfigError as error:  # its text has the remedy
            rows.append(Row("FAIL", str(error)))
        except NoPythonError:
            rows.append(Row("skip", "not looked at, for no executor has a Python that runs"))
        except Exception as error:
            rows.append(Row("FAIL", cause_of(error), "look for it in the logs of driver and executors"))

    thread = threading.Thread(target=run, name=check.what, daemon=True)
    thread.start()
    thread.join(check.limit_s)
    if thread.is_alive():
        place.left.append(check.what)
        tracker = context.statusTracker()
        jobs = [tracker.getJobInfo(job) for job in tracker.getJobIdsForGroup(check.what)]
        waits_for_executors = any(job and job.status == "RUNNING" for job in jobs)
        context.cancelJobGroup(check.what)
        return Row(
            "FAIL", f"no answer in {check.limit_s:g} s", _SILENT_EXECUTORS if waits_for_executors else _SILENT_STORE
        )
    return rows[0]
