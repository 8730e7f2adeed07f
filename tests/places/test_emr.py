"""conf/emr: against AWS's own models of the calls, as botocore has them, and against what it says in several places."""

import json
import re
from pathlib import Path
from typing import Any

import botocore.session
import pytest
from botocore.validate import ParamValidator

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "conf/emr"
DEFINITIONS = {  # file: service, operation
    "cluster.json": ("emr", "RunJobFlow"),
    "steps.json": ("emr", "AddJobFlowSteps"),
    "eks.json": ("emr-containers", "StartJobRun"),
    "serverless-application.json": ("emr-serverless", "CreateApplication"),
    "serverless-job.json": ("emr-serverless", "StartJobRun"),
}


def definition(name: str) -> Any:
    return json.loads((FOLDER / name).read_text())


def findings(service: str, operation: str, call: dict[str, Any]) -> str:
    """What AWS's client would refuse a call for: fields that it does not know or misses, and wrong types."""
    model = botocore.session.get_session().get_service_model(service).operation_model(operation)
    return str(ParamValidator().validate(call, model.input_shape).generate_report())


def call(name: str) -> dict[str, Any]:
    """A definition as the input of its call; steps are those of a cluster."""
    said = definition(name)
    arguments: dict[str, Any] = {"JobFlowId": "j-XXXXXXXXXXXXX", "Steps": said} if name == "steps.json" else said
    # tokens that the client makes itself
    return arguments if name in ("cluster.json", "steps.json") else arguments | {"clientToken": "made"}


@pytest.mark.parametrize("name", DEFINITIONS)
def test_definitions_are_calls_that_aws_knows(name: str) -> None:
    assert {path.name for path in FOLDER.glob("*.json")} == set(DEFINITIONS)
    assert findings(*DEFINITIONS[name], call(name)) == ""


@pytest.mark.parametrize(
    ("name", "wrong", "finding"),
    [
        ("cluster.json", {"Release": "emr-spark-8.0.0"}, 'Unknown parameter in input: "Release"'),
        ("cluster.json", {"Instances": {"Ec2Subnet": "subnet-1"}}, 'Unknown parameter in Instances: "Ec2Subnet"'),
        ("steps.json", {"Steps": [{"Name": "slides"}]}, 'Missing required parameter in Steps[0]: "HadoopJarStep"'),
        ("eks.json", {"releaseLabel": 8}, "Invalid type for parameter releaseLabel"),
        ("serverless-job.json", {"jobDriver": {"sparkSubmitJobDriver": {}}}, "sparkSubmitJobDriver"),
    ],
)
def test_a_wrong_field_is_found(name: str, wrong: dict[str, Any], finding: str) -> None:
    assert finding in findings(*DEFINITIONS[name], call(name) | wrong)


def properties(configurations: list[dict[str, Any]]) -> dict[str, dict[str, str]]:
    """Classification to properties, nested ones by their own name."""
    found = {}
    for each in configurations:
        keys = {key.lower(): value for key, value in each.items()}
        found[keys["classification"]] = keys.get("properties", {})
        found |= properties(keys.get("configurations", []))
    return found


def test_the_cluster_schedules_gpus_and_has_delta() -> None:
    cluster = definition("cluster.json")
    by_classification = properties(cluster["Configurations"])
    assert by_classification["delta-defaults"]["delta.enabled"] == "true"
    (calculator,) = by_classification["capacity-scheduler"].values()
    assert (
        calculator == "org.apache.hadoop.yarn.util.resource.DominantResourceCalculator"
    )  # else YARN counts memory alone
    assert by_classification["gpu"] == {"module.enabled": "true"}
    yarn, spark = by_classification["yarn-site"], by_classification["spark-defaults"]
    assert yarn["yarn.resource-types"] == yarn["yarn.nodemanager.resource-plugins"] == "yarn.io/gpu"
    mount = yarn["yarn.nodemanager.linux-container-executor.cgroups.mount-path"]
    assert mount == by_classification["cgroups"]["root"]
    bootstrap = (FOLDER / "bootstrap.sh").read_text()
    assert f"mkdir -p {mount}/devices" in bootstrap
    for path in (
        spark["spark.pyspark.python"].removesuffix("/bin/python"),
        spark["spark.executor.resource.gpu.discoveryScript"],
    ):
        assert path in bootstrap
    (action,) = cluster["BootstrapActions"]
    assert action["ScriptBootstrapAction"]["Path"].endswith("/bootstrap.sh")
    roles = {group["InstanceRole"] for group in cluster["Instances"]["InstanceGroups"]}
    assert roles == {"MASTER", "CORE", "TASK"}


@pytest.mark.parametrize("name", ["eks.json", "serverless-job.json"])
def test_jobs_without_gpus_run_a_job_that_there_is_with_delta_and_the_packages_of_the_image(name: str) -> None:
    said = definition(name)
    spark = properties(said["configurationOverrides"]["applicationConfiguration"])["spark-defaults"]
    (driver,) = said["jobDriver"].values()
    job = re.fullmatch(r"s3://[^/]+/slidelake/(jobs/\w+\.py)", driver["entryPoint"])
    assert job and (ROOT / job[1]).is_file()
    everything = json.dumps(said)
    assert "delta-spark.jar" in everything and "delta-storage.jar" in everything and "gpu" not in everything
    assert spark["spark.sql.extensions"] == "io.delta.sql.DeltaSparkSessionExtension"
    pythons = {value for key, value in spark.items() if "python" in key.lower()}
    assert pythons == {"/opt/slidelake/bin/python"}
    assert "venv /opt/slidelake " in (FOLDER / "Dockerfile").read_text()


def test_steps_and_jobs_take_the_code_of_this_version() -> None:
    version = re.search(r'^version = "(.*)"', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    assert version
    zips = {zip for name in DEFINITIONS for zip in re.findall(r"slidelake-[\d.]+\.zip", (FOLDER / name).read_text())}
    assert zips == {f"slidelake-{version[1]}.zip"}
