"""What Spark's event log tells, which is what its UI and history server show."""

import json
from collections import defaultdict
from pathlib import Path
from typing import Any

Events = list[dict[str, Any]]


def event_log_conf(folder: Path) -> dict[str, str]:
    """Settings of Spark with which it writes one file of plain JSON into the folder, which is there."""
    settings = {"enabled": "true", "dir": folder.as_uri(), "rolling.enabled": "false", "compress": "false"}
    return {f"spark.eventLog.{key}": value for key, value in settings.items()}


def event_log_options(folder: Path) -> list[str]:
    """The same as words of spark-submit."""
    return [word for key, value in event_log_conf(folder).items() for word in ("--conf", f"{key}={value}")]


def read_events(folder: Path) -> Events:
    """Of the only application that wrote there."""
    [log] = folder.iterdir()
    return [json.loads(line) for line in log.read_text().splitlines()]


def descriptions(events: Events) -> list[str]:
    """Of Spark's jobs, in the order in which they began."""
    started = [event for event in events if event["Event"] == "SparkListenerJobStart"]
    return [event["Properties"].get("spark.job.description", "") for event in started]


def accumulated(events: Events) -> dict[str, dict[str, int]]:
    """By description of stages: their accumulators that are not Spark's own, by name."""
    of_stage: dict[tuple[int, int], str] = {}
    found: dict[str, dict[str, int]] = defaultdict(dict)
    for event in events:
        info = event.get("Stage Info", {})
        stage = info.get("Stage ID"), info.get("Stage Attempt ID")
        if event["Event"] == "SparkListenerStageSubmitted":
            of_stage[stage] = event["Properties"].get("spark.job.description", "")
        elif event["Event"] == "SparkListenerStageCompleted":
            for one in info["Accumulables"]:
                if not one["Internal"] and one.get("Metadata") != "sql":
                    found[of_stage[stage]][one["Name"]] = int(one["Value"])
    return found
