"""A laptop with a checkout, from which `slidelake submit` sends jobs to clusters whose nodes have no code."""

import os
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import yaml

from jobs.runtime.settings.config import Config
from tests.cluster.clusters import daemon
from tests.environments import CODE, ROOT
from tests.stores.process import HOST

_COMMAND_S = 300


@dataclass(frozen=True)
class Laptop:
    """Where commands are given."""

    place: str
    checkout: Path  # like this one, but for what its owner fills in below conf, and for what is built
    environment: Mapping[str, str]

    @contextmanager
    def submitting(self, job: str, config: Config, *arguments: str) -> "Iterator[subprocess.Popen[bytes]]":
        """`slidelake submit --on PLACE JOB` while it runs; what it says is in `said`."""
        settings = self.checkout / "my.yaml"
        settings.write_text(yaml.safe_dump(config.model_dump(mode="json")))
        words = ("--on", self.place, job, "--config", str(settings), *arguments)
        path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
        environment = {"PATH": path, "SPARK_LOCAL_IP": HOST, **self.environment}
        command = [sys.executable, "-m", "jobs", "submit", *words]
        with daemon(command, environment, self.checkout / "said.log") as process:
            yield process

    @property
    def said(self) -> str:
        """What the clients said."""
        return (self.checkout / "said.log").read_text()

    def run(self, job: str, config: Config, *arguments: str) -> tuple[int, str]:
        """`slidelake submit --on PLACE JOB`; its exit status, and what it said."""
        with self.submitting(job, config, *arguments) as process:
            return process.wait(_COMMAND_S), self.said


def checkout_of(
    folder: Path, place: str, yours: Mapping[str, str], properties: str, conf: Mapping[str, object]
) -> Path:
    """A checkout with the code of dist/, the place filled in, and settings of Spark behind those of conf/spark/`properties`."""
    for part in ("conf/spark", "conf/places", "dist"):
        (folder / part).mkdir(parents=True)
    for part in ("pyproject.toml", "jobs", "udfs", "conf/gpu", "conf/k8s", "conf/locks", f"dist/{CODE.name}"):
        (folder / part).symlink_to(ROOT / part)
    described = yaml.safe_load((ROOT / f"conf/places/{place}.yaml").read_text())
    assert described["yours"].keys() == yours.keys()
    (folder / f"conf/places/{place}.yaml").write_text(yaml.safe_dump(described | {"yours": dict(yours)}))
    added = "\n".join(f"{key} {value}" for key, value in conf.items())  # what comes last counts
    own = (ROOT / "conf/spark" / properties).read_text()
    (folder / "conf/spark" / properties).write_text(f"{own}\n{added}\n")
    return folder
