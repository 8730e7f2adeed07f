"""conf/databricks: the job against the types of Databricks' own client, and what the bundle names against what there is.

The bundle's JSON schema is not in a package whose licence lets everyone run it; the client's types are those that the schema
is made from.
"""

import re
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from databricks.sdk.service.catalog import VolumeType
from databricks.sdk.service.jobs import JobSettings

from jobs.__main__ import task
from jobs.runtime.settings.arguments import JOBS
from jobs.runtime.settings.config import describe_settings

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "conf/databricks"
TEXT = (FOLDER / "databricks.yml").read_text()
BUNDLE: dict[str, Any] = yaml.safe_load(TEXT)
JOB: dict[str, Any] = BUNDLE["resources"]["jobs"]["slidelake"]
ALONE: dict[str, Any] = BUNDLE["resources"]["jobs"]["alone"]
TASKS: dict[str, dict[str, Any]] = {each["task_key"]: each for each in JOB["tasks"]}
READS = {"features": "slides", "patients": "features", "splits": "patients", "train": "splits"}


def as_the_client_has_it(job: dict[str, Any]) -> dict[str, Any]:
    """What of a job is left once Databricks' client has read it: fields and values that it does not know are not."""
    return dict(JobSettings.from_dict(job).as_dict())


@pytest.mark.parametrize("job", [JOB, ALONE], ids=["pipeline", "alone"])
def test_the_client_knows_every_field_of_the_job(job: dict[str, Any]) -> None:
    assert as_the_client_has_it(job) == job


@pytest.mark.parametrize(
    "wrong",
    [
        {"concurrent_runs": 1},
        {"tasks": [{"task_key": "slides", "cluster_key": "gpus"}]},
        {"job_clusters": [{"job_cluster_key": "gpus", "new_cluster": {"data_security_mode": "ALONE"}}]},
    ],
)
def test_a_wrong_field_is_found(wrong: dict[str, Any]) -> None:
    assert as_the_client_has_it(JOB | wrong) != JOB | wrong


def test_every_reference_is_to_something_of_the_bundle() -> None:
    references = set(re.findall(r"\$\{([^}]+)\}", TEXT))
    assert {name for name in references if name.startswith("var.")} == {f"var.{name}" for name in BUNDLE["variables"]}
    for name in sorted(references):
        if not name.startswith("var."):
            place: Any = BUNDLE
            for part in name.split("."):
                place = place[part]
    clusters = {cluster["job_cluster_key"] for cluster in JOB["job_clusters"]}
    assert {each["job_cluster_key"] for each in TASKS.values()} == clusters == {"processors", "gpus"}
    assert VolumeType(BUNDLE["resources"]["volumes"]["files"]["volume_type"])


def test_all_follow_the_schema_by_the_name_that_a_target_gives_it() -> None:
    """Mode development puts a prefix before it, whatever the presets say; a variable knows nothing of that."""
    schema, volume = BUNDLE["resources"]["schemas"]["slidelake"], BUNDLE["resources"]["volumes"]["files"]
    assert schema["name"] == "${var.schema}" and TEXT.count("${var.schema}") == 1
    assert volume["schema_name"] == "${resources.schemas.slidelake.name}"
    folder = f"/Volumes/{volume['catalog_name']}/{volume['schema_name']}/{volume['name']}"
    by_name = f"output.schema={schema['catalog_name']}.{volume['schema_name']}"
    for name, each in TASKS.items():
        _, _, config, *overrides = each["python_wheel_task"]["parameters"]
        assert config == f"{folder}/${{var.config}}"
        # train needs no Spark, and so has no catalog
        assert [word for word in overrides if "schema" in word] == ([] if name == "train" else [by_name])


def test_a_task_runs_the_job_of_its_name_after_the_one_whose_table_it_reads() -> None:
    assert {name: [each["task_key"] for each in TASKS[name].get("depends_on", [])] for name in TASKS} == {
        "slides": []
    } | {name: [table] for name, table in READS.items()}
    settings = {key for key, _, _ in describe_settings()}
    for name, each in TASKS.items():
        job, flag, _, *overrides = each["python_wheel_task"]["parameters"]
        assert job == name and job in JOBS and flag == "--config"
        assert {override.partition("=")[0] for override in overrides} <= settings
    assert TASKS["features"]["job_cluster_key"] == "gpus"


def test_every_job_is_there_to_be_run_alone_with_what_comes_along() -> None:
    assert [each["task_key"] for each in ALONE["tasks"]] == list(JOBS)
    assert all(
        {"task_key", "job_cluster_key", "python_wheel_task", "libraries"} == set(each) for each in ALONE["tasks"]
    )
    place = yaml.safe_load((ROOT / "conf/places/databricks.yaml").read_text())
    assert "--only $job alone -- $job " in " ".join(place["commands"][-1].split())


def test_the_wheel_has_the_entry_point_of_the_tasks() -> None:
    project = (ROOT / "pyproject.toml").read_text()
    for each in (*TASKS.values(), *ALONE["tasks"]):
        wheel = each["python_wheel_task"]
        assert f'name = "{wheel["package_name"]}"' in project
        assert f'{wheel["entry_point"]} = "jobs.__main__:{task.__name__}"' in project
        library, *more = each["libraries"]
        assert library == {"whl": "../../dist/slidelake-*.whl"}
        assert all(f'"{extra["pypi"]["package"]}"' in project for extra in more)
    assert "../../dist" in BUNDLE["sync"]["paths"]


def test_the_target_for_production_has_the_root_that_its_mode_asks_for() -> None:
    targets = BUNDLE["targets"].values()
    assert [each["workspace"]["root_path"] for each in targets if each["mode"] == "production"]


def test_a_status_that_is_not_0_fails_the_task(monkeypatch: pytest.MonkeyPatch) -> None:
    """What an entry point returns, Databricks drops."""
    monkeypatch.setattr(sys, "argv", ["slidelake", "no-such-job"])
    with pytest.raises(SystemExit, match="2"):
        task()
    monkeypatch.setattr(sys, "argv", ["slidelake", "--version"])
    task()
