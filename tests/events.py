"""What Spark's event log tells, which is what its UI and history server show."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

Events = list[dict[str, Any]]
Task = dict[str, Any]
"""{"executor", "began", "ended", ...}, times in any one unit."""


def event_log_conf(folder: Path) -> dict[str, str]:
    """Settings of Spark with which it writes one file of plain JSON into the folder, which is there."""
    settings = {"enabled": "true", "dir": folder.as_uri(), "rolling.enabled": "false", "compress": "false"}
    return {f"spark.eventLog.{key}": value for key, value in settings.items()}


def event_log_options(folder: Path) -> list[str]:
    """The same as words of spark-submit."""
    return [word for key, value in event_log_conf(folder).items() for word in ("--conf", f"{key}={value}")]


def read_events(log: Path) -> Events:
    """Of a file, or of a folder that one application wrote to."""
    [file] = [log] if log.is_file() else log.iterdir()
    return [json.loads(line) for line in file.read_text().splitlines()]


def descriptions(events: Events) -> list[str]:
    """Of Spark's jobs, in the order in which they began."""
    started = [event for event in events if event["Event"] == "SparkListenerJobStart"]
    return [event["Properties"].get("spark.job.description", "") for event in started]


def by_profile(events: Events) -> tuple[dict[int, Any], dict[int, list[Task]]]:
    """Of each resource profile, 0 being that of all stages without their own: what its tasks ask for, and its tasks."""
    asked = {
        event["Resource Profile Id"]: event["Task Resource Requests"]
        for event in events
        if event["Event"] == "SparkListenerResourceProfileAdded"
    }
    stages = {
        event["Stage Info"]["Stage ID"]: event["Stage Info"]["Resource Profile Id"]
        for event in events
        if event["Event"] == "SparkListenerStageSubmitted"
    }
    tasks: dict[int, list[Task]] = {}
    for event in events:
        if event["Event"] == "SparkListenerTaskEnd":
            info, metrics = event["Task Info"], event.get("Task Metrics")
            ended = info["Finish Time"]
            if metrics:  # of a task that went with its executor there may be none
                # "Finish Time" is when the driver has the result, and by then the next task may run.
                ended = info["Launch Time"] + metrics["Executor Deserialize Time"] + metrics["Executor Run Time"]
            task = {"executor": info["Executor ID"], "began": info["Launch Time"], "ended": ended}
            tasks.setdefault(stages[event["Stage ID"]], []).append(task)
    return asked, tasks


def at_once(tasks: Iterable[Task]) -> int:
    """The most tasks that ran at one time."""
    times: list[tuple[float, float]] = [(task["began"], task["ended"]) for task in tasks]
    return max(sum(begins <= began < ends for begins, ends in times) for began, _ in times)
