"""The doctor on two executors: on nodes that have all, and where five things are broken, each with what to do about it."""

import os
import sys
import sysconfig
import venv
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from jobs.doctor import CHECKS
from jobs.runtime.settings.config import Config
from tests.cluster.clusters import submit
from tests.environments import CODE, make_dist
from tests.stores.process import HOST, free_port

SECRET = "c2VjcmV0LW9mLXRoZS1zdG9yZQ"
OLD_PYTHON = """\
import sys
from collections import namedtuple
sys.version_info = namedtuple("version_info", "major minor micro releaselevel serial")(3, 9, 18, "final", 0)
"""


def environment(folder: Path, without: str | None = None, at_start: str = "") -> Path:
    """The Python of an environment that has what this one has, but for a package; at its start it runs some text."""
    venv.EnvBuilder(symlinks=True).create(folder)
    here = Path(sysconfig.get_path("purelib"))
    site = folder / here.relative_to(Path(sys.prefix))
    for entry in here.iterdir():
        if without is None or not entry.name.startswith(without):
            (site / entry.name).symlink_to(entry)
    (site / "sitecustomize.py").write_text(at_start)
    return folder / "bin/python"


def python_by_executor(folder: Path) -> Path:
    """A Python that lacks timm on executor 0 and is an old one on executor 1, as where nodes were set up by hand."""
    lacks = environment(folder / "lacks", without="timm")
    old = environment(folder / "old", at_start=OLD_PYTHON)
    script = folder / "python"
    script.write_text(f'#!/bin/sh\ncase $PWD in */work/*/1) exec {old} "$@" ;; *) exec {lacks} "$@" ;; esac\n')
    script.chmod(0o755)
    return script


def settings(config: Config, folder: Path) -> str:
    """The settings as a file; its path."""
    file = folder / "config.yaml"
    file.write_text(yaml.safe_dump(config.model_dump(mode="json")))
    return str(file)


def rows_of(table: str) -> dict[str, tuple[str, str]]:
    """By check: its status, and its line with the remedy."""
    rows: dict[str, tuple[str, str]] = {}
    for line in table.splitlines():
        if line[:6].strip() in ("ok", "warn", "FAIL", "skip"):
            what = line.split()[1]
            rows[what] = (line.split()[0], line)
        elif line.strip().startswith("-> "):
            rows[what] = (rows[what][0], rows[what][1] + line)
    return rows


def test_all_is_well_on_a_standalone_cluster_whose_nodes_have_the_packages_and_are_sent_the_code(
    two_nodes: str, node_python: Path, small_config: Callable[..., Config], tmp_path: Path
) -> None:
    make_dist()
    conf = {
        "spark.pyspark.python": node_python,
        "spark.pyspark.driver.python": sys.executable,
        "spark.submit.pyFiles": CODE,
        "spark.cores.max": 2,  # one on each node
    }
    inference = {"runtime": "openvino", "precision": "bf16"}
    file = settings(small_config(tiling={"max_background": 0.5}, inference=inference), tmp_path)
    said = submit(tmp_path, two_nodes, conf, "jobs/doctor.py", "--config", file, "--deadline", "1")
    print(f"\n{said.stdout}")
    assert said.returncode == 0, said.stdout + said.stderr
    rows = rows_of(said.stdout)
    assert {what: status for what, (status, _) in rows.items()} == dict.fromkeys((check.what for check in CHECKS), "ok")
    assert f"slidelake doctor, {two_nodes}\n" in said.stdout and "executors 2 of 1 cores" in rows["executors"][1]
    assert "clock     openvino bf16: " in rows["clock"][1]


def test_five_things_that_are_broken_are_told_apart(
    small_config: Callable[..., Config], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    slide = [("a1", "north", "001", 0, f"http://{HOST}:{free_port()}/a1.tif?sig={SECRET}")]
    config = small_config(slide, inference={"device": "auto"}, resources={"gpus_per_task": 1})
    csv = Path(config.patients)
    csv.write_text(csv.read_text().replace(",label\n", ",uri\n"))
    (tmp_path / "bin").mkdir()
    no_gpus = tmp_path / "bin/nvidia-smi"
    no_gpus.write_text("#!/bin/sh\nexit 9\n")
    no_gpus.chmod(0o755)
    monkeypatch.setenv("PATH", f"{no_gpus.parent}{os.pathsep}{os.environ['PATH']}")
    conf = {
        "spark.pyspark.python": python_by_executor(tmp_path),
        "spark.pyspark.driver.python": sys.executable,
        "spark.executor.pyspark.memory": "1g",
    }
    said = submit(tmp_path, "local-cluster[2,1,1024]", conf, "jobs/doctor.py", "--config", settings(config, tmp_path))
    print(f"\n{said.stdout}")
    assert said.returncode == 1, said.stderr
    assert SECRET not in said.stdout + said.stderr and "Traceback" not in said.stdout + said.stderr
    rows = rows_of(said.stdout)
    here = ".".join(map(str, sys.version_info[:3]))
    broken = {
        "python": (
            "1 of 2 executors have another than the driver's",
            "3.9.18 on",
            "point spark.pyspark.python (now",
            here,
        ),
        "packages": ("missing: timm on", "from the driver's lock file"),
        "memory": ("spark.executor.pyspark.memory gives a worker 1.1 GB", "leave it unset"),
        "gpus": ("an executor has 0 by Spark, 0 visible; 1 per task requested", "resources.gpus_per_task to null"),
        "store": ("read_failed", "http://127.0.0.1", "a route to the store"),
    }
    for what, texts in broken.items():
        status, text = rows[what]
        assert status == "FAIL" and [part for part in texts if part not in text] == []
    assert {what: status for what, (status, _) in rows.items() if what not in broken} == {
        **dict.fromkeys(("executors", "java", "spark", "delta", "scratch"), "ok"),
        **dict.fromkeys(("code", "output", "encoder", "runtimes", "clock"), "skip"),
    }
    assert said.stdout.rstrip().endswith("5 of 15 checks failed")
