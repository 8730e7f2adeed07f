"""The doctor on two executors where five things are broken: each has its row, and its row says what to do."""

import os
import sys
import sysconfig
import venv
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from jobs.runtime.config import Config
from tests.cluster.clusters import submit
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


def test_five_things_that_are_broken_are_told_apart(
    small_config: Callable[..., Config], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    slide = [("a1", "north", "001", 0, f"http://{HOST}:{free_port()}/a1.tif?sig={SECRET}")]
    config = small_config(slide, encoder={"device": "auto"}, resources={"gpus_per_task": 1})
    csv = Path(config.patients)
    csv.write_text(csv.read_text().replace(",label\n", ",uri\n"))
    file = tmp_path / "config.yaml"
    file.write_text(yaml.safe_dump(config.model_dump(mode="json")))
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
    said = submit(tmp_path, "local-cluster[2,1,1024]", conf, "jobs/doctor.py", "--config", str(file))
    print(f"\n{said.stdout}")
    assert said.returncode == 1, said.stderr
    assert SECRET not in said.stdout + said.stderr and "Traceback" not in said.stdout + said.stderr
    rows: dict[str, tuple[str, str]] = {}
    for line in said.stdout.splitlines():
        if line[:6].strip() in ("ok", "warn", "FAIL", "skip"):
            what = line.split()[1]
            rows[what] = (line.split()[0], line)
        elif line.strip().startswith("-> "):
            rows[what] = (rows[what][0], rows[what][1] + line)
    here = ".".join(map(str, sys.version_info[:3]))
    broken = {
        "python": ("1 of 2 executors have another than the driver's", "3.9.18 on", "PYSPARK_PYTHON", here),
        "packages": ("missing: timm on", "from the driver's lock file"),
        "memory": ("spark.executor.pyspark.memory gives a worker 1.1 GB", "leave it unset"),
        "gpus": ("an executor has 0 by Spark, 0 visible; 1 a task asked for", "resources.gpus_per_task to null"),
        "store": ("read_failed", "http://127.0.0.1", "a route to the store"),
    }
    for what, texts in broken.items():
        status, text = rows[what]
        assert status == "FAIL" and [part for part in texts if part not in text] == []
    assert {what: status for what, (status, _) in rows.items() if what not in broken} == {
        **dict.fromkeys(("executors", "java", "spark", "delta", "scratch"), "ok"),
        **dict.fromkeys(("code", "output", "encoder", "clock"), "skip"),
    }
    assert said.stdout.rstrip().endswith("5 of 14 checks failed")
