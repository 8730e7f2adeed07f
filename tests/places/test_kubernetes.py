"""conf/k8s and conf/spark/kubernetes.conf: against Kubernetes' schemas, and as the pods that Spark makes of them."""

import json
import re
import sys
from pathlib import Path
from typing import Any

import kubernetes_validate
import pyspark
import pytest
import yaml
from pyspark.sql import SparkSession

from jobs.runtime.settings.config import Config
from tests.cluster.clusters import pretend_gpus
from tests.conftest import SMALL_COHORT, config_in, preprocess_in
from tests.environments import make_dist
from tests.events import by_profile, event_log_conf, read_events
from tests.faults.frames import assert_same_rows, frames
from tests.laptop import Laptop, checkout_of
from tests.places.kubernetes import Kubernetes, Manifest
from tests.stores.process import free_port

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "conf/k8s"
VERSIONS = ("1.30", "1.33", "1.37")
SPARK = Path(pyspark.__file__).parent
TEMPLATES = ("driver.yaml", "executor.yaml", "executor-gpu.yaml")


def manifests(name: str) -> list[Manifest]:
    return list(yaml.safe_load_all((FOLDER / name).read_text()))


def validate(manifest: Manifest) -> None:
    for version in VERSIONS:
        kubernetes_validate.validate(manifest, version, strict=True)


@pytest.mark.parametrize("name", [*TEMPLATES, "access.yaml"])
def test_manifests_are_what_kubernetes_takes(name: str) -> None:
    for manifest in manifests(name):
        validate(manifest)


def test_a_wrong_field_would_be_found() -> None:
    (template,) = manifests("executor-gpu.yaml")
    template["spec"]["toleration"] = template["spec"].pop("tolerations")
    with pytest.raises(kubernetes_validate.ValidationError, match="toleration"):
        validate(template)


def test_executors_with_gpus_differ_in_where_they_may_run_and_in_nothing_else() -> None:
    (plain,), (gpu,) = manifests("executor.yaml"), manifests("executor-gpu.yaml")
    del gpu["spec"]["affinity"], gpu["spec"]["tolerations"]
    assert gpu == plain


def test_queues_accounts_and_pods_know_each_other() -> None:
    """Kueue's schemas are in no registry; what its objects name must be there, and the quota cover what pods ask for."""
    queues = manifests("queues.yaml")
    names = {
        kind: {m["metadata"]["name"]: m for m in queues if m["kind"] == kind} for kind in {m["kind"] for m in queues}
    }
    for local in (manifest for manifest in queues if manifest["kind"] == "LocalQueue"):
        shared = names["ClusterQueue"][local["spec"]["clusterQueue"]]
        assert (
            shared["spec"]["namespaceSelector"]["matchLabels"]["kubernetes.io/metadata.name"]
            == local["metadata"]["namespace"]
        )
        (group,) = shared["spec"]["resourceGroups"]
        (flavor,) = group["flavors"]
        assert flavor["name"] in names["ResourceFlavor"]
        assert (
            {r["name"] for r in flavor["resources"]}
            == set(group["coveredResources"])
            == {"cpu", "memory", "nvidia.com/gpu"}
        )
    for template in TEMPLATES:
        labels = manifests(template)[0]["metadata"]["labels"]
        assert labels["kueue.x-k8s.io/queue-name"] in names["LocalQueue"]
        assert labels.get("kueue.x-k8s.io/priority-class", "slidelake-driver") in names["WorkloadPriorityClass"]
    accounts = {m["metadata"]["name"] for m in manifests("access.yaml") if m["kind"] == "ServiceAccount"}
    conf = (ROOT / "conf/spark/kubernetes.conf").read_text()
    assert accounts == set(re.findall(r"serviceAccountName +(\S+)", conf))


def test_the_image_copies_what_there_is_and_has_the_delta_and_the_paths_that_are_named_elsewhere() -> None:
    dockerfile = (FOLDER / "Dockerfile").read_text()
    copied = [
        word for line in re.findall(r"^COPY (?!--from)(.*) \S+$", dockerfile, re.MULTILINE) for word in line.split()
    ]
    files = {word for word in copied if not word.startswith("--")}
    assert "dist/requirements.txt" in files
    assert all((ROOT / name).is_file() for name in files if not name.startswith("dist/"))
    makefile = re.search(r"^DELTA := (.*)$", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert makefile and f"jars.sha256 {makefile[1]}\n" in dockerfile
    conf = (ROOT / "conf/spark/kubernetes.conf").read_text()
    assert set(re.findall(r"/opt/\S+", conf)) == {"/opt/slidelake/bin/python", "/opt/slidelake/discover.sh"}
    assert "PYSPARK_PYTHON=/opt/slidelake/bin/python" in dockerfile
    user = re.search(r"^USER (\d+)$", dockerfile, re.MULTILINE)
    assert user and all(
        manifests(name)[0]["spec"]["securityContext"]["runAsUser"] == int(user[1]) for name in TEMPLATES
    )


IMAGE = "registry.example.com/slidelake:0.1.0"
SMALL: dict[str, object] = {  # for a machine that is all nodes at once; memory beside the heap stays as configured
    "spark.driver.memory": "1g",
    "spark.executor.memory": "512m",
    "spark.executor.cores": 1,
    "spark.executor.extraJavaOptions": "-XX:TieredStopAtLevel=1",
    "spark.dynamicAllocation.maxExecutors": 1,
    "spark.kubernetes.allocation.batch.delay": "101ms",
    "spark.kubernetes.report.interval": "100ms",
    "spark.blockManager.port": 0,
    "spark.sql.shuffle.partitions": 2,
    "spark.ui.enabled": "false",
}


def settings(folder: Path, slides: Path, weights: Path) -> Config:
    """Three slides of two patients, batches of one size everywhere, and a GPU for a task that encodes."""
    folder.mkdir()
    inference, tiling = {"batch_size": 2, "device": "auto"}, {"max_background": 0.8}
    resources = {"gpus_per_task": 1}
    return config_in(folder, slides, weights, SMALL_COHORT[:3], tiling=tiling, inference=inference, resources=resources)


def test_the_main_job_runs_in_the_pods_that_spark_makes_and_encodes_in_those_with_gpus(
    node_python: Path, spark: SparkSession, small_slides: Path, encoder_weights: Path, tmp_path: Path
) -> None:
    """In cluster mode: spark-submit makes the driver's pod, the driver those of executors; all of them run, as processes."""
    make_dist()
    image = {
        "/opt/spark": SPARK,
        "/opt/slidelake/bin/python": node_python,
        "/opt/slidelake/discover.sh": pretend_gpus(tmp_path, 1),
    }
    uploads, events = tmp_path / "uploads", tmp_path / "events"
    uploads.mkdir()
    events.mkdir()
    cluster = Kubernetes(tmp_path / "pods", image)
    with cluster.running():
        yours = {
            "master": f"k8s://{cluster.url}",
            "image": IMAGE,
            "namespace": "team-a",
            "uploads": uploads.as_uri(),
            "executor": "executor-gpu.yaml",
        }
        conf = {
            **SMALL,
            **event_log_conf(events),
            "spark.kubernetes.driver.master": cluster.url,
            "spark.driver.port": free_port(),
            "spark.driver.blockManager.port": free_port(),
        }
        checkout = checkout_of(tmp_path / "checkout", "k8s", yours, "kubernetes.conf", conf)
        config = settings(tmp_path / "cluster", small_slides, encoder_weights)
        status, said = Laptop("k8s", checkout, {}).run("preprocess", config)
        driver, *executors = cluster.of("Pod")
        phase = cluster.phase(driver)
    logs = "".join(log.read_text() for log in (tmp_path / "pods").glob("*/log"))
    assert (status, phase) == (0, "Succeeded"), said + logs
    executor, gpu_executor = executors

    local = settings(tmp_path / "local", small_slides, encoder_weights)
    preprocess_in(spark, local)
    expected = frames(Path(local.output.root))
    assert expected["features"].height > 10
    for name, found in frames(Path(config.output.root)).items():
        assert_same_rows(found, expected[name])

    asked, tasks = by_profile(read_events(events))
    [ours] = asked.keys() - {0}
    assert "gpu" not in asked[0] and asked[ours]["gpu"]["Amount"] == 1
    assert {task["executor"] for task in tasks[0]}.isdisjoint(task["executor"] for task in tasks[ours])

    for manifest in cluster.made:
        validate(manifest)
    for pod, template in (
        (driver, "driver.yaml"),
        (executor, "executor-gpu.yaml"),
        (gpu_executor, "executor-gpu.yaml"),
    ):
        assert_merged(manifests(template)[0], pod)
        assert pod["spec"]["containers"][0]["image"] == IMAGE
        assert pod["spec"]["containers"][0]["args"][0] == pod["metadata"]["labels"]["spark-role"]
    told = json.dumps([driver, executor, gpu_executor])
    assert not any(here in told for here in (str(tmp_path / "pods"), str(node_python), sys.executable))
    assert [resources(pod) for pod in (driver, executor, gpu_executor)] == [
        {"cpu": "2", "memory": "3072Mi"},
        {"cpu": "1", "memory": "6656Mi"},
        {"cpu": "1", "memory": "6656Mi", "nvidia.com/gpu": "1"},
    ]
    accounts = [pod["spec"]["serviceAccountName"] for pod in (driver, executor, gpu_executor)]
    assert accounts == ["slidelake-driver", "slidelake-executor", "slidelake-executor"]


def resources(pod: Manifest) -> dict[str, Any]:
    """What a pod's container is given: requests, and limits, which are requests of what has none."""
    given = pod["spec"]["containers"][0]["resources"]
    assert given["limits"]["memory"] == given["requests"]["memory"]
    return dict(given["limits"] | given["requests"])


def assert_merged(template: Any, made: Any) -> None:
    """All that the template says, what was made of it says too."""
    if isinstance(template, dict):
        for key, value in template.items():
            assert_merged(value, made[key])
    elif isinstance(template, list):
        assert len(made) >= len(template)
        for ours, theirs in zip(template, made, strict=False):
            assert_merged(ours, theirs)
    else:
        assert made == template
