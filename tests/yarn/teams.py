"""Teams who send jobs to YARN from a laptop with a checkout, by `slidelake submit`, to nodes with neither code nor packages."""

import os
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pyspark
import yaml

from jobs.runtime.config import Config
from tests.cluster.clusters import daemon
from tests.environments import CODE, ROOT
from tests.stores.process import HOST
from tests.yarn.daemons import Yarn

_SPARK = Path(pyspark.__file__).parent
_COMMAND_S = 300


@dataclass(frozen=True)
class Laptop:
    """Where a team's commands are given."""

    cluster: Yarn
    checkout: Path  # like this one, but for what is a team's own in conf, and the archive of packages
    spark: Path  # SPARK_HOME

    @contextmanager
    def submitting(self, job: str, config: Config, *arguments: str) -> "Iterator[subprocess.Popen[bytes]]":
        """`slidelake submit --on yarn JOB` while it runs; what it says is in `said`."""
        settings = self.checkout / "my.yaml"
        settings.write_text(yaml.safe_dump(config.model_dump(mode="json")))
        words = ("--on", "yarn", job, "--config", str(settings), *arguments)
        environment = {
            "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
            "HADOOP_CONF_DIR": str(self.cluster.conf),
            "SPARK_HOME": str(self.spark),
            "SPARK_LOCAL_IP": HOST,
        }
        command = [sys.executable, "-m", "jobs", "submit", *words]
        with daemon(command, environment, self.checkout / "said.log") as process:
            yield process

    @property
    def said(self) -> str:
        """What the clients said."""
        return (self.checkout / "said.log").read_text()

    def run(self, job: str, config: Config, *arguments: str) -> tuple[int, str]:
        """`slidelake submit --on yarn JOB`; its exit status, and what it said."""
        with self.submitting(job, config, *arguments) as process:
            return process.wait(_COMMAND_S), self.said


def laptop(folder: Path, cluster: Yarn, environment: Path, queue: str, conf: Mapping[str, object]) -> Laptop:
    """A checkout with this queue and archive of packages, and these settings of Spark beside those of conf/spark/yarn.conf."""
    for part in ("conf/spark", "conf/places", "dist"):
        (folder / part).mkdir(parents=True)
    for part in ("pyproject.toml", "jobs", "udfs", "conf/gpu", "conf/locks"):
        (folder / part).symlink_to(ROOT / part)
    (folder / "dist" / CODE.name).symlink_to(CODE)
    (folder / "dist/environment.tar.gz").symlink_to(environment)
    place = yaml.safe_load((ROOT / "conf/places/yarn.yaml").read_text())
    place["yours"] = {"queue": queue, "event_logs": event_logs(cluster).as_uri()}
    (folder / "conf/places/yarn.yaml").write_text(yaml.safe_dump(place))
    spark = _spark_without_delta(folder / "spark")
    own = {
        "spark.yarn.stagingDir": (cluster.folder / "staging").as_uri(),
        "spark.yarn.jars": f"local:{spark}/jars/*",  # on every node already
        "spark.yarn.appMasterEnv.SPARK_LOCAL_IP": HOST,
        "spark.executorEnv.SPARK_LOCAL_IP": HOST,
        "spark.eventLog.rolling.enabled": "false",
        "spark.eventLog.compress": "false",
        "spark.sql.shuffle.partitions": 2,
        **conf,
    }
    text = (
        (ROOT / "conf/spark/yarn.conf")
        .read_text()
        .replace("#spark.executor.resource.gpu", "spark.executor.resource.gpu")
    )
    added = "\n".join(f"{key} {value}" for key, value in own.items())  # what comes last counts
    (folder / "conf/spark/yarn.conf").write_text(f"{text}\n{added}\n")
    return Laptop(cluster, folder, spark)


def event_logs(cluster: Yarn) -> Path:
    """The folder for those of all applications."""
    folder = cluster.folder / "events"
    folder.mkdir(exist_ok=True)
    return folder


def _spark_without_delta(home: Path) -> Path:
    """Spark as others have it: here, Delta's jars are among its own."""
    (home / "jars").mkdir(parents=True)
    for part in ("bin", "conf", "python"):
        (home / part).symlink_to(_SPARK / part)
    for jar in (_SPARK / "jars").iterdir():
        if not jar.name.startswith("delta-"):
            (home / "jars" / jar.name).symlink_to(jar)
    return home
