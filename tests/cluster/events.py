"""Spark's event logs: which tasks ran where and when, and with which resource profile."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

Task = dict[str, Any]
"""{"executor", "began", "ended", ...}, times in any one unit."""


def by_profile(log: Path) -> tuple[dict[int, Any], dict[int, list[Task]]]:
    """Of each resource profile, 0 being that of all stages without their own: what its tasks ask for, and its tasks."""
    ran = read(log)
    asked = {
        event["Resource Profile Id"]: event["Task Resource Requests"]
        for event in ran
        if event["Event"] == "SparkListenerResourceProfileAdded"
    }
    stages = {
        event["Stage Info"]["Stage ID"]: event["Stage Info"]["Resource Profile Id"]
        for event in ran
        if event["Event"] == "SparkListenerStageSubmitted"
    }
    tasks: dict[int, list[Task]] = {}
    for event in ran:
        if event["Event"] == "SparkListenerTaskEnd":
            info, metrics = event["Task Info"], event["Task Metrics"]
            # "Finish Time" is when the driver has the result, and by then the next task may run.
            ended = info["Launch Time"] + metrics["Executor Deserialize Time"] + metrics["Executor Run Time"]
            task = {"executor": info["Executor ID"], "began": info["Launch Time"], "ended": ended}
            tasks.setdefault(stages[event["Stage ID"]], []).append(task)
    return asked, tasks


def read(log: Path) -> list[dict[str, Any]]:
    """All events, in order."""
    return [json.loads(line) for line in log.read_text().splitlines()]


def at_once(tasks: Iterable[Task]) -> int:
    """The most tasks that ran at one time."""
    times: list[tuple[float, float]] = [(task["began"], task["ended"]) for task in tasks]
    return max(sum(begins <= began < ends for begins, ends in times) for began, _ in times)
